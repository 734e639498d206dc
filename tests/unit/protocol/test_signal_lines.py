"""Signals, UDP frames, and what a stranger looks like, in tables."""

from __future__ import annotations

from typing import Any, cast

import pytest

from nodepass.errors import LocalWireError, PeerWireError
from nodepass.protocol import frames, lines, strangers
from nodepass.protocol.messages import (
    MAX_NUMBER,
    Bye,
    Dialect,
    Drain,
    Fail,
    Failure,
    Heartbeat,
    Idle,
    Kind,
    Launch,
    NativeSignal,
    Ping,
    Pong,
    Remote,
    SeedLaunch,
    SeedSignal,
    Signal,
    Unknown,
)

BIG = MAX_NUMBER - 1

# --- signals -------------------------------------------------------------------------------------


NATIVE_SIGNALS: list[tuple[NativeSignal, str]] = [
    (Launch(Kind.TCP, 1), "tcp://1"),
    (Launch(Kind.TCP, BIG, "[2001:db8::1]:443"), f"tcp://{BIG}?from=[2001:db8::1]:443"),
    (Launch(Kind.UDP, 0, "192.0.2.1:53"), "udp://0?from=192.0.2.1:53"),
    *((Fail(7, why), f"fail://7?why={why}") for why in Failure),
    (Idle(0), "idle://0"),
    (Ping(BIG), f"ping://{BIG}"),
    (Pong(1), "pong://1"),
    (Drain(), "drain://"),
    (Bye("stopped"), "bye://stopped"),
    (Bye("z"), "bye://z"),
    (Bye("a-z" + "m" * 29), "bye://a-z" + "m" * 29),
    (Launch(Kind.TCP, 1, "x" * 1010), "tcp://1?from=" + "x" * 1010),  # MAX_LINE with its LF
]


SEED_SIGNALS: list[tuple[SeedSignal, str]] = [
    (Heartbeat(), ""),
    (SeedLaunch("aaaa0001", Kind.TCP), "//aaaa0001#1"),
    (SeedLaunch("0a9a2651", Kind.UDP), "//0a9a2651#2"),
    (Remote(1), "remote://1"),
    (Remote(65535), "remote://65535"),
]


@pytest.mark.parametrize(("signal", "line"), [*NATIVE_SIGNALS, *SEED_SIGNALS])
def test_pack_signal(signal: NativeSignal | SeedSignal, line: str) -> None:
    assert lines.pack_signal(signal) == line.encode() + b"\n"


@pytest.mark.parametrize(("signal", "line"), NATIVE_SIGNALS)
def test_parse_native_signal(signal: NativeSignal, line: str) -> None:
    assert lines.parse_signal(line.encode(), Dialect.NATIVE) == signal


@pytest.mark.parametrize(("signal", "line"), SEED_SIGNALS)
def test_parse_seed_signal(signal: SeedSignal, line: str) -> None:
    assert lines.parse_signal(line.encode(), Dialect.SEED) == signal


@pytest.mark.parametrize(
    "signal",
    [
        Launch(Kind.TCP, -1),
        Launch(Kind.TCP, MAX_NUMBER),
        Launch(Kind.TCP, 1, "x" * 1011),
        Launch(Kind.TCP, 1, "a\nb"),
        Launch(Kind.TCP, 1, "käse"),
        Launch(Kind.TCP, 1, "a&from=b"),
        Fail(-1, "refused"),
        Fail(1, ""),
        Fail(1, "Refused"),
        Idle(-1),
        Ping(-1),
        Pong(MAX_NUMBER),
        Bye(""),
        Bye("with blanks"),
        SeedLaunch("AAAA0001", Kind.TCP),
        SeedLaunch("aaaa000", Kind.TCP),
        Remote(0),
        Remote(65536),
    ],
)
def test_pack_signal_refuses(signal: NativeSignal | SeedSignal) -> None:
    with pytest.raises(LocalWireError):
        lines.pack_signal(signal)


def test_pack_signal_refuses_what_is_none() -> None:
    with pytest.raises(LocalWireError, match="no such signal"):
        lines.pack_signal(cast(Any, Unknown(b"later://1")))


@pytest.mark.parametrize(
    ("line", "signal"),
    [
        (b"tcp://1?from=", Launch(Kind.TCP, 1)),
        (b"tcp://1?later=1&from=x", Launch(Kind.TCP, 1, "x")),
        (b"fail://1", Fail(1, "unknown")),
        (b"fail://1?why=some-later-word", Fail(1, "some-later-word")),
        (b"idle://16?later=1", Idle(16)),
        (b"drain://now?or=never", Drain()),
        (b"bye://replaced?by=x", Bye("replaced")),
        (b"later://1", Unknown(b"later://1")),
        (b"TCP://1", Unknown(b"TCP://1")),
        (b"//aaaa0001#1", Unknown(b"//aaaa0001#1")),  # seed, said to a native peer
        (b"", Unknown(b"")),
        (b"ping:/1", Unknown(b"ping:/1")),
        (b"drain", Unknown(b"drain")),
        (b"\xff\x00", Unknown(b"\xff\x00")),
    ],
)
def test_parse_native_signal_is_tolerant(line: bytes, signal: Signal) -> None:
    assert lines.parse_signal(line, Dialect.NATIVE) == signal


