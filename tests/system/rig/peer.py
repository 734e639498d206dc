"""Hand-driven peers: the other side of the tunnel, written from docs/protocol.md alone.

The seed peers do what the Go program does, byte for byte as in tests/data/seed-*.json; the
native peers compute their own proofs. None of them uses the package's code.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import os
import re
import secrets
import socket
from types import TracebackType
from typing import Final, Self
from urllib.parse import parse_qs, urlsplit

from .stream import Stream, connect
from .target import BACKLOG
from .timing import free_port

ID_SIZE: Final = 8
"""Characters of a seed link id."""

GREETING: Final = re.compile(rb"//(\d+)\?v=2&n=([0-9a-f]{32})&a=([01])#([012])\n")


class Listener:
    """A bound port whose connections wait until the test takes them."""

    def __init__(self, port: int = 0) -> None:
        self._sock = socket.socket()
        self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self.port = port or free_port()
        self._sock.bind(("127.0.0.1", self.port))
        self._sock.listen(BACKLOG)
        self._sock.setblocking(False)

    async def accept(self) -> Stream:
        sock, _ = await asyncio.get_running_loop().sock_accept(self._sock)
        return Stream(sock)

    def close(self) -> None:
        self._sock.close()


class Peer:
    """Owner of a hand-driven peer's connections."""

    def __init__(self) -> None:
        self._owned: list[Stream | Listener] = []
        self._control: Stream | None = None

    @property
    def control(self) -> Stream:
        assert self._control is not None, "no control connection yet"
        return self._control

    def keep(self, stream: Stream) -> Stream:
        """Close a connection with the peer, at the latest."""
        self._owned.append(stream)
        return stream

    async def signal(self) -> str:
        """Return the next line on control that is no heartbeat; "" at its end."""
        while line := await self.control.read_line():
            text = line.decode().rstrip("\n")
            if text and not text.startswith(("ping://", "pong://", "idle://")):
                return text
        return ""

    async def say(self, line: str) -> None:
        await self.control.write(line.encode() + b"\n")

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for thing in self._owned:
            thing.close()


class SeedClient(Peer):
    """The Go client: listens on control, dials data links, never writes on control."""

    def __init__(self, tunnel_port: int, source: str = "127.0.0.1") -> None:
        super().__init__()
        self._tunnel_port = tunnel_port
        self._source = source
        self.data_port = 0
        self.links: dict[str, Stream] = {}

    async def __aenter__(self) -> Self:
        control = await connect(self._tunnel_port, source=self._source)
        self._control = self.keep(control)
        # Go: url.Parse of the trimmed line, then Host and Fragment only
        greeting = urlsplit((await control.read_line()).decode().strip())
        self.data_port = int(greeting.netloc)
        assert greeting.fragment == "0", greeting
        return self

    async def dial(self) -> str:
        """Open one data link; return the id that the server gave it."""
        link = self.keep(await connect(self.data_port, source=self._source))
        name = (await link.read(ID_SIZE)).decode()  # one read, as Go does it
        assert re.fullmatch(r"[0-9a-f]{8}", name), name
        self.links[name] = link
        return name

    async def launched(self) -> Stream:
        """Wait for a TCP launch; return its link."""
        found = re.fullmatch(r"//([0-9a-f]{8})#1", text := await self.signal())
        assert found, text
        return self.links.pop(found[1])


