"""The whole interface of an engine, called with anything at all; the stub says what it has.

A `Call` is a value that hypothesis can draw, shrink and print; a `Stage` has an engine and
descriptors of every kind, plays calls and looks after each what has become of them:

* nothing but the errors of ALLOWED comes out;
* what was refused leaves every descriptor the caller's, open and as it was, SO_LINGER unarmed;
* what was followed owns exactly the descriptors it was given, and ends with one completion;
* nothing is left behind by the engine, whatever was done to it.
"""

from __future__ import annotations

import ast
import asyncio
import contextlib
import errno
import os
import socket
import stat
import struct
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any, Final

from hypothesis import strategies as st
from OpenSSL import SSL
from tests.kit.engine_rig import Kind
from tests.kit.options import fold
from tests.kit.tls_rig import our_end

import nodepass
from nodepass.engine.types import PLAIN
from nodepass.errors import EngineError


class Naughty(Exception):
    """Raised by our own objects in the middle of a call."""


ALLOWED: Final = (TypeError, ValueError, OverflowError, EngineError, Naughty)
LINGER: Final = struct.Struct("ii")
PAUSE: Final = 0.002
"""Seconds in which an engine may do what it was asked: nothing depends on whether it has."""
GIVING_TIME: Final = 10.0


# --- what the stub says --------------------------------------------------------------------------


def _stub() -> tuple[dict[str, ast.FunctionDef], dict[str, ast.FunctionDef]]:
    tree = ast.parse((Path(nodepass.__path__[0]) / "_fastcopy.pyi").read_text())
    functions = {node.name: node for node in tree.body if isinstance(node, ast.FunctionDef)}
    (engine,) = [
        node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == "Engine"
    ]
    methods = {node.name: node for node in engine.body if isinstance(node, ast.FunctionDef)}
    return functions, methods


FUNCTIONS, METHODS = _stub()


OPTIONS_OF: Final = {
    "relay": ("idle",),
    "dial": ("idle", "timeout"),
    "udp_serve": ("datagram", "gso"),
    "udp_bind": ("idle", "raw"),
    "udp_dial": ("idle", "datagram", "raw", "gso"),
}
"""Fields of FlowOptions that count; here they are parameters as all others, see `fold`."""


def parameters(method: str) -> dict[str, bool]:
    """Return the parameters of a method, and whether each may be left out."""
    arguments = METHODS[method].args
    plain = [arg.arg for arg in arguments.args[1:]]
    needed = len(plain) - len(arguments.defaults)
    found = {name: place >= needed for place, name in enumerate(plain)}
    for arg, value in zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True):
        found[arg.arg] = value is not None
    if "options" in found:
        found |= dict.fromkeys(OPTIONS_OF[method], True)
    return found


# --- objects that do not stand still -------------------------------------------------------------


class Fickle:
    """A number that is another one each time it is asked, and does something first."""

    def __init__(self, values: list[object], deed: Callable[[], object] | None = None) -> None:
        self.values = values
        self.deed = deed
        self.asked = 0

    def _next(self) -> Any:
        if self.deed is not None:
            self.deed()
        self.asked += 1
        return self.values[min(self.asked, len(self.values)) - 1]

    def __index__(self) -> int:
        return self._next()  # type: ignore[no-any-return]  # whatever it is: that is the point

    def __int__(self) -> int:
        return self._next()  # type: ignore[no-any-return]

    def __float__(self) -> float:
        return self._next()  # type: ignore[no-any-return]

    def __bool__(self) -> bool:
        return bool(self._next())


class Raising:
    """Anything but a value."""

    def _fail(self, *_: object) -> Any:
        raise Naughty

    __index__ = __int__ = __float__ = __bool__ = __len__ = __iter__ = __getitem__ = __bytes__ = (
        _fail
    )
    __le__ = __lt__ = __ge__ = __gt__ = _fail
    encode = _fail


class Liar(int):
    """An integer whose every comparison is true and whose arithmetic is nonsense."""

    def _yes(self, _: object) -> bool:
        return True

    __lt__ = __le__ = __gt__ = __ge__ = __ne__ = _yes
    __hash__ = int.__hash__

    def __floordiv__(self, _: object) -> int:
        raise Naughty

    def __index__(self) -> int:
        return 1 << 70

    __int__ = __index__


