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
import contextlib
import struct
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any, Final

from hypothesis import strategies as st

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
