"""Hand-driven peers: the other side of the tunnel, written from docs/protocol.md alone.

The seed peers do what the Go program does, byte for byte as in tests/data/seed-*.json; the
native peers compute their own proofs. None of them uses the package's code. All speak TLS
where the greeting says so; which library they do it with is their argument.
"""

from __future__ import annotations

import asyncio
import functools
import hashlib
import hmac
import os
import re
import secrets
import socket
from types import TracebackType
from typing import Final, Self
from urllib.parse import SplitResult, parse_qs, urlsplit

from .authority import Issued
from .secure import (
    LibrarySide,
    PythonSide,
    TlsStream,
    library_client,
    library_server,
    python_client,
    python_server,
    secure,
)
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
    """The Go client: listens on control, dials data links, never writes on control.

    Args:
        ca: trust anchors for mode 2, in which Go verifies the name that it dialled.
    """

    def __init__(
        self, tunnel_port: int, source: str = "127.0.0.1", *, ca: str | None = None
    ) -> None:
        super().__init__()
        self._tunnel_port = tunnel_port
        self._source = source
        self._ca = ca
        self.data_port = 0
        self.tls = 0
        self.links: dict[str, Stream] = {}

    async def __aenter__(self) -> Self:
        control = await connect(self._tunnel_port, source=self._source)
        self._control = self.keep(control)
        # Go: url.Parse of the trimmed line, then Host and Fragment only
        greeting = urlsplit((await control.read_line()).decode().strip())
        self.data_port = int(greeting.netloc)
        self.tls = int(greeting.fragment)
        return self

    async def dial(self) -> str:
        """Open one data link; return the id that the server gave it."""
        link = self.keep(await connect(self.data_port, source=self._source))
        if self.tls:
            context = python_client(self._ca if self.tls == 2 else None)
            link = await secure(link, PythonSide(context, name="127.0.0.1"))
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
    """The Go server: greets, beats, names links, launches.

    Args:
        files: its certificate, once it greets with a TLS mode.
    """

    def __init__(self, port: int = 0, *, files: Issued | None = None) -> None:
        super().__init__()
        self._files = files
        self._tls = 0
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
        self._tls = tls
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
        if self._tls:
            assert self._files is not None, "no certificate"
            link = await secure(link, PythonSide(python_server(self._files), is_server=True))
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


@functools.cache
def stretch(password: str) -> bytes:
    """K of docs/protocol.md."""
    return hashlib.scrypt(
        password.encode(), salt=b"nodepass/2", n=2**15, r=8, p=1, maxmem=2**26, dklen=32
    )


def join(*parts: bytes) -> bytes:
    """LP of docs/protocol.md."""
    return b"".join(len(part).to_bytes(2, "big") + part for part in parts)


def mac(key: bytes, *parts: bytes) -> str:
    """HMAC-SHA256 over a length-prefixed list, as hex: "Proofs" of docs/protocol.md."""
    return hmac.new(key, join(*parts), hashlib.sha256).hexdigest()


def binding_of(stream: Stream) -> bytes:
    """B of docs/protocol.md."""
    if not isinstance(stream, TlsStream):
        return b""
    assert isinstance(stream.side, LibrarySide), "this library has no exporter"
    return stream.side.binding()