@pytest.mark.parametrize(
    "line",
    [
        "tcp://",
        "tcp://x",
        "tcp://-1",
        "tcp:// 1",
        "tcp://1\r",
        "tcp://1\x00",
        f"tcp://{MAX_NUMBER}",
        f"tcp://{'0' * 17}",
        "tcp://1?from=a&from=b",
        "udp://",
        "fail://",
        "fail://1?why=",
        "fail://1?why=Refused",
        "fail://1?why=a&why=b",
        "idle://",
        "idle://-1",
        "ping://",
        "pong://1.0",
        "bye://",
        "bye://with blanks",
        f"bye://{'x' * 33}",
    ],
)
def test_parse_native_signal_refuses(line: str) -> None:
    with pytest.raises(PeerWireError):
        lines.parse_signal(line.encode(), Dialect.NATIVE)


@pytest.mark.parametrize(
    ("line", "signal"),
    [
        (b" \t\r", Heartbeat()),
        (b"//aaaa0001#1\r", SeedLaunch("aaaa0001", Kind.TCP)),
        (b"//aaaa0001?later=1#2", SeedLaunch("aaaa0001", Kind.UDP)),
        (b"tcp://aaaa0001", SeedLaunch("aaaa0001", Kind.TCP)),
        (b"udp://aaaa0001", SeedLaunch("aaaa0001", Kind.UDP)),
        (b"tcp://aaaa0001#2", SeedLaunch("aaaa0001", Kind.TCP)),
        (b"remote://9102?v=2#0", Remote(9102)),
    ],
)
def test_parse_seed_signal_is_tolerant(line: bytes, signal: Signal) -> None:
    assert lines.parse_signal(line, Dialect.SEED) == signal


@pytest.mark.parametrize(
    "line",
    [
        b"ping://1",
        b"ping://aaaa0001#1",
        b"//aaaa0001",
        b"//aaaa0001#",
        b"//aaaa0001#0",
        b"//aaaa0001#3",
        b"//aaaa0001#11",
        b"//AAAA0001#1",
        b"//aaaa001#1",
        b"//aaaa00011#1",
        b"//#1",
        b"aaaa0001#1",
        b"tcp://1",
        b"remote://",
        b"remote://0",
        b"remote://65536",
        b"remote://x",
        "remote://１".encode(),
        b"remote://111111",
        b"remote://009102",
        b"//aaaa\xff001#1",
        b"\xff",
        b"\x00",
    ],
)
def test_parse_seed_signal_passes_over(line: bytes) -> None:
    """The Go program ignores what it does not know, so we never call it an error."""
    assert lines.parse_signal(line, Dialect.SEED) == Unknown(line)


@pytest.mark.parametrize("text", ["", "aaaa000", "aaaa00011", "AAAA0001", "aaaa000g", "aaaa000\n"])
def test_is_no_seed_id(text: str) -> None:
    assert not lines.is_seed_id(text)


# --- identify ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("start", "name"),
    [
        (b"", "is this the tunnel port"),
        (b"\x16\x03\x01\x02", "a TLS program"),
        (b"\x15\x03\x03", "a TLS program"),
        (b"HTTP/1.1 200 OK", "an HTTP server"),
        (b"GET / HTTP/1.1\r\nAuthorization: Bearer x", "NodePass 1.13 or later"),
        (b"POST", "an HTTP client"),
        (b"CONNECT a:1 HTTP/1.1", "an HTTP client"),
        (b"GETTING", "no release we know (it wrote 'GETTING')"),
        (b"SSH-2.0-x", "an SSH server"),
        (b"np://x", "NodePass 1.6 to 1.12"),
        (b"//+Zm9v", "NodePass 1.2.2 to 1.5"),
        (b"//-", "NodePass 1.2.2 to 1.5"),
        (b"//#1", "NodePass 1.1.1 to 1.2.1"),
        (b"[PASSPORT]", "NodePass 1.0.0"),
        (b"[]", "NodePass 1.0.0"),
        (b"\x00\x1b[2J\xff'x", '(it wrote "..[2J.\'x")'),
        (b"y" * 100, "(it wrote '" + "y" * 32 + "')"),
    ],
)
def test_identify(start: bytes, name: str) -> None:
    told = strangers.identify(start)
    assert name in told
    assert told.isprintable(), "it goes into a log line"


# --- UDP frames ----------------------------------------------------------------------------------


DATAGRAMS = [b"", b"x", b"\0\0", b"\xff" * 1500, b"m" * frames.MAX_DATAGRAM, b""]


def test_frames_all_at_once() -> None:
    buffer = frames.FrameBuffer()
    stream = b"".join(frames.pack_frame(datagram) for datagram in DATAGRAMS)
    assert buffer.feed(stream) == DATAGRAMS
    assert not buffer.has_rest


@pytest.mark.parametrize("cut", [1, 2, 3, 1499, 65536])
def test_frames_in_pieces(cut: int) -> None:
    buffer = frames.FrameBuffer()
    stream = b"".join(
        frames.pack_frame(datagram) for datagram in DATAGRAMS if len(datagram) < 2000
    )
    stream += frames.pack_frame(b"end")
    found = []
    for start in range(0, len(stream), cut):
        found += buffer.feed(stream[start : start + cut])
    assert found == [*(datagram for datagram in DATAGRAMS if len(datagram) < 2000), b"end"]
    assert not buffer.has_rest


def test_frames_know_when_they_are_cut_short() -> None:
    buffer = frames.FrameBuffer()
    for piece in (b"\x00", b"\x03", b"ab"):
        assert buffer.feed(piece) == []
        assert buffer.has_rest
    assert buffer.feed(b"c") == [b"abc"]
    assert not buffer.has_rest


def test_pack_frame_refuses_what_no_length_can_say() -> None:
    assert frames.pack_frame(b"ab") == b"\x00\x02ab"
    with pytest.raises(LocalWireError, match="over 65535 bytes"):
        frames.pack_frame(b"x" * 65536)
