"""An engine and all that calls can be made with: the calls of `engine_calls` are played here.

What is the engine's and what still the caller's is looked at after each call.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import socket
import stat
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from OpenSSL import SSL
from tests.fuzz.engine_calls import (
    ALLOWED,
    LINGER,
    OPTIONS_OF,
    PAUSE,
    Call,
    Dying,
    Fickle,
    Pretender,
    Word,
)
from tests.kit.engine_rig import Kind
from tests.kit.options import fold
from tests.kit.tls_rig import our_end

from nodepass.errors import EngineError


def linger(sock: socket.socket) -> tuple[int, int]:
    on, seconds = LINGER.unpack(sock.getsockopt(socket.SOL_SOCKET, socket.SO_LINGER, LINGER.size))
    return on, seconds


@dataclass(frozen=True)
class Looks:
    """A descriptor of the caller's, as it was before a call."""

    sock: socket.socket
    number: int
    inode: int
    is_blocking: bool
    linger: tuple[int, int]

    @classmethod
    def of(cls, sock: socket.socket) -> Looks:
        number = sock.fileno()
        return cls(sock, number, os.fstat(number).st_ino, os.get_blocking(number), linger(sock))


class Stage:
    """An engine and things to give it.

    Args:
        kind: which engine.
    """

    def __init__(self, kind: Kind) -> None:
        self.kind = kind
        self.stack = contextlib.ExitStack()
        self.here: dict[str, socket.socket] = {}
        """Sockets of the caller's, by what they are."""
        self.others: list[socket.socket] = []
        """The far ends."""
        self.tokens: list[int] = []
        self.newcomers: list[int] = []
        self.ended: list[int] = []
        self.ports: dict[int, int] = {}
        """Of gates, by token."""
        self.is_struck = False
        self.taken = -1
        self.shared = our_end(False)
        self.connections: list[object] = []
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.stack.callback(self.listener.close)
        self.engine = kind.module.Engine(kind.threads, flows=16, splice=kind.splice)

    # --- arguments ---

    def socket_number(self, name: str) -> int:
        """Return a descriptor of this kind."""
        if name == "taken":
            return self.taken
        if name == "own":
            try:
                return int(self.engine.fileno())
            except EngineError:
                return -1
        if name == "closed":
            with socket.socket() as sock:
                return sock.fileno()
        if name == "file":
            return self._file(os.open(os.devnull, os.O_RDWR | os.O_NONBLOCK))
        if name == "pipe":
            reading, writing = os.pipe2(os.O_NONBLOCK)
            self._file(writing)
            return self._file(reading)
        if name not in self.here:
            self.here[name] = self._make(name)
        return self.here[name].fileno()

    def _file(self, fd: int) -> int:
        self.stack.callback(os.close, fd)
        return fd

    def _make(self, name: str) -> socket.socket:
        if name.startswith("tcp"):
            sock = socket.create_connection(self.listener.getsockname())
            self.others.append(self.listener.accept()[0])
        elif name in {"unix", "blocking", "seqpacket", "udp-unix"}:
            kinds = {"seqpacket": socket.SOCK_SEQPACKET, "udp-unix": socket.SOCK_DGRAM}
            sock, other = socket.socketpair(type=kinds.get(name, socket.SOCK_STREAM))
            self.others.append(other)
        elif name == "dup":
            sock = socket.socket(fileno=os.dup(self.socket_number("tcp")))
        elif name.startswith("udp"):
            sock = socket.socket(type=socket.SOCK_DGRAM)
            sock.bind(("127.0.0.1", 0))
            if name != "udp-bound":
                sock.connect(("127.0.0.1", 9))
        else:
            sock = socket.socket()
        if name == "listener":
            sock.bind(("127.0.0.1", 0))
            sock.listen()
        sock.setblocking(name == "blocking")
        return sock

    def token(self, name: str) -> int:
        """Return a token of this kind; one that nobody has where there is none."""
        places = {"token": self.tokens[-1:], "first": self.tokens[:1],
                  "newcomer": self.newcomers[-1:], "ended": self.ended[-1:]}  # fmt: skip
        return (places.get(name) or [(7 << 32) + 5])[0]

    def tls(self, name: str) -> object:
        """Return something for an argument that is meant for TLS."""
        found: object = None
        if name == "fresh":
            found = our_end(True)
        elif name == "shared":
            found = self.shared
        elif name == "on-socket":
            self.socket_number("tcp-3")
            found = SSL.Connection(SSL.Context(SSL.TLS_METHOD), self.here["tcp-3"])
        elif name == "empty":
            found = SSL.Connection.__new__(SSL.Connection)
        elif name == "pretender":
            found = Pretender()
        elif name == "object":
            found = object()
        elif name == "context":
            found = SSL.Context(SSL.TLS_METHOD)
        return found

    def deed(self, name: str) -> None:
        """Do something with the engine in the middle of a call."""
        if self.is_struck:
            return
        with contextlib.suppress(EngineError):
            if name == "abort":
                self.engine.abort(self.token("token"))
            elif name == "relay":
                a, b = Word("socket", "tcp-2"), Word("socket", "unix")
                self.call(Call("relay", (("fd_a", a), ("fd_b", b))))
            elif name == "poll":
                self._note(self.engine.poll())
            else:
                getattr(self.engine, name)()

    def value(self, word: Word) -> Any:
        """Return what a word stands for."""
        what: Any = word.what
        if word.kind == "socket":
            return self.socket_number(what)
        if word.kind == "late socket":
            return Fickle([self.socket_number(what[0])], lambda: self.deed(what[1]))
        if word.kind == "token":
            return self.token(what)
        if word.kind == "tls":
            return self.tls(what)
        if word.kind == "address":
            return self.listener.getsockname()
        if word.kind == "fickle":
            deed = (lambda: self.deed(what[1])) if what[1] else None
            return Fickle(list(what[0]), deed)
        if word.kind == "dying":
            return Dying(lambda: self.deed(what))
        return what

    # --- calls ---

    async def play(self, call: Call) -> None:
        """Do one thing, and look what has become of it."""
        if call.method == "settle":
            await asyncio.sleep(PAUSE)
        elif call.method == "datagram":
            self._send_datagrams()
            await asyncio.sleep(PAUSE)
        else:
            self.call(call)

    def _send_datagrams(self) -> None:
        for token in self.tokens:
            port = self.ports.get(token)
            if port:
                sock = socket.socket(type=socket.SOCK_DGRAM)
                self.others.append(sock)
                sock.sendto(b"datagram", ("127.0.0.1", port))

    def call(self, call: Call) -> None:
        """Make one call, and look at every descriptor afterwards."""
        arguments = {name: self.value(word) for name, word in call.words}
        if any(is_a_socket_of_others(value) for value in arguments.values()):
            return
        ports = {sock.fileno(): sock.getsockname()[1] for name, sock in self.here.items()
                 if name in {"udp", "udp-2", "udp-bound"}}  # fmt: skip
        before = {name: Looks.of(sock) for name, sock in self.here.items()}
        result = None
        try:
            result = self._make_call(call, arguments)
        except ALLOWED:
            pass
        else:
            if call.method in {"relay", "dial", "udp_serve", "udp_bind", "udp_dial", "handshake"}:
                self._admitted(call, arguments, result, ports)
            elif call.method == "udp_retarget" and result:
                self._disown(call, arguments, 0, ports)
        arguments.clear()
        for name, looks in before.items():
            if self.here.get(name) is looks.sock:
                assert Looks.of(looks.sock) == looks, (call, name)

    def _make_call(self, call: Call, arguments: dict[str, Any]) -> Any:
        method = getattr(self.engine, call.method)
        given = fold(arguments) if call.method in OPTIONS_OF else arguments
        if not (call.is_elsewhere and self.kind.is_native):
            result = method(**given)
        else:
            results: list[Any] = []
            failures: list[Exception] = []

            def run() -> None:
                try:
                    results.append(method(**given))
                except ALLOWED as exc:
                    failures.append(exc)

            thread = threading.Thread(target=run)
            thread.start()
            thread.join()
            if failures:
                raise failures[0]
            (result,) = results
        if call.method == "poll":
            self._note(result)
        return result

    def _note(self, reports: Any) -> None:
        for report in reports:
            if isinstance(report, self.kind.module.Newcomer):
                self.newcomers.append(report.token)
                continue
            if report.token in self.tokens:
                self.tokens.remove(report.token)
                self.ended.append(report.token)
            else:
                assert report.token in self.newcomers, "a completion of nobody's"

    def _admitted(
        self, call: Call, arguments: dict[str, Any], token: Any, ports: dict[int, int]
    ) -> None:
        """Take note that descriptors are the engine's."""
        assert type(token) is int, token
        assert token > 0, token
        assert token not in self.tokens
        self.tokens.append(token)
        self.connections += [value for name, value in arguments.items() if name.startswith("tls")]
        self._disown(call, arguments, token, ports)

    def _disown(
        self, call: Call, arguments: dict[str, Any], token: int, ports: dict[int, int]
    ) -> None:
        for name in ("fd", "fd_a", "fd_b", "target"):
            if name not in arguments:
                continue
            given = arguments[name]
            first: Any = given.values[0] if isinstance(given, Fickle) else given
            number = int(first)
            owner = [key for key, sock in self.here.items() if sock.fileno() == number]
            assert owner, f"{call}: took {number}, which is not the caller's"
            if call.method == "handshake":
                # Lent: not to be touched before its end, which is when the stage is struck.
                self.others.append(self.here.pop(owner[0]))
                continue
            self.here.pop(owner[0]).detach()
            self.taken = number
            if call.method == "udp_serve":
                self.ports[token] = ports[number]

    # --- the end ---

    async def strike(self) -> None:
        """End everything; assert that all is accounted for."""
        self.is_struck = True
        engine = self.engine
        assert engine.close() is True
        self._note(engine.poll())
        assert not self.tokens, f"no completion for {self.tokens}"
        figures = engine.statistics()
        balances = ("flows_open", "fds_open", "parked_bytes", "buffers_in_use", "pipes_in_use",
                    "tls_in_use", "gates_open", "peers_waiting", "datagram_bytes_held",
                    "bugs")  # fmt: skip
        assert not any(getattr(figures, name) for name in balances), figures
        for name, sock in self.here.items():
            sock.getsockopt(socket.SOL_SOCKET, socket.SO_TYPE)
            assert name == "fresh" or not linger(sock)[0], name
        for sock in [*self.here.values(), *self.others]:
            sock.close()
        self.stack.close()
        await asyncio.sleep(0)  # what the loop was asked to do soon


def is_a_socket_of_others(value: object) -> bool:
    """Tell whether a small number is, by bad luck, the socket of whoever runs the tests."""
    if type(value) is not int and type(value) is not bool:
        return False
    if not 0 <= value <= 2:
        return False
    try:
        return stat.S_ISSOCK(os.fstat(value).st_mode)
    except OSError as exc:
        assert exc.errno == errno.EBADF
        return False


@contextlib.contextmanager
def stage(kind: Kind) -> Iterator[Stage]:
    """Have a stage, whose sockets are closed whatever happens."""
    opened = Stage(kind)
    try:
        yield opened
    finally:
        opened.is_struck = True
        opened.engine.close()
        for sock in [*opened.here.values(), *opened.others]:
            sock.close()
        opened.stack.close()
