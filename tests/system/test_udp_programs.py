"""Real programs talk UDP through the tunnel: dig and dnsmasq, iperf3, DTLS by openssl."""

from __future__ import annotations

import asyncio
import json
import re
import shutil
from asyncio.subprocess import DEVNULL, PIPE, STDOUT, Process
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Final

import pytest
from tests.kit.authority import self_signed
from tests.kit.datagram import STEADY, UdpArena, at_rest, back_to
from tests.kit.timing import free_port, within

MANY: Final = 200
"""Addresses of one name: 16 bytes of answer for each."""


def needs(*programs: str) -> pytest.MarkDecorator:
    missing = [name for name in programs if _where(name) is None]
    return pytest.mark.skipif(bool(missing), reason=f"not installed: {', '.join(missing)}")


def _where(name: str) -> str | None:
    return shutil.which(name) or shutil.which(name, path="/usr/sbin:/sbin")


class Program:
    """A running program: what it printed, what it is told."""

    def __init__(self, process: Process) -> None:
        self.process = process
        self.printed = b""

    async def prints(self, pattern: str) -> re.Match[bytes]:
        """Read on until a pattern has been printed."""
        assert self.process.stdout is not None
        wanted = re.compile(pattern.encode())
        while not (found := wanted.search(self.printed)):
            data = await self.process.stdout.read(65536)
            assert data, f"{pattern!r} not in\n{self.printed.decode(errors='replace')}"
            self.printed += data
        return found

    async def say(self, line: str) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(line.encode() + b"\n")
        await self.process.stdin.drain()


@asynccontextmanager
async def running(name: str, *words: str) -> AsyncIterator[Program]:
    """Run a program for the length of a block."""
    process = await asyncio.create_subprocess_exec(
        _where(name) or name, *words, stdin=PIPE, stdout=PIPE, stderr=STDOUT
    )
    program = Program(process)
    try:
        yield program
    except BaseException:
        print(f"--- {name} {' '.join(words)}\n{program.printed.decode(errors='replace')}")
        raise
    finally:
        with suppress(ProcessLookupError):
            process.kill()
        await process.communicate()


async def output(name: str, *words: str) -> str:
    """Run a program to its end; return what it printed."""
    process = await asyncio.create_subprocess_exec(
        _where(name) or name, *words, stdin=DEVNULL, stdout=PIPE, stderr=STDOUT
    )
    try:
        printed, _ = await process.communicate()
    finally:
        if process.returncode is None:
            process.kill()
            await process.communicate()
    text = printed.decode(errors="replace")
    assert process.returncode == 0, f"{name} {' '.join(words)}: {process.returncode}\n{text}"
    return text


# --- DNS --------------------------------------------------------------------------------


@asynccontextmanager
async def dnsmasq(folder: Path) -> AsyncIterator[int]:
    """Serve a few names, and one with a great many addresses; yield the port."""
    port = free_port()
    lines = [f"host-record=host{n}.test,192.0.2.{n}" for n in range(1, 51)]
    lines += [f"host-record=many.test,198.51.100.{n}" for n in range(1, MANY + 1)]
    config = folder / "dnsmasq.conf"
    config.write_text("\n".join(lines) + "\n")
    options = f"""--keep-in-foreground --no-resolv --no-hosts --bind-interfaces --user=
        --listen-address=127.0.0.1 --port={port} --edns-packet-max=4096 --log-facility=-
        --pid-file= --conf-file={config} --local=/test/""".split()
    async with running("dnsmasq", *options) as program:
        await program.prints("started")
        yield port


async def dig(port: int, name: str, *more: str) -> str:
    """Look a name up, over UDP only and once."""
    words = f"@127.0.0.1 -p {port} {name} A +notcp +ignore +tries=1 +timeout=5 +nocookie"
    return await output("dig", *words.split(), *more)


