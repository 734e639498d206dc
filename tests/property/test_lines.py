"""What is packed is parsed back; cuts make no difference; garbage is always the peer's fault."""

from __future__ import annotations

import re
from collections.abc import Callable
from unittest import mock

from hypothesis import example, given
from hypothesis import strategies as st
from tests.property.strategies import (
    answers,
    claims,
    cuts,
    edited,
    garbage,
    greetings,
    hellos,
    native_signals,
    seed_signals,
    valid_lines,
)

from nodepass.errors import PeerWireError
from nodepass.protocol import frames, lines, strangers
from nodepass.protocol.messages import (
    Dialect,
    Greeting,
    Heartbeat,
    Hello,
    LinkClaim,
    NativeSignal,
    Refuse,
    Remote,
    SeedLaunch,
    SeedSignal,
    Signal,
    Unknown,
    Welcome,
)


def line_of(packed: bytes, limit: int = lines.MAX_LINE) -> bytes:
    """Check the shape of a packed line; return it without its LF."""
    assert packed.endswith(b"\n")
    assert packed.count(b"\n") == 1
    assert packed.isascii()
    assert len(packed) <= limit
    return packed[:-1]


NEVER = re.compile(rb"(?!)")


@given(greetings)
def test_greeting_round_trip(greeting: Greeting) -> None:
    line = line_of(lines.pack_greeting(greeting), lines.MAX_GREETING)
    assert lines.parse_greeting(line) == greeting


@given(hellos)
def test_hello_round_trip(hello: Hello) -> None:
    assert lines.parse_opening(line_of(lines.pack_hello(hello))) == hello


@given(claims)
def test_link_claim_round_trip(claim: LinkClaim) -> None:
    assert lines.parse_opening(line_of(lines.pack_link_claim(claim))) == claim


@given(st.data(), greetings | claims, st.integers(0, 3))
def test_what_is_read_at_a_glance_is_read_the_same(
    data: st.DataObject, value: Greeting | LinkClaim, times: int
) -> None:
    is_greeting = isinstance(value, Greeting)
    line = lines.pack_greeting(value) if is_greeting else lines.pack_link_claim(value)  # type: ignore[arg-type]
    line = line[:-1]
    if times:
        line = data.draw(edited(line, times))
    parse = lines.parse_greeting if is_greeting else lines.parse_opening

    def said() -> object:
        try:
            return parse(line)
        except PeerWireError as exc:
            return str(exc)

    glance = said()
    with mock.patch.object(lines, "_GREETING", NEVER), mock.patch.object(lines, "_CLAIM", NEVER):
        assert said() == glance


@given(answers)
def test_answer_round_trip(answer: Welcome | Refuse) -> None:
    assert lines.parse_answer(line_of(lines.pack_answer(answer))) == answer


@given(native_signals)
def test_native_signal_round_trip(signal: NativeSignal) -> None:
    assert lines.parse_signal(line_of(lines.pack_signal(signal)), Dialect.NATIVE) == signal


@given(seed_signals)
def test_seed_signal_round_trip(signal: SeedSignal) -> None:
    assert lines.parse_signal(line_of(lines.pack_signal(signal)), Dialect.SEED) == signal


@given(seed_signals | native_signals, st.sampled_from(Dialect))
def test_each_dialect_passes_over_the_other(
    signal: NativeSignal | SeedSignal, dialect: Dialect
) -> None:
    """A peer that changed its mind does harm in no case; at most it is told off."""
    line = line_of(lines.pack_signal(signal))
    try:
        parsed = lines.parse_signal(line, dialect)
    except PeerWireError:
        assert dialect is Dialect.NATIVE
        return
    assert parsed in (signal, Unknown(line)) or line.startswith((b"tcp:", b"udp:"))


# ------------------------------------------------------------------------------- cuts


@given(st.data(), st.lists(st.binary(max_size=40)), st.binary(max_size=10), st.integers(1, 64))
def test_lines_of_any_cut(
    data: st.DataObject, lines: list[bytes], tail: bytes, limit: int
) -> None:
    """All at once = byte by byte = random cuts, also where a line is too long."""
    stream = b"".join(line + b"\n" for line in lines) + tail
    whole = told_of([stream], limit)
    assert told_of([bytes([byte]) for byte in stream], limit) == whole
    assert told_of(data.draw(cuts(stream)), limit) == whole


