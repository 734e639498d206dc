"""Somebody on the path: dials the real server, shows itself to the client as the server.

It does what a middle man on loopback can really do: it changes the greeting, ends TLS on
both sides with a certificate of its own (which proves as much as the client cares to check)
and passes plaintext on, or, on request, passes everything on as it is and keeps a record.
All that it could read is in `heard`.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Final, TypedDict

from .authority import Issued
from .secure import (
    LibrarySide,
    TlsFault,
    Truncated,
    library_client,
    library_server,
    secure,
)
from .stream import Stream, connect
from .target import Target

MODE: Final = re.compile(rb"#([012])\n$")

Rewrite = Callable[[bytes], bytes]


class Tricks(TypedDict, total=False):
    """What a middle man may be told to do."""

    files: Issued
    """The certificate it shows; without one it lets TLS pass through untouched."""
    rewrite: Rewrite
    """Changes the greeting, LF included."""


@dataclass
class Talk:
    """One connection, as it went by."""

    greeting: bytes
    """The server's own, LF included."""
    up: bytearray = field(default_factory=bytearray)
    """What the client sent behind the greeting: plaintext where TLS was ended, else as it was."""
    down: bytearray = field(default_factory=bytearray)


class MiddleMan:
    """Listens on `port`, dials `upstream` for each connection."""

    def __init__(
        self, upstream: int, *, files: Issued | None = None, rewrite: Rewrite | None = None
    ) -> None:
        self._upstream = upstream
        self._context = None if files is None else library_server(files)
        self._rewrite = rewrite or (lambda greeting: greeting)
        self._service = Target(self._serve)
        self.port = self._service.port
        self.talks: list[Talk] = []
        self.faults: list[str] = []
        """Why TLS failed with the client, as alerts name it."""

    @property
    def heard(self) -> bytes:
        """Return everything that could be read, both directions of all connections."""
        return b"\0".join(bytes(talk.up + b"\0" + talk.down) for talk in self.talks)

    async def close(self) -> None:
        await self._service.close()

    async def _serve(self, near: Stream) -> None:
        async with await connect(self._upstream) as far:
            try:
                await self._stand_between(near, far)
            except TlsFault as fault:
                self.faults.append(str(fault))
            except Truncated as end:
                self.faults.append(str(end))

    async def _stand_between(self, near: Stream, far: Stream) -> None:
        greeting = await far.read_line()
        changed = self._rewrite(greeting)
        await near.write(changed)
        self.talks.append(talk := Talk(greeting))
        if self._context is not None:
            if _mode(changed):
                near = await secure(near, LibrarySide(self._context, is_server=True))
            if _mode(greeting):
                far = await secure(far, LibrarySide(library_client()))
        try:
            async with asyncio.TaskGroup() as pumps:
                pumps.create_task(_pump(near, far, talk.up))
                pumps.create_task(_pump(far, near, talk.down))
        except* (OSError, EOFError):
            near.reset()
            far.reset()


def _mode(greeting: bytes) -> int:
    found = MODE.search(greeting)
    return int(found[1]) if found else 0


async def _pump(source: Stream, sink: Stream, record: bytearray) -> None:
    while data := await source.read():
        record += data
        await sink.write(data)
    with suppress(OSError):
        sink.finish()


def lower_tls(greeting: bytes) -> bytes:
    """Claim that the server speaks no TLS."""
    return MODE.sub(b"#0\n", greeting)


def drop_password(greeting: bytes) -> bytes:
    """Claim that the server asks for no password."""
    return greeting.replace(b"&a=1", b"&a=0")


def look_like_seed(greeting: bytes) -> bytes:
    """Claim that the server is the Go program."""
    return re.sub(rb"^//\d+\?[^#]*", b"//4711", greeting)