class NativeClient(Peer):
    """A native client; with TLS wherever the greeting asks for it, verifying nothing."""

    def __init__(
        self,
        tunnel_port: int,
        name: str = "by-hand",
        *,
        password: str = "",
        source: str = "127.0.0.1",
    ) -> None:
        super().__init__()
        self._tunnel_port = tunnel_port
        self._source = source
        self._name = name
        self._password = password
        self.session = ""
        self.key = b""
        self.idle = 0

    async def greeted(self) -> tuple[Stream, bytes]:
        """Dial; return the connection, inside TLS if need be, and the greeting without LF."""
        stream = self.keep(await connect(self._tunnel_port, source=self._source))
        greeting = await stream.read_line()
        found = GREETING.fullmatch(greeting)
        assert found, greeting
        if found[4] != b"0":
            stream = await secure(stream, LibrarySide(library_client()))
        return stream, greeting[:-1]

    async def hello(self, proof: str | None = None) -> bytes:
        """Open a control connection; return the answer. A given proof replaces the right one."""
        self._control, greeting = await self.greeted()
        hello = f"hello://{self._name}?v=2&n={os.urandom(16).hex()}"
        script = join(greeting, binding_of(self._control), hello.encode())
        if proof is None and self._password:
            proof = mac(stretch(self._password), b"nodepass/2 client", script)
        await self.say(hello + (f"&p={proof}" if proof else ""))
        answer = await self._control.read_line()
        if answer.startswith(b"welcome://"):
            self._take(urlsplit(answer.decode().strip()), script)
        return answer

    def _take(self, welcome: SplitResult, script: bytes) -> None:
        fields = parse_qs(welcome.query)
        self.session = welcome.netloc
        self.idle = int(fields["idle"][0])
        if not self._password:
            self.key = bytes.fromhex(fields["k"][0])
            return
        assert "k" not in fields, "a session key on the wire although there is a password"
        secret, session = stretch(self._password), self.session.encode()
        # the script goes in as the bytes it is: a list within a list
        proof = mac(secret, b"nodepass/2 server", script, session)
        assert fields["p"] == [proof], "the server has not proven that it has the password"
        self.key = bytes.fromhex(mac(secret, b"nodepass/2 session", script, session))

    async def __aenter__(self) -> Self:
        answer = await self.hello()
        assert answer.startswith(b"welcome://"), answer
        return self

    async def link(self, number: int, proof: str = "", more: bytes = b"") -> Stream:
        """Open a data link; a given proof replaces the right one, `more` goes with the claim."""
        stream, greeting = await self.greeted()
        good = mac(
            self.key,
            b"nodepass/2 link",
            greeting,
            binding_of(stream),
            self.session.encode(),
            str(number).encode(),
        )
        claim = f"link://{self.session}?i={number}&p={proof or good}\n"
        await stream.write(claim.encode() + more)
        return stream


class NativeServer(Peer):
    """A native server.

    Args:
        tls: mode of its greetings.
        files: its certificate, where the mode is not 0.
        password: what it asks for and proves.
    """

    def __init__(
        self, port: int = 0, *, tls: int = 0, files: Issued | None = None, password: str = ""
    ) -> None:
        super().__init__()
        self.listener = Listener(port)
        self._owned.append(self.listener)
        self.tls = tls
        self._context = None if files is None else library_server(files)
        self._password = password
        self.session = secrets.token_hex(8)
        self.key = secrets.token_bytes(32)

    async def __aenter__(self) -> Self:
        return self

    async def accept(self) -> tuple[Stream, bytes, str]:
        """Greet the next connection; return it with the greeting and its first line."""
        stream = self.keep(await self.listener.accept())
        wants = int(bool(self._password))
        greeting = f"//0?v=2&n={os.urandom(16).hex()}&a={wants}#{self.tls}".encode()
        await stream.write(greeting + b"\n")
        if self.tls:
            assert self._context is not None, "no certificate"
            stream = await secure(stream, LibrarySide(self._context, is_server=True))
        return stream, greeting, (await stream.read_line()).decode().strip()

    async def welcome(self, idle: int = 2) -> str:
        """Take the client's control connection; return the name it gives."""
        self._control, greeting, hello = await self.accept()
        found = re.fullmatch(r"(hello://([^?]+)\?v=2&n=[0-9a-f]{32})(?:&p=([0-9a-f]{64}))?", hello)
        assert found, hello
        if not self._password:
            assert found[3] is None, "a proof although none is asked for"
            await self.say(f"welcome://{self.session}?k={self.key.hex()}&idle={idle}")
            return found[2]
        secret, session = stretch(self._password), self.session.encode()
        script = join(greeting, binding_of(self._control), found[1].encode())
        assert found[3] == mac(secret, b"nodepass/2 client", script), "wrong password proof"
        self.key = bytes.fromhex(mac(secret, b"nodepass/2 session", script, session))
        proof = mac(secret, b"nodepass/2 server", script, session)
        await self.say(f"welcome://{self.session}?p={proof}&idle={idle}")
        return found[2]

    async def link(self) -> tuple[int, Stream]:
        """Take one data link, its proof checked; return its number."""
        stream, greeting, line = await self.accept()
        found = re.fullmatch(rf"link://{self.session}\?i=(\d+)&p=([0-9a-f]{{64}})", line)
        assert found, line
        good = mac(
            self.key,
            b"nodepass/2 link",
            greeting,
            binding_of(stream),
            self.session.encode(),
            found[1].encode(),
        )
        assert found[2] == good, "wrong link proof"
        return int(found[1]), stream
