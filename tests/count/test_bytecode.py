"""Bytecodes that one call of each hot function costs: they count alike on any machine.

Every visitor costs a launch, a link and its claim, so each of these runs once or twice per
visitor on either side. Their times would say more about the machine than about the code. What C
does underneath (regular expressions, HMAC) is not seen; the Python of the standard library is.

A change that is meant to cost more, or that has made something cheaper, updates TABLE: a failure
names the count as it is now.
"""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from types import FrameType
from typing import Final

import pytest

from nodepass.protocol import lines
from nodepass.protocol.messages import Dialect, Greeting, Kind, Launch, LinkClaim
from nodepass.protocol.proof import LinkKey
from nodepass.protocol.session import Role, Session
from nodepass.tunnel.demand import Demand
from nodepass.tunnel.slots import Slots

HOME: Final = (3, 11)
"""CPython that TABLE was counted on; each release compiles to other bytecodes."""

MOST: Final = 1.10 if sys.version_info[:2] == HOME else 1.50
"""Share of its entry that a count may reach. On HOME nothing varies, from run to run or between
3.11.2 and 3.11.7: the tenth is what a change may cost without a word about it. 3.12 and 3.13 count
from a sixth less to a tenth more; the half leaves room for releases to come."""

LEAST: Final = 0.25
"""Share of its entry below which a count is no good news: something has not been counted."""

WARM: Final = 20
"""Calls before the ones that count: caches are filled, the interpreter has specialised."""

LOOKS: Final = 3
"""Counts of each; the last two must agree. The first finds 3.13 with its eyes still shut: code
that has run untraced reports nothing before it is entered again."""


# --- what is called ------------------------------------------------------------------------------

GREETING: Final = Greeting(10102, 0, bytes(range(16)), True, 2)
GREETING_LINE: Final = b"//10102?v=2&n=000102030405060708090a0b0c0d0e0f&a=1#0"
CLAIM: Final = LinkClaim("0123456789abcdef", 12345, bytes(range(32)))
CLAIM_LINE: Final = b"link://0123456789abcdef?i=12345&p=" + bytes(range(32)).hex().encode()
LAUNCH: Final = Launch(Kind.TCP, 12345, "192.0.2.17:40123")
LAUNCH_LINE: Final = b"tcp://12345?from=192.0.2.17:40123"
KEY: Final = LinkKey(bytes(range(32)), CLAIM.session)
PROOF: Final = bytes.fromhex("1c7a6dd90c1f31af9da046c436cdba7e90e2317b44ad23c3d1a6a160a9bfc265")
NATIVE: Final = Dialect.NATIVE

Prepare = Callable[[], Callable[[], object]]
"""Makes what is called, with a state of its own."""


def send_launch() -> Callable[[], object]:
    session = Session(Role.SERVER, NATIVE, now=0.0, interval=5.0)

    def call() -> bytes:
        session.launch(LAUNCH.kind, LAUNCH.number, LAUNCH.visitor)
        return session.data_to_send()

    return call


def receive_launch() -> Callable[[], object]:
    session = Session(Role.CLIENT, NATIVE, now=0.0, interval=5.0)
    return lambda: session.receive_data(LAUNCH_LINE + b"\n", 1.0)


def take_demand() -> Callable[[], object]:
    demand = Demand(16, 1024, 0.0)
    demand.count_waiting(1000)  # from here on nothing more is wanted, as under a steady load
    return lambda: demand.count_launch(0.1)


def take_slot() -> Callable[[], object]:
    # The hearers do nothing and say that nobody has waited.
    slots = Slots(1024, keeps_for_tcp=True, on_full=lambda: None, resume_tcp=bool, admit_udp=bool)

    def call() -> int:
        for _ in range(2):  # a place given back is offered to TCP and to UDP by turns
            slots.take()
            slots.give()
        return slots.taken

    return call


@dataclass(frozen=True)
class Entry:
    """One line of the table."""

    name: str
    count: int
    """Bytecodes of one call on HOME, those of this file left out."""
    prepare: Prepare
    result: object
    """What each call has to return: the work has been done."""


