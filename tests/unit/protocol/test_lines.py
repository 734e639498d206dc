"""Every line of the protocol, in tables: what we write, what we read, what we refuse."""

from __future__ import annotations

from typing import Any, cast

import pytest

from nodepass.errors import LocalWireError, PeerWireError
from nodepass.protocol import lines
from nodepass.protocol.messages import (
    MAX_NAME,
    MAX_NUMBER,
    Bye,
    Dialect,
    Drain,
    Fail,
    Failure,
    Greeting,
    Heartbeat,
    Hello,
    Idle,
    Kind,
    Launch,
    LinkClaim,
    NativeSignal,
    Ping,
    Pong,
    Refusal,
    Refuse,
    Remote,
    SeedLaunch,
    SeedSignal,
    Signal,
    Unknown,
    Welcome,
)

NONCE = bytes(range(16))
N = NONCE.hex()
KEY = bytes(range(32))
K = KEY.hex()
SESSION = "0123456789abcdef"
BIG = MAX_NUMBER - 1

# -------------------------------------------------------------------------- LineBuffer


def lines_of(buffer: lines.LineBuffer) -> list[bytes]:
    lines = []
    while (line := buffer.next_line()) is not None:
        lines.append(line)
    return lines


def test_lines_come_out_whole_and_in_order() -> None:
    buffer = lines.LineBuffer()
    assert buffer.next_line() is None
    buffer.feed(b"a\n\nbc\nd")
    assert lines_of(buffer) == [b"a", b"", b"bc"]
    buffer.feed(b"e\n")
    assert lines_of(buffer) == [b"de"]


def test_lines_byte_by_byte() -> None:
    buffer = lines.LineBuffer(8)
    found = []
    for byte in b"1234567\n\n89\n\0\xff\n":
        buffer.feed(bytes([byte]))
        found += lines_of(buffer)
    assert found == [b"1234567", b"", b"89", b"\0\xff"]


def test_longest_line_that_fits() -> None:
    buffer = lines.LineBuffer(8)
    buffer.feed(b"1234567")
    assert buffer.next_line() is None, "the LF may still come as the eighth byte"
    buffer.feed(b"\n1234567\n")
    assert lines_of(buffer) == [b"1234567", b"1234567"]


@pytest.mark.parametrize("ending", [b"", b"\n", b"9\n", b"9" * 5000 + b"\nping://1\n"])
def test_line_too_long_ends_the_buffer(ending: bytes) -> None:
    buffer = lines.LineBuffer(8)
    buffer.feed(b"ok\n12345678" + ending)
    assert buffer.next_line() == b"ok"
    with pytest.raises(PeerWireError, match="longer than 8 bytes"):
        buffer.next_line()
    buffer.feed(b"\nping://1\n")
    assert buffer.next_line() is None, "garbage after an error cannot re-enter"
    assert buffer.rest() == b""


def test_a_dead_buffer_keeps_nothing() -> None:
    buffer = lines.LineBuffer(8)
    buffer.feed(b"x" * 9)
    with pytest.raises(PeerWireError):
        buffer.next_line()
    for _ in range(100):
        buffer.feed(b"x" * 1000)
    assert buffer.rest() == b""


def test_rest_is_what_no_line_took() -> None:
    buffer = lines.LineBuffer()
    buffer.feed(b"line\nraw\nbytes")
    assert buffer.next_line() == b"line"
    assert buffer.rest() == b"raw\nbytes"
    assert buffer.rest() == b""
    assert buffer.next_line() is None
    buffer.feed(b"again\n")
    assert lines_of(buffer) == [b"again"]


# --------------------------------------------------------------------------- greeting

GREETINGS = [
    (Greeting(4323, 0), b"//4323#0"),
    (Greeting(65535, 2), b"//65535#2"),
    (Greeting(1, 1, version=1), b"//1#1"),
    (Greeting(0, 1, NONCE, False, 2), b"//0?v=2&n=" + N.encode() + b"&a=0#1"),
    (Greeting(9102, 2, NONCE, True, 2), b"//9102?v=2&n=" + N.encode() + b"&a=1#2"),
    (Greeting(1, 0, NONCE, False, 3), b"//1?v=3&n=" + N.encode() + b"&a=0#0"),
]


