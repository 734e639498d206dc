"""Both recorded conversations with the Go program, replayed over sockets, row by row.

Our Server meets the recorded client, our Client the recorded server; each row of tests/data is
either written by the test or expected from us.
"""

from __future__ import annotations

import asyncio
import re
import socket
from collections.abc import Iterable

import pytest
from tests.kit.peer import Listener
from tests.kit.recording import Row, recording
from tests.kit.stream import Stream, connect
from tests.kit.timing import free_port, within

from nodepass import Client, Server


def udp_socket(port: int = 0) -> socket.socket:
    sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    sock.setblocking(False)
    sock.bind(("127.0.0.1", port))
    return sock


async def heard(sock: socket.socket) -> tuple[bytes, tuple[str, int]]:
    """Wait for a datagram; return it and its source."""
    ear = asyncio.Event()
    asyncio.get_running_loop().add_reader(sock, ear.set)
    try:
        await ear.wait()
    finally:
        asyncio.get_running_loop().remove_reader(sock)
    return sock.recvfrom(1000)


def go_reads(greeting: bytes) -> tuple[int, bytes]:
    """Host and fragment of Go's url.Parse(strings.TrimSpace(line)): the data port, the mode."""
    rest, _, fragment = greeting.strip().partition(b"#")
    return int(rest.removeprefix(b"//").partition(b"?")[0]), fragment


async def expect(stream: Stream, data: bytes) -> None:
    """Read what a row says; an empty row is a FIN."""
    got = await stream.read_exactly(len(data)) if data else await stream.read()
    assert got == data


class RecordedClient:
    """The client of seed-server.json, and the visitor whom it notes."""

    def __init__(self, tunnel_port: int, target_port: int) -> None:
        self._tunnel_port = tunnel_port
        self._target_port = target_port
        self._streams: dict[str, Stream] = {}
        self._data_port = 0
        self._udp = udp_socket()
        self._is_udp = False
        self._ours: dict[bytes, bytes] = {}
        """The id that our server chose, by the recorded one."""
        self._channel_of: dict[bytes, str] = {}
        """The channel that our server gave an id on."""

    async def play(self, rows: Iterable[Row]) -> None:
        self._streams["control"] = await connect(self._tunnel_port)
        for row in rows:
            match row.channel, row.direction:
                case "control", "s>c" if row.data.startswith(b"//") and not self._data_port:
                    await self._greeted(row)
                case "control", "s>c" if b"#2" in row.data:
                    await self._launched_udp(row)
                case "control", "s>c":
                    await self._launched(row)
                case channel, "s>c" if channel not in self._streams:
                    await self._dial(row)
                case channel, "s>c" if self._is_udp and row.data:
                    await expect(self._streams[channel], row.data)
                case channel, _ if self._is_udp and row.data:
                    # The Go client closes behind the answer; the recorder did not.
                    await self._streams[channel].write(row.data)
                    self._streams[channel].finish()
                    assert (await heard(self._udp))[0] == row.data
                case _ if self._is_udp:
                    pass  # the recorder let the Go server wait
                case channel, "s>c":
                    await self._visitor_writes(row.data)
                    await expect(self._streams[channel], row.data)
                case channel, _:
                    await self._link_writes(self._streams[channel], row.data)
                    await expect(self._streams["visitor"], row.data)

    async def _greeted(self, row: Row) -> None:
        line = await self._streams["control"].read_line()
        self._data_port, fragment = go_reads(line)
        assert fragment == go_reads(row.data)[1]
        assert len(line) <= 256

    async def _dial(self, row: Row) -> None:
        link = self._streams[row.channel] = await connect(self._data_port)
        name = await link.read()  # the Go client reads once
        assert len(name) == len(row.data)
        assert re.fullmatch(rb"[0-9a-f]{8}", name)
        self._ours[row.data] = name
        self._channel_of[name] = row.channel

    async def _launched(self, row: Row) -> None:
        """Expect heartbeats and launches as recorded, on whichever link ours chooses."""
        self._streams["visitor"] = await connect(self._target_port)
        for line in row.data.splitlines(keepends=True):
            got = await self._streams["control"].read_line()
            while line != b"\n" == got:  # more heartbeats than were recorded
                got = await self._streams["control"].read_line()
            recorded = line[2:10]
            if recorded in self._ours:
                chosen = got[2:10]
                assert chosen in self._channel_of
                assert got == line.replace(recorded, chosen)
                self._swap(self._channel_of[chosen], self._channel_of[self._ours[recorded]])
            else:
                assert got == line

    async def _launched_udp(self, row: Row) -> None:
        """Say what the row's note has the visitor say, and expect its launch."""
        self._is_udp = True
        said = re.search(r"datagram '([^']+)'", row.note)
        assert said
        self._udp.sendto(said[1].encode(), ("127.0.0.1", self._target_port))
        got = b"\n"
        while got == b"\n":
            got = await self._streams["control"].read_line()
        recorded, chosen = row.data[2:10], got[2:10]
        assert got == row.data.replace(recorded, chosen)
        self._swap(self._channel_of[chosen], self._channel_of[self._ours[recorded]])

    def _swap(self, one: str, two: str) -> None:
        """Let the link that ours chose play the recorded one's part."""
        streams = self._streams
        streams[one], streams[two] = streams[two], streams[one]

    async def _visitor_writes(self, data: bytes) -> None:
        await self._link_writes(self._streams["visitor"], data)

    async def _link_writes(self, stream: Stream, data: bytes) -> None:
        if data:
            await stream.write(data)
        else:
            stream.finish()

    def close(self) -> None:
        self._udp.close()
        for stream in self._streams.values():
            stream.close()


