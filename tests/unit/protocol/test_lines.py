"""Greeting, openings and answers, in tables: what we write, what we read, what we refuse."""

from __future__ import annotations

import pytest

from nodepass.errors import LocalWireError, PeerWireError
from nodepass.protocol import lines
from nodepass.protocol.messages import (
    MAX_NAME,
    MAX_NUMBER,
    Greeting,
    Hello,
    LinkClaim,
    Refusal,
    Refuse,
    Welcome,
)

BIG = MAX_NUMBER - 1

NONCE = bytes(range(16))


N = NONCE.hex()


KEY = bytes(range(32))


K = KEY.hex()


SESSION = "0123456789abcdef"


# --- LineBuffer ----------------------------------------------------------------------------------


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


# --- greeting ------------------------------------------------------------------------------------


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


# --- openings ------------------------------------------------------------------------------------


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


# --- answers -------------------------------------------------------------------------------------


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
