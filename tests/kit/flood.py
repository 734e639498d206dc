"""A crowd of attackers at a tunnel port, as a program of its own: it must not slow the test.

Usage: python flood.py PORT COUNT TAPE

Each of COUNT attackers comes again as soon as it is thrown out, with a short pause, until
stdin ends. A quarter each sends garbage, drips a TLS handshake byte by byte, stops in the
middle of one, and replays what TAPE holds (JSON: a list of hex strings, what real clients
have sent behind the greeting). One in ten comes from the address of the real client.

Prints a line after COUNT connections, and at the end a JSON object: connections made, most
of them open at once, and everything heard that was neither greeting nor refusal nor TLS
handshake or alert.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import random
import resource
import socket
import sys
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

PAUSE = 2.0
"""Seconds between two visits of one attacker at most; evenly spread, so half of it on average."""

FIRST_PAUSE = 0.2
"""Seconds within which all come for the first time."""

DRIP = 0.05
"""Seconds between two bytes."""

SOURCES = 40

OURS = ("//", "refuse://", "\x15\x03", "\x16\x03", "\x14\x03", "\x17\x03")
"""How everything begins that an attacker may hear: greeting, refusal, four kinds of record. A
record of application data (0x17) is the server's encrypted part of a handshake."""

CLIENT_HELLO = b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + os.urandom(500)


@dataclass
class Tally:
    """What has come of it."""

    made: int = 0
    open: int = 0
    most: int = 0
    heard: list[str] = field(default_factory=list)


Trick = Callable[[socket.socket], Awaitable[None]]


async def garbage(sock: socket.socket) -> None:
    with suppress(BlockingIOError):
        sock.send(random.randbytes(random.randrange(1, 4000)))


async def drip(sock: socket.socket) -> None:
    for byte in itertools.islice(CLIENT_HELLO, 200):
        sock.send(bytes([byte]))
        await asyncio.sleep(DRIP)


async def half_open(sock: socket.socket) -> None:
    sock.send(CLIENT_HELLO[: random.choice((1, 5, 200))])


def replay(tape: list[bytes]) -> Trick:
    async def trick(sock: socket.socket) -> None:
        with suppress(BlockingIOError):
            sock.send(random.choice(tape))

    return trick


async def attack(port: int, source: str, trick: Trick, tally: Tally) -> None:
    """Come, do it, listen to the end, come again."""
    pause = FIRST_PAUSE
    while True:
        await asyncio.sleep(random.random() * pause)
        pause = PAUSE
        with suppress(OSError), socket.socket() as sock:
            sock.setblocking(False)
            await visit(sock, port, source, trick, tally)


async def visit(sock: socket.socket, port: int, source: str, trick: Trick, tally: Tally) -> None:
    loop = asyncio.get_running_loop()
    sock.bind((source, 0))
    await loop.sock_connect(sock, ("127.0.0.1", port))
    tally.made += 1
    tally.open += 1
    tally.most = max(tally.most, tally.open)
    heard = b""
    try:
        heard = await loop.sock_recv(sock, 53)  # the greeting and no more
        await trick(sock)
        while data := await loop.sock_recv(sock, 65536):
            text = data.decode("latin1")
            if not text.startswith(OURS):
                tally.heard.append(text)
    finally:
        tally.open -= 1
        if heard and not heard.startswith(b"//"):
            tally.heard.append(heard.decode("latin1"))


async def flood(port: int, count: int, tape: list[bytes]) -> None:
    tally = Tally()
    tricks = (garbage, drip, half_open, replay(tape))
    attackers = [
        asyncio.create_task(
            attack(
                port,
                f"127.0.1.{number % SOURCES + 1}" if number % 10 else "127.0.0.1",
                tricks[number % len(tricks)],
                tally,
            )
        )
        for number in range(count)
    ]
    stdin = asyncio.create_task(asyncio.to_thread(sys.stdin.read))
    while tally.made < count and not stdin.done():
        await asyncio.sleep(0.01)
    print("at it", flush=True)
    await stdin
    for attacker in attackers:
        attacker.cancel()
    await asyncio.gather(*attackers, return_exceptions=True)
    print(json.dumps({"made": tally.made, "most": tally.most, "heard": tally.heard}), flush=True)


if __name__ == "__main__":
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (limit, limit))
    recorded = [bytes.fromhex(text) for text in json.loads(Path(sys.argv[3]).read_text())]
    asyncio.run(flood(int(sys.argv[1]), int(sys.argv[2]), recorded))