async def test_our_server_and_the_recorded_client(
    engine: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """seed-server.json with our server in the Go server's place."""
    monkeypatch.setenv("NODEPASS_ENGINE", engine)
    monkeypatch.setenv("REPORT_INTERVAL", "1s")
    tunnel, target = free_port(), free_port()
    rows = recording("seed-server")
    assert [row.data for row in rows if row.channel == "data0"][1:] == [
        b"hello tcp", b"answer", b"", b"late", b"",
    ]  # fmt: skip
    url = f"server://127.0.0.1:{tunnel}/127.0.0.1:{target}?log=none"
    async with within(20), Server(url) as server:
        client = RecordedClient(tunnel, target)
        try:
            await client.play(rows)
            seen = server.statistics()
            assert (seen.links, seen.visitors, seen.strangers) == (3, 2, 0)
        finally:
            client.close()


class RecordedServer:
    """The server of seed-client.json, and the target behind the client."""

    def __init__(self) -> None:
        self.tunnel, self.target = Listener(), Listener()
        self._udp = udp_socket(self.target.port)
        self._asker = ("", 0)
        self._data = Listener()
        self._streams: dict[str, Stream] = {}

    async def play(self, rows: Iterable[Row]) -> None:
        self._streams["control"] = await self.tunnel.accept()
        for row in rows:
            match row.channel, row.direction:
                case "control", "s>c":
                    await self._streams["control"].write(self._at_our_port(row.data))
                case "control", _:
                    await self._hears_nothing()
                case channel, "s>c":
                    if channel not in self._streams:
                        self._streams[channel] = await self._data.accept()
                    await self._streams[channel].write(row.data)
                case "target", "c>t" if row.note == "UDP":
                    data, self._asker = await heard(self._udp)
                    assert data == row.data
                case "target", _ if row.note == "UDP":
                    self._udp.sendto(row.data, self._asker)
                case "target", "c>t":
                    self._streams["target"] = await self.target.accept()
                    await expect(self._streams["target"], row.data)
                case "target", _:
                    await self._streams["target"].write(row.data)
                    self._streams["target"].close()  # the note of the FIN says who began
                case channel, _:
                    await expect(self._streams[channel], row.data)
                    if not row.data:
                        self._streams[channel].finish()  # or our client keeps its half open

    def _at_our_port(self, data: bytes) -> bytes:
        """Put our data port in, and take out a promise that the recorder did not mean.

        `v=2` in the recorded greeting shows that the Go client does not read the query; to
        our client it announces a native server.
        """
        return data.replace(b"//9102?v=2&", b"//%d?" % self._data.port)

    async def _hears_nothing(self) -> None:
        """A seed client never writes on control, and an unknown id ends nothing."""
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.2):
                await self._streams["control"].read()

    def close(self) -> None:
        self._udp.close()
        for stream in self._streams.values():
            stream.close()
        for listener in (self.tunnel, self.target, self._data):
            listener.close()


async def test_our_client_and_the_recorded_server(
    engine: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """seed-client.json with our client in the Go client's place."""
    monkeypatch.setenv("NODEPASS_ENGINE", engine)
    monkeypatch.setenv("MIN_POOL_CAPACITY", "2")
    monkeypatch.setenv("MAX_POOL_CAPACITY", "4")
    silence, *rows = recording("seed-client")
    assert silence.note == "the client stays silent and waits for the handshake line"
    assert rows[-1].note == "no answer to an unknown id"
    server = RecordedServer()
    try:
        url = f"client://127.0.0.1:{server.tunnel.port}/127.0.0.1:{server.target.port}"
        async with within(20), Client(f"{url}?log=none") as client:
            await server.play(rows)
            seen = client.statistics()
            assert (seen.sessions_open, seen.sessions, seen.relays_reset) == (1, 1, 0)
            assert (seen.bytes_up, seen.bytes_down) == (len(b"GETdgram"), len(b"OKreply"))
    finally:
        server.close()