@pytest.mark.parametrize(("greeting", "line"), GREETINGS)
def test_pack_greeting(greeting: Greeting, line: bytes) -> None:
    assert lines.pack_greeting(greeting) == line + b"\n"


@pytest.mark.parametrize(("greeting", "line"), GREETINGS)
def test_parse_greeting(greeting: Greeting, line: bytes) -> None:
    parsed = lines.parse_greeting(line)
    assert parsed == (
        greeting if greeting.is_native else Greeting(greeting.data_port, greeting.tls)
    )
    assert parsed.is_native is (greeting.version >= 2)


def test_longest_greeting_fits() -> None:
    assert len(lines.pack_greeting(Greeting(65535, 2, NONCE, True, BIG))) <= lines.MAX_GREETING


@pytest.mark.parametrize(
    "greeting",
    [
        Greeting(-1, 0),
        Greeting(65536, 0),
        Greeting(1, 3),
        Greeting(1, -1),
        Greeting(1, 0, b"", False, 2),
        Greeting(1, 0, NONCE + b"x", False, 2),
    ],
)
def test_pack_greeting_refuses(greeting: Greeting) -> None:
    with pytest.raises(LocalWireError, match="greeting"):
        lines.pack_greeting(greeting)


@pytest.mark.parametrize(
    ("line", "greeting"),
    [
        (b"//9102?#0", Greeting(9102, 0)),
        (b"//9102?nonce=00ff#0", Greeting(9102, 0)),
        (b"//9102?v=1#2", Greeting(9102, 2)),
        (b"//9102?v=0&n=short&a=7#2", Greeting(9102, 2)),
        (f"//0?v=2&n={N}#0".encode(), Greeting(0, 0, NONCE, False, 2)),
        (f"//0?a=1&later=&n={N}&x&v=002#0".encode(), Greeting(0, 0, NONCE, True, 2)),
    ],
    ids=str,
)
def test_parse_greeting_is_tolerant(line: bytes, greeting: Greeting) -> None:
    """Fields in any order, and fields of later releases, do no harm."""
    assert lines.parse_greeting(line) == greeting


@pytest.mark.parametrize(
    ("line", "why"),
    [
        (b"", "is this the tunnel port"),
        (b"HTTP/1.1 400 Bad Request\r", "an HTTP server"),
        (b"//", "no release we know"),
        (b"//#0", "NodePass 1.1.1 to 1.2.1"),
        (b"//4323", "no release we know"),
        (b"//4323#", "no release we know"),
        (b"//4323#3", "no release we know"),
        (b"//4323#00", "no release we know"),
        (b"//4323#0\r", "no release we know"),
        (b"//4323#0?v=2", "no release we know"),
        (b"//65536#0", "no release we know"),
        (b"//-1#0", "NodePass 1.2.2 to 1.5"),
        (b"//+1#0", "NodePass 1.2.2 to 1.5"),
        (b"//1_0#0", "no release we know"),
        (b"// 1#0", "no release we know"),
        (b"//000001#0", "no release we know"),
        (b"//1\x00#0", "no release we know"),
        ("//１#0".encode(), "not ASCII"),  # a full-width digit
        (b"//0#0", "seed greeting with data port 0"),
        (b"//0?v=1#0", "seed greeting with data port 0"),
        (b"//1?v=#0", "version"),
        (b"//1?v#0", "version"),
        (b"//1?v=-2#0", "version"),
        (b"//1?v=9007199254740992#0", "version"),
        (b"//1?v=2#0", "nonce is not 32"),
        (b"//1?v=2&n=00ff&a=0#0", "nonce"),
        (f"//1?v=2&n={N.upper()}&a=0#0".encode(), "nonce"),
        (f"//1?v=2&n={N}&a=2#0".encode(), "a is not 0 or 1"),
        (f"//1?v=2&n={N}&a=#0".encode(), "a is not 0 or 1"),
        (f"//1?v=2&n={N}&a=0&a=1#0".encode(), "'a' stands twice"),
        (f"//1?v=2&n={N}&&#0".encode(), "'' stands twice"),
    ],
    ids=str,
)
def test_parse_greeting_refuses(line: bytes, why: str) -> None:
    with pytest.raises(PeerWireError, match=why):
        lines.parse_greeting(line)