class SeedServer(Peer):
    """The Go server: greets, beats, names links, launches."""

    def __init__(self, port: int = 0) -> None:
        super().__init__()
        self.listener = Listener(port)
        self.data = Listener()
        self._owned += [self.listener, self.data]
        self.links: dict[str, Stream] = {}
        self._beating: asyncio.Task[None] | None = None
        self.beats = 0
        """Heartbeats sent to the client that is connected now."""

    async def __aenter__(self) -> Self:
        return self

    async def greet(self, tls: int = 0, query: str = "", beat: float = 0.2) -> None:
        """Take the client's control connection, greet it, and start the heartbeat."""
        self._control = self.keep(await self.listener.accept())
        await self.say(f"//{self.data.port}{query}#{tls}")
        if self._beating:
            self._beating.cancel()
        self.beats = 0
        self._beating = asyncio.create_task(self._beat(self._control, beat))

    async def _beat(self, control: Stream, period: float) -> None:
        while True:
            await control.write(b"\n")
            self.beats += 1
            await asyncio.sleep(period)

    def fall_silent(self) -> None:
        if self._beating:
            self._beating.cancel()

    async def take(self) -> str:
        """Accept one data link and name it."""
        link = self.keep(await self.data.accept())
        name = secrets.token_hex(ID_SIZE // 2)
        await link.write(name.encode())
        self.links[name] = link
        return name

    async def launch(self, name: str, form: str = "//{}#1") -> Stream:
        await self.say(form.format(name))
        return self.links.pop(name)

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._beating:
            self._beating.cancel()
            await asyncio.gather(self._beating, return_exceptions=True)
        await super().__aexit__(kind, error, trace)


def mac(key: bytes, *parts: bytes) -> str:
    """HMAC-SHA256 over a length-prefixed list, as hex: "Proofs" of docs/protocol.md."""
    joined = b"".join(len(part).to_bytes(2, "big") + part for part in parts)
    return hmac.new(key, joined, hashlib.sha256).hexdigest()


class NativeClient(Peer):
    """A native client without a password."""

    def __init__(self, tunnel_port: int, name: str = "by-hand") -> None:
        super().__init__()
        self._tunnel_port = tunnel_port
        self._name = name
        self.session = ""
        self._key = b""
        self.idle = 0

    async def _greeted(self) -> tuple[Stream, bytes]:
        stream = self.keep(await connect(self._tunnel_port))
        greeting = await stream.read_line()
        assert GREETING.fullmatch(greeting), greeting
        return stream, greeting[:-1]

    async def __aenter__(self) -> Self:
        self._control, _ = await self._greeted()
        await self.say(f"hello://{self._name}?v=2&n={os.urandom(16).hex()}")
        welcome = urlsplit((await self._control.read_line()).decode().strip())
        assert welcome.scheme == "welcome", welcome
        fields = parse_qs(welcome.query)
        self.session = welcome.netloc
        self._key = bytes.fromhex(fields["k"][0])
        self.idle = int(fields["idle"][0])
        return self

    async def link(self, number: int, proof: str = "") -> Stream:
        """Open a data link; a given proof replaces the right one."""
        stream, greeting = await self._greeted()
        good = mac(
            self._key,
            b"nodepass/2 link",
            greeting,
            b"",
            self.session.encode(),
            str(number).encode(),
        )
        await stream.write(f"link://{self.session}?i={number}&p={proof or good}\n".encode())
        return stream


class NativeServer(Peer):
    """A native server without a password."""

    def __init__(self, port: int = 0) -> None:
        super().__init__()
        self.listener = Listener(port)
        self._owned.append(self.listener)
        self.session = secrets.token_hex(8)
        self.key = secrets.token_bytes(32)

    async def __aenter__(self) -> Self:
        return self

    async def accept(self) -> tuple[Stream, bytes, str]:
        """Greet the next connection; return it with the greeting and its first line."""
        stream = self.keep(await self.listener.accept())
        greeting = f"//0?v=2&n={os.urandom(16).hex()}&a=0#0".encode()
        await stream.write(greeting + b"\n")
        return stream, greeting, (await stream.read_line()).decode().strip()

    async def welcome(self, idle: int = 2) -> str:
        """Take the client's control connection; return the name it gives."""
        self._control, _, hello = await self.accept()
        found = re.fullmatch(r"hello://([^?]+)\?v=2&n=[0-9a-f]{32}", hello)
        assert found, hello
        await self.say(f"welcome://{self.session}?k={self.key.hex()}&idle={idle}")
        return found[1]

    async def link(self) -> tuple[int, Stream]:
        """Take one data link, its proof checked; return its number."""
        stream, greeting, line = await self.accept()
        found = re.fullmatch(rf"link://{self.session}\?i=(\d+)&p=([0-9a-f]{{64}})", line)
        assert found, line
        good = mac(
            self.key,
            b"nodepass/2 link",
            greeting,
            b"",
            self.session.encode(),
            found[1].encode(),
        )
        assert found[2] == good, "wrong link proof"
        return int(found[1]), stream