class LyingText(str):
    __slots__ = ()

    def encode(self, *_: object) -> Any:
        return None

    def __len__(self) -> int:
        return 1 << 20


class LyingBytes(bytes):
    def __len__(self) -> int:
        return 1 << 20


class Shrinking(list[object]):
    """A sequence that is shorter than it says once it is looked at."""

    def __len__(self) -> int:
        found = super().__len__()
        self.clear()
        return found


class Pretender:
    """Called as a Connection is, with numbers for pointers."""

    _ssl = _into_ssl = _from_ssl = 42


class Dying:
    """Calls the engine when it is dropped, in the middle of the call that it was given to."""

    def __init__(self, deed: Callable[[], object]) -> None:
        self.deed = deed

    def __del__(self) -> None:
        with contextlib.suppress(EngineError):
            self.deed()


NUMBERS: Final[list[object]] = [
    -1, 2, 16, 512, 4096, 65535, 65536, (1 << 31) - 1, 1 << 31, -(1 << 31), 1 << 32, 1 << 63,
    (1 << 64) - 1, 10**30, -(10**30), 10**400, 1.0, 0.25, -0.5, float("nan"), float("inf"),
    -float("inf"), 4e6, 1e300, None, "7", b"7", Fraction(1, 3), (), [1], Liar(3), Raising(),
    object(), "nan", 1j,
]  # fmt: skip
FLAGS: Final[list[object]] = [True, False, True, False, 0, 1, None, "", "no", Raising(), 2.5]
HEADS: Final[list[object]] = [
    b"", b"head", bytes(300_000), bytearray(b"x"), memoryview(b"x"), "x", None, 7, (),
    LyingBytes(b"abc"), memoryview(b"abcdef")[::2], Raising(),
]  # fmt: skip
ADDRESSES: Final[list[object]] = [
    ("127.0.0.1", 9), ("127.0.0.1", 0), ("::1", 9, 0, 0), ["127.0.0.1", 9], ("127.0.0.1", 9, 0, 0),
    (), ("127.0.0.1",), ("127.0.0.1", 9, 0), ("::1", 9, 0, 0, 0), ("::1", 9, -1, 0),
    ("::1", 9, 0, 1 << 40), ("localhost", 9), ("", 9), ("127.0.0.1\0", 9), ("\ud800", 9),
    ("127.0.0.1", 65536), ("127.0.0.1", -1), ("127.0.0.1", "9"), ("127.0.0.1", 9.5),
    ("127.0.0.1", None), (None, 9), (b"127.0.0.1", 9), (7, 9), "ab", "abcd", b"ab", 5, None,
    {"a": 1, "b": 2}, LyingText("127.0.0.1"), (LyingText("127.0.0.1"), 9), Raising(),
    ("127.0.0.1", Liar(9)), ("127.0.0.1", Raising()), ("fe80::1%lo", 9, 0, 0), "127.0.0.1" * 50,
    ("1" * 100_000, 9), ("127.0.0.1", 10**30),
]  # fmt: skip
SOCKETS: Final = (
    "tcp", "tcp-2", "tcp-3", "unix", "fresh", "udp", "udp-2", "udp-bound", "listener", "blocking",
    "seqpacket", "udp-unix", "closed", "file", "pipe", "own", "taken", "dup",
)  # fmt: skip
TOKENS: Final = ("token", "first", "newcomer", "unknown", "ended")
DEEDS: Final = ("close", "poll", "abort", "statistics", "relay")
TLS: Final = ("none", "fresh", "shared", "on-socket", "empty", "pretender", "object", "context")