# --------------------------------------------------------------------------- openings

OPENINGS: list[tuple[Hello | LinkClaim, str]] = [
    (Hello("web", NONCE), f"hello://web?v=2&n={N}"),
    (Hello("x", NONCE), f"hello://x?v=2&n={N}"),
    (Hello("web-1.b_c", NONCE, KEY), f"hello://web-1.b_c?v=2&n={N}&p={K}"),
    (Hello("a b/c?d&e=f#g:h%i", NONCE), f"hello://a%20b%2Fc%3Fd%26e%3Df%23g%3Ah%25i?v=2&n={N}"),
    (Hello("käse", NONCE), f"hello://k%C3%A4se?v=2&n={N}"),
    (Hello("x" * MAX_NAME, NONCE, KEY, BIG), f"hello://{'x' * MAX_NAME}?v={BIG}&n={N}&p={K}"),
    (Hello("old", NONCE, version=0), f"hello://old?v=0&n={N}"),
    (LinkClaim(SESSION, 0, KEY), f"link://{SESSION}?i=0&p={K}"),
    (LinkClaim(SESSION, BIG, KEY), f"link://{SESSION}?i={BIG}&p={K}"),
]


@pytest.mark.parametrize(("opening", "line"), OPENINGS)
def test_pack_opening(opening: Hello | LinkClaim, line: str) -> None:
    if isinstance(opening, Hello):
        packed = lines.pack_hello(opening)
    else:
        packed = lines.pack_link_claim(opening)
    assert packed == line.encode() + b"\n"
    assert len(packed) <= lines.MAX_LINE


@pytest.mark.parametrize(("opening", "line"), OPENINGS)
def test_parse_opening(opening: Hello | LinkClaim, line: str) -> None:
    assert lines.parse_opening(line.encode()) == opening


@pytest.mark.parametrize(
    ("line", "bare"),
    [
        (b"hello://web?v=2&n=00&p=11", b"hello://web?v=2&n=00"),
        (b"hello://web?v=2&n=00", b"hello://web?v=2&n=00"),
        (b"hello://web?p=11&v=2&later=p=1&n=00", b"hello://web?v=2&later=p=1&n=00"),
        (b"hello://p=1&p=2%2f?v=002&&p=11&x", b"hello://p=1&p=2%2f?v=002&&x"),
        (b"hello://web?p=11", b"hello://web?"),
        (b"hello://web", b"hello://web"),
    ],
)
def test_without_proof_keeps_all_else_as_it_stood(line: bytes, bare: bytes) -> None:
    assert lines.without_proof(line) == bare


@pytest.mark.parametrize(
    "hello",
    [
        Hello("", NONCE),
        Hello("x" * (MAX_NAME + 1), NONCE),
        Hello("/" * 86, NONCE),  # 258 bytes once percent-encoded
        Hello("a\nb", NONCE),
        Hello("\udcff", NONCE),  # a byte of argv that was no UTF-8
        Hello("web", b""),
        Hello("web", NONCE[1:]),
        Hello("web", NONCE, b"short"),
    ],
)
def test_pack_hello_refuses(hello: Hello) -> None:
    with pytest.raises(LocalWireError):
        lines.pack_hello(hello)