def simply(function: Callable[..., object], *arguments: object) -> Prepare:
    return lambda: partial(function, *arguments)


TABLE: Final = (
    Entry("lines.pack_greeting", 43, simply(lines.pack_greeting, GREETING), GREETING_LINE + b"\n"),
    Entry("lines.parse_greeting", 93, simply(lines.parse_greeting, GREETING_LINE), GREETING),
    Entry("lines.pack_link_claim", 116, simply(lines.pack_link_claim, CLAIM), CLAIM_LINE + b"\n"),
    Entry("lines.parse_opening", 60, simply(lines.parse_opening, CLAIM_LINE), CLAIM),
    Entry("LinkKey.proof", 171, simply(KEY.proof, GREETING_LINE, b"", CLAIM.number), PROOF),
    Entry("lines.pack_signal", 92, simply(lines.pack_signal, LAUNCH), LAUNCH_LINE + b"\n"),
    Entry("lines.parse_signal", 151, simply(lines.parse_signal, LAUNCH_LINE, NATIVE), LAUNCH),
    Entry("Session.launch, data_to_send", 173, send_launch, LAUNCH_LINE + b"\n"),
    Entry("Session.receive_data", 369, receive_launch, [LAUNCH]),
    Entry("Demand.take", 41, take_demand, False),
    Entry("Slots.take, give, twice", 213, take_slot, 0),
)


# --- how it is counted ---------------------------------------------------------------------------


def count(call: Callable[[], object]) -> int:
    """Return how many bytecodes a call executes, in all frames but those of this file."""
    executed = 0

    def hear(frame: FrameType, event: str, argument: object) -> object:
        nonlocal executed
        executed += event == "opcode"
        return hear

    def enter(frame: FrameType, event: str, argument: object) -> object:
        if frame.f_code.co_filename == __file__:
            return None
        frame.f_trace_opcodes = True
        frame.f_trace_lines = False
        return hear

    sys.settrace(enter)  # type: ignore[arg-type]
    try:
        call()
    finally:
        sys.settrace(None)
    return executed


@contextmanager
def undisturbed() -> Iterator[None]:
    """Keep the collector, whose finalizers and callbacks would be counted, out of a block."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def steady_count(call: Callable[[], object]) -> int:
    """Return the bytecodes of a call that has been made often."""
    for _ in range(WARM):
        call()
    with undisturbed():
        counts = [count(call) for _ in range(LOOKS)]
    assert counts[-1] == counts[-2], f"the same call does not cost the same: {counts}"
    return counts[-1]


def check(entry: Entry, counted: int) -> None:
    """Fail if a count is not what the table says, give or take."""
    what = (
        f"{entry.name}: {counted} bytecodes, the table says {entry.count}. "
        f"If that is meant to be, it is the table of {__file__} that has to change."
    )
    assert counted <= MOST * entry.count, what
    assert counted > LEAST * entry.count, what


@pytest.fixture(autouse=True)
def may_count() -> None:
    if sys.implementation.name != "cpython":
        pytest.skip(f"{sys.implementation.name} has bytecodes of its own")
    if sys.gettrace() is not None:
        pytest.skip("a debugger or a coverage tool traces already, and only one can")


@pytest.mark.parametrize("entry", TABLE, ids=lambda entry: entry.name)
def test_a_call_costs_what_it_did(entry: Entry) -> None:
    call = entry.prepare()
    assert call() == entry.result
    check(entry, steady_count(call))


def test_twice_the_work_is_twice_the_count_and_fails() -> None:
    entry = TABLE[0]
    call = entry.prepare()
    counted = steady_count(lambda: (call(), call()))
    assert counted == 2 * steady_count(call)
    with pytest.raises(AssertionError, match="the table says"):
        check(entry, counted)


def test_counting_nothing_fails() -> None:
    counted = steady_count(lambda: None)
    assert counted == 0
    with pytest.raises(AssertionError, match="0 bytecodes"):
        check(TABLE[0], counted)