@needs("dig", "dnsmasq")
async def test_dns_small_and_large_answers(tmp_path: Path, tls: str) -> None:
    async with UdpArena(tmp_path) as arena, dnsmasq(tmp_path) as far, within(30):
        tunnel = await arena.tunnel(far, server=tls)
        assert await dig(tunnel.port, "host7.test", "+short") == "192.0.2.7\n"
        whole = await dig(tunnel.port, "many.test", "+bufsize=4096")
        found = re.search(r"flags: ([a-z ]+);.*ANSWER: (\d+)", whole)
        assert found, whole
        assert "tc" not in found[1].split(), whole
        assert int(found[2]) == MANY
        size = re.search(r"MSG SIZE +rcvd: (\d+)", whole)
        assert size, whole
        assert int(size[1]) > 1500
        short = await dig(tunnel.port, "many.test", "+noedns")
        assert re.search(r"flags: [a-z ]*\btc\b", short), "512 bytes at most, as it asked for"


@needs("dig", "dnsmasq")
async def test_dns_falls_back_to_tcp_on_the_same_port(tmp_path: Path) -> None:
    async with UdpArena(tmp_path) as arena, dnsmasq(tmp_path) as far, within(20):
        tunnel = await arena.tunnel(far)
        words = f"@127.0.0.1 -p {tunnel.port} many.test A +noedns +tries=1"
        whole = await output("dig", *words.split())
        assert f"ANSWER: {MANY}" in whole
        assert "(TCP)" in whole, whole


@needs("dig", "dnsmasq")
async def test_f07_lookups_leave_no_descriptor_behind(tmp_path: Path) -> None:
    """50 at once, 10 one after another; each is a visitor of its own."""
    async with UdpArena(tmp_path, **STEADY) as arena, dnsmasq(tmp_path) as far, within(45):
        tunnel = await arena.tunnel(far, server="?tls=1")
        await dig(tunnel.port, "host1.test")  # what is opened once and kept is open now
        before = await at_rest(tunnel)
        answers = await asyncio.gather(
            *(dig(tunnel.port, f"host{n}.test", "+short") for n in range(1, 51))
        )
        assert answers == [f"192.0.2.{n}\n" for n in range(1, 51)]
        for number in range(1, 11):
            answer = await dig(tunnel.port, f"host{number}.test", "+short")
            assert answer == f"192.0.2.{number}\n"
        await back_to(tunnel, before)


# --- iperf3 -----------------------------------------------------------------------------


@needs("iperf3")
@pytest.mark.parametrize(
    ("direction", "tls"), [("up", ""), ("down", "?tls=1")], ids=["up-plain", "down-tls"]
)
async def test_iperf3_loses_next_to_nothing(tmp_path: Path, direction: str, tls: str) -> None:
    """Its control goes over TCP on the same port: one tunnel carries both."""
    async with UdpArena(tmp_path) as arena, within(30):
        far = free_port()
        async with running("iperf3", "-s", "-1", "-p", str(far), "--forceflush") as server:
            await server.prints("Server listening")
            tunnel = await arena.tunnel(far, server=tls)
            words = f"-c 127.0.0.1 -p {tunnel.port} -u -b 50M -t 2 -l 1400 -J".split()
            report = json.loads(
                await output("iperf3", *words, *(["-R"] if direction == "down" else []))
            )
            total = report["end"]["sum"]
            assert total["packets"] > 5000, total
            assert total["lost_percent"] < 1, total
            assert report["end"]["streams"][0]["udp"]["out_of_order"] == 0


# --- DTLS -------------------------------------------------------------------------------


@needs("openssl")
async def test_dtls_handshake_and_lines(tmp_path: Path, tls: str) -> None:
    """Flights of several datagrams, in time and in order; then lines in both directions."""
    files = self_signed(tmp_path, "127.0.0.1")
    far = free_port()
    listening = f"s_server -dtls -accept 127.0.0.1:{far} -cert {files.crt} -key {files.key}"
    async with (
        UdpArena(tmp_path) as arena,
        running("openssl", *listening.split()) as server,
        within(30),
    ):
        await server.prints("ACCEPT")
        tunnel = await arena.tunnel(far, server=tls)
        dialling = f"s_client -dtls -connect 127.0.0.1:{tunnel.port} -mtu 1400"
        async with running("openssl", *dialling.split()) as client:
            await client.prints("Cipher is [A-Z]")
            for number in range(3):
                await client.say(f"question {number}")
                await server.prints(f"question {number}")
                await server.say(f"answer {number}")
                await client.prints(f"answer {number}")