@pytest.mark.parametrize(
    "claim",
    [
        LinkClaim("", 1, KEY),
        LinkClaim(SESSION.upper(), 1, KEY),
        LinkClaim(SESSION, -1, KEY),
        LinkClaim(SESSION, MAX_NUMBER, KEY),
        LinkClaim(SESSION, 1, KEY[1:]),
    ],
)
def test_pack_link_claim_refuses(claim: LinkClaim) -> None:
    with pytest.raises(LocalWireError):
        lines.pack_link_claim(claim)


@pytest.mark.parametrize(
    ("line", "opening"),
    [
        (f"hello://web?n={N}&later=9&v=3", Hello("web", NONCE, None, 3)),
        (f"hello://%77%65b?v=2&n={N}", Hello("web", NONCE)),
        (f"hello://%ff?v=2&n={N}", Hello("�", NONCE)),
        (f"link://{SESSION}?p={K}&i=007", LinkClaim(SESSION, 7, KEY)),
    ],
)
def test_parse_opening_is_tolerant(line: str, opening: Hello | LinkClaim) -> None:
    assert lines.parse_opening(line.encode()) == opening


@pytest.mark.parametrize(
    ("line", "why"),
    [
        ("", "is this the tunnel port"),
        ("GET / HTTP/1.1\r", "an HTTP client"),
        ("SSH-2.0-OpenSSH_9.6\r", "an SSH server"),
        ("bonjour://web?v=2", "not an opening"),
        ("HELLO://web?v=2", "not an opening"),
        ("hello:/web", "not one of our lines"),
        (f"hello://?v=2&n={N}", "name is not 1..255"),
        (f"hello://{'x' * 256}?v=2&n={N}", "name is not 1..255"),
        (f"hello://a%0Ab?v=2&n={N}", "printable"),
        (f"hello://a%00?v=2&n={N}", "printable"),
        (f"hello://a%7f?v=2&n={N}", "printable"),
        (f"hello://a\x1b[2J?v=2&n={N}", "printable"),
        (f"hello://a%C2%9B2J?v=2&n={N}", "printable"),  # CSI in one character
        (f"hello://web?n={N}", "version"),
        (f"hello://web?v=two&n={N}", "version"),
        ("hello://web?v=2", "nonce"),
        (f"hello://web?v=2&n={N}0", "nonce"),
        (f"hello://web?v=2&n={N}&p=", "proof"),
        (f"hello://web?v=2&n={N}&p={K[1:]}", "proof"),
        (f"hello://web?v=2&n={N}&p={K}&p={K}", "'p' stands twice"),
        (f"hello://web?v=2&v=2&n={N}", "'v' stands twice"),
        (f"hello://kÃ¤se?v=2&n={N}", "not ASCII"),
        (f"link://{SESSION}?i=1", "proof"),
        (f"link://{SESSION}?p={K}", "link number"),
        (f"link://{SESSION}?i=-1&p={K}", "link number"),
        (f"link://{SESSION}?i={MAX_NUMBER}&p={K}", "link number"),
        (f"link://{SESSION}?i={'9' * 900}&p={K}", "link number"),
        (f"link://{SESSION[1:]}?i=1&p={K}", "session"),
        (f"link://{SESSION.upper()}?i=1&p={K}", "session"),
        (f"link://?i=1&p={K}", "session"),
    ],
)
def test_parse_opening_refuses(line: str, why: str) -> None:
    with pytest.raises(PeerWireError, match=why):
        lines.parse_opening(line.encode())


# ---------------------------------------------------------------------------- answers

ANSWERS: list[tuple[Welcome | Refuse, str]] = [
    (Welcome(SESSION, 16, key=KEY), f"welcome://{SESSION}?k={K}&idle=16"),
    (Welcome(SESSION, 0, proof=KEY), f"welcome://{SESSION}?p={K}&idle=0"),
    (Welcome(SESSION, BIG), f"welcome://{SESSION}?idle={BIG}"),
    *((Refuse(reason), f"refuse://{reason}") for reason in Refusal),
    (Refuse("some-later-word"), "refuse://some-later-word"),
]