def told_of(pieces: list[bytes], limit: int) -> tuple[list[bytes], bool, bytes]:
    """Return the lines, whether one was too long, and the rest."""
    buffer = lines.LineBuffer(limit)
    found = []
    is_broken = False
    for piece in pieces:
        buffer.feed(piece)
        try:
            while (line := buffer.next_line()) is not None:
                assert not is_broken, "a broken buffer says nothing more"
                assert len(line) < limit
                found.append(line)
        except PeerWireError:
            assert not is_broken, "it complains once"
            is_broken = True
    return found, is_broken, buffer.rest()


@given(st.data(), st.lists(st.binary(max_size=300)))
def test_frames_of_any_cut(data: st.DataObject, datagrams: list[bytes]) -> None:
    """F25: no datagram is merged, split or cut."""
    stream = b"".join(frames.pack_frame(datagram) for datagram in datagrams)
    for pieces in (data.draw(cuts(stream)), [bytes([byte]) for byte in stream]):
        buffer = frames.FrameBuffer()
        found = []
        for piece in pieces:
            found += buffer.feed(piece)
        assert found == datagrams
        assert not buffer.has_rest


@given(st.data(), st.lists(st.binary(max_size=20), min_size=1))
def test_frames_that_stop_short_have_a_rest(data: st.DataObject, datagrams: list[bytes]) -> None:
    stream = b"".join(frames.pack_frame(datagram) for datagram in datagrams)
    stop = data.draw(st.integers(0, len(stream) - 1))
    buffer = frames.FrameBuffer()
    found = buffer.feed(stream[:stop])
    assert found == datagrams[: len(found)]
    used = sum(len(datagram) + 2 for datagram in found)
    assert buffer.has_rest is (used < stop)


# ---------------------------------------------------------------------------- garbage


@given(garbage | valid_lines)
@example(b"")
@example(b"//1?v=2&n=" + b"\xb2" * 32 + b"#0")
@example("ping://٣".encode())
@example(b"hello://%ed%a0%80?v=2&n=" + b"0" * 32)
@example(b"link://0123456789abcdef?i=" + b"9" * 5000)
def test_garbage_is_the_peers_fault(line: bytes) -> None:
    for parse in (lines.parse_greeting, lines.parse_opening, lines.parse_answer, parse_native):
        assert fault_of(parse, line).isprintable(), "it goes into a log line"
    assert isinstance(lines.parse_signal(line, Dialect.SEED), Signal), "what is unknown is, too"
    assert strangers.identify(line).isprintable()


def parse_native(line: bytes) -> object:
    return lines.parse_signal(line, Dialect.NATIVE)


def fault_of(parse: Callable[[bytes], object], line: bytes) -> str:
    """Return what a parser complains of; "" = nothing."""
    try:
        parse(line)
    except PeerWireError as exc:
        return str(exc)
    return ""


@given(greetings.map(lines.pack_greeting).flatmap(edited))
def test_a_greeting_that_is_understood_can_be_said(line: bytes) -> None:
    """Parse, pack, parse: nothing was read into the line that is not in it."""
    try:
        greeting = lines.parse_greeting(line.partition(b"\n")[0])
    except PeerWireError:
        return
    assert lines.parse_greeting(lines.pack_greeting(greeting)[:-1]) == greeting


@given(seed_signals.map(lines.pack_signal).flatmap(edited))
def test_a_seed_signal_that_is_understood_can_be_said(line: bytes) -> None:
    signal = lines.parse_signal(line.partition(b"\n")[0], Dialect.SEED)
    if isinstance(signal, Heartbeat | SeedLaunch | Remote):
        assert lines.parse_signal(lines.pack_signal(signal)[:-1], Dialect.SEED) == signal
    else:
        assert isinstance(signal, Unknown)


@given(st.binary(max_size=400))
def test_frames_of_garbage(data: bytes) -> None:
    """Any bytes are frames; none is invented and none is lost."""
    buffer = frames.FrameBuffer()
    found = buffer.feed(data)
    assert b"".join(frames.pack_frame(datagram) for datagram in found) == data[: framed(found)]
    assert buffer.has_rest is (framed(found) < len(data))


def framed(datagrams: list[bytes]) -> int:
    return sum(len(datagram) + 2 for datagram in datagrams)