STREAMS: Final = ("tcp", "tcp-2", "tcp-3", "unix")
GOOD: Final[dict[str, tuple[str, tuple[object, ...]]]] = {
    "fd": ("socket", STREAMS),
    "fd_a": ("socket", STREAMS),
    "fd_b": ("socket", STREAMS),
    "target": ("socket", ("fresh", "udp", "udp-2")),
    "gate": ("token", ("token", "first")),
    "peer": ("token", ("newcomer",)),
    "token": ("token", ("token", "first")),
    "tls": ("tls", ("none",)),
    "tls_a": ("tls", ("none",)),
    "tls_b": ("tls", ("none",)),
    "head": ("value", (b"", b"head")),
    "head_a": ("value", (b"", b"head")),
    "head_b": ("value", (b"", b"head")),
    "address": ("address", ("listening",)),
    "idle": ("value", (0.0, 0.05, 30, True)),
    "timeout": ("value", (0.0, 0.05, 30)),
    "deadline": ("value", (5.0, 5)),
    "options": ("value", (PLAIN,)),
    "datagram": ("value", (1, 8192, 65535)),
    "waiting": ("value", (1, 4, 512)),
    "raw": ("value", (False, True)),
    "gso": ("value", (False, True)),
    "threads": ("value", (1, 2)),
    "flows": ("value", (1, 4, 64)),
    "patience": ("value", (50.0, 1)),
    "side": ("value", (1, 2)),
    "quiet": ("value", (False, True)),
    "splice": ("value", (False, True)),
}
"""What each parameter is meant for. A name that is missing here fails the test: teach it."""
KINDS_OF: Final = {"udp_serve": {"fd": ("socket", ("udp-bound", "udp"))}}
"""Where a name means something else."""


@dataclass(frozen=True)
class Word:
    """One argument: a kind of thing, and which."""

    kind: str
    what: object


@dataclass(frozen=True)
class Call:
    """A method and its arguments."""

    method: str
    words: tuple[tuple[str, Word], ...]
    is_elsewhere: bool = False
    """From another thread, where the engine has threads of its own."""


def _any_word() -> st.SearchStrategy[Word]:
    fickle = st.tuples(
        st.lists(st.sampled_from([0, 1, 8192, 10**6, 1 << 40, -1, 0.0, 1e9, "x"]), min_size=1,
                 max_size=3),
        st.sampled_from([None, *DEEDS]),
    )  # fmt: skip
    return st.one_of(
        st.sampled_from(NUMBERS).map(lambda value: Word("value", value)),
        st.sampled_from(FLAGS).map(lambda value: Word("value", value)),
        st.sampled_from(HEADS).map(lambda value: Word("value", value)),
        st.sampled_from(ADDRESSES).map(lambda value: Word("value", value)),
        st.sampled_from(SOCKETS).map(lambda name: Word("socket", name)),
        st.sampled_from(TOKENS).map(lambda name: Word("token", name)),
        st.sampled_from(TLS).map(lambda name: Word("tls", name)),
        fickle.map(lambda pair: Word("fickle", (tuple(pair[0]), pair[1]))),
        st.sampled_from(DEEDS).map(lambda deed: Word("dying", deed)),
        st.tuples(st.sampled_from(SOCKETS), st.sampled_from(DEEDS)).map(
            lambda pair: Word("late socket", pair)
        ),
    )


def _word(method: str, name: str) -> st.SearchStrategy[Word]:
    kind, choice = KINDS_OF.get(method, {}).get(name) or GOOD[name]
    meant = st.sampled_from(choice).map(lambda what: Word(kind, what))
    if kind == "tls":
        likely = st.sampled_from(TLS).map(lambda what: Word(kind, what))
        return st.one_of(meant, meant, meant, meant, likely, _any_word())
    if kind == "socket":
        likely = st.sampled_from(SOCKETS).map(lambda what: Word(kind, what))
        return st.one_of(*[meant] * 6, likely, _any_word())
    if kind == "address":
        likely = st.sampled_from(ADDRESSES).map(lambda value: Word("value", value))
        return st.one_of(meant, meant, meant, likely, _any_word())
    return st.one_of(*[meant] * 7, _any_word())


@st.composite
def calls(draw: st.DrawFn, method: str) -> Call:
    """Draw a call of one method."""
    words = []
    for name, may_be_left_out in parameters(method).items():
        if may_be_left_out and draw(st.booleans()):
            continue
        words.append((name, draw(_word(method, name))))
    return Call(method, tuple(words), draw(st.integers(0, 9)) == 9)


CALLS: Final = st.sampled_from([*METHODS, *["poll"] * 2, "settle", "datagram"]).flatmap(
    lambda name: calls(name) if name in METHODS else st.just(Call(name, ()))
)


# --- the stage -----------------------------------------------------------------------------------


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