@pytest.mark.parametrize(("answer", "line"), ANSWERS)
def test_pack_answer(answer: Welcome | Refuse, line: str) -> None:
    assert lines.pack_answer(answer) == line.encode() + b"\n"


@pytest.mark.parametrize(("answer", "line"), ANSWERS)
def test_parse_answer(answer: Welcome | Refuse, line: str) -> None:
    assert lines.parse_answer(line.encode()) == answer


@pytest.mark.parametrize(
    "answer",
    [
        Refuse(""),
        Refuse("Auth"),
        Refuse("no way"),
        Refuse("x" * 33),
        Refuse("auth\n"),
        Welcome("session", 1),
        Welcome(SESSION, -1),
        Welcome(SESSION, MAX_NUMBER),
        Welcome(SESSION, 1, proof=b""),
        Welcome(SESSION, 1, key=KEY + b"x"),
    ],
)
def test_pack_answer_refuses(answer: Welcome | Refuse) -> None:
    with pytest.raises(LocalWireError):
        lines.pack_answer(answer)


@pytest.mark.parametrize(
    ("line", "why"),
    [
        ("", "is this the tunnel port"),
        ("\x16\x03\x01", "a TLS program"),
        ("HTTP/1.1 404 Not Found\r", "an HTTP server"),
        (f"hello://web?v=2&n={N}", "not an answer"),
        ("refuse://", "refusal"),
        ("refuse://\x1b[2J", "refusal"),
        (f"refuse://{'x' * 33}", "refusal"),
        (f"welcome://{SESSION}", "idle count"),
        (f"welcome://{SESSION}?idle=", "idle count"),
        (f"welcome://{SESSION}?idle=1e3", "idle count"),
        (f"welcome://{SESSION}?idle=1&idle=2", "'idle' stands twice"),
        (f"welcome://{SESSION}?k={K.upper()}&idle=1", "key"),
        (f"welcome://{SESSION}?p=&idle=1", "proof"),
        ("welcome://?idle=1", "session"),
        ("welcome://x?idle=1", "session"),
    ],
)
def test_parse_answer_refuses(line: str, why: str) -> None:
    with pytest.raises(PeerWireError, match=why):
        lines.parse_answer(line.encode())


# ---------------------------------------------------------------------------- signals

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


# --------------------------------------------------------------------------- identify


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
    told = lines.identify(start)
    assert name in told
    assert told.isprintable(), "it goes into a log line"


# ------------------------------------------------------------------------- UDP frames

DATAGRAMS = [b"", b"x", b"\0\0", b"\xff" * 1500, b"m" * lines.MAX_DATAGRAM, b""]


def test_frames_all_at_once() -> None:
    buffer = lines.FrameBuffer()
    stream = b"".join(lines.pack_frame(datagram) for datagram in DATAGRAMS)
    assert buffer.feed(stream) == DATAGRAMS
    assert not buffer.has_rest


@pytest.mark.parametrize("cut", [1, 2, 3, 1499, 65536])
def test_frames_in_pieces(cut: int) -> None:
    buffer = lines.FrameBuffer()
    stream = b"".join(lines.pack_frame(datagram) for datagram in DATAGRAMS if len(datagram) < 2000)
    stream += lines.pack_frame(b"end")
    found = []
    for start in range(0, len(stream), cut):
        found += buffer.feed(stream[start : start + cut])
    assert found == [*(datagram for datagram in DATAGRAMS if len(datagram) < 2000), b"end"]
    assert not buffer.has_rest


def test_frames_know_when_they_are_cut_short() -> None:
    buffer = lines.FrameBuffer()
    for piece in (b"\x00", b"\x03", b"ab"):
        assert buffer.feed(piece) == []
        assert buffer.has_rest
    assert buffer.feed(b"c") == [b"abc"]
    assert not buffer.has_rest


def test_pack_frame_refuses_what_no_length_can_say() -> None:
    assert lines.pack_frame(b"ab") == b"\x00\x02ab"
    with pytest.raises(LocalWireError, match="over 65535 bytes"):
        lines.pack_frame(b"x" * 65536)
