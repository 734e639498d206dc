"""hostname: IDNA 2008 behind UTS 46, and back; with names that IDNA 2003 takes for others."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import nodepass
from nodepass.config.hostname import encode, readable, tls_name

PAIRS = [
    ("straße.example", "xn--strae-oqa.example"),
    ("faß.de", "xn--fa-hia.de"),
    ("βόλος.example", "xn--nxasmm1c.example"),
    ("bücher.example", "xn--bcher-kva.example"),
    ("bücher.example.", "xn--bcher-kva.example."),
    ("例え.テスト", "xn--r8jz45g.xn--zckzah"),
    ("中文.com", "xn--fiq228c.com"),
    ("עברית.example", "xn--5dbqzzl.example"),
    ("my_host.straße.de", "my_host.xn--strae-oqa.de"),
    ("नी.example", "xn--l2b2c.example"),
]
"""Names as they are written and as they are sent; one and the same in both directions."""

MAPPED = [
    ("STRAßE.Example", "xn--strae-oqa.example"),
    ("ＢÜＣＨＥＲ．ｄｅ", "xn--bcher-kva.de"),
    ("bücher。example", "xn--bcher-kva.example"),
    ("bücher｡example", "xn--bcher-kva.example"),
    ("bu\u0308cher.example", "xn--bcher-kva.example"),
    ("bü\u00adcher.example", "xn--bcher-kva.example"),
    ("ｌｏｃａｌｈｏｓｔ", "localhost"),
    ("１２７．０．０．１", "127.0.0.1"),
    ("xn--strae-oqa.bücher", "xn--strae-oqa.xn--bcher-kva"),
]
"""Names that are written otherwise than they are shown."""

ASCII = [
    "",
    "localhost",
    "MyHost.Example",
    "my_host-1.local.",
    "_sip._tcp.example",
    "127.0.0.1",
    "fe80::1%eth0",
    "xn--strae-oqa.example",
    "XN--STRAE-OQA.example",
    "xn--i-7iq.ws",
    "xn--zzzzzz.example",
    "a" * 64,
    "a..b",
]

REFUSED = [
    "☃.net",
    "i❤.ws",
    "i❤\ufe0f.ws",
    "א1a.example",
    "٣.example",
    "a\u200cb.example",
    "a⒈com.example",
    "-ü.example",
    "ü-.example",
    "ab--ü.example",
    "\u0301ü.example",
    "ü" * 60 + ".example",
    "bü_cher.example",
    "ü\u0000.example",
    "ü\udcff.example",
    "ü." * 2000,
]


@pytest.mark.parametrize(("written", "sent"), PAIRS)
def test_c09_there_and_back(written: str, sent: str) -> None:
    assert encode(written) == sent
    assert readable(sent) == written


@pytest.mark.parametrize(("written", "sent"), MAPPED)
def test_c09_what_uts_46_maps(written: str, sent: str) -> None:
    assert encode(written) == sent


@pytest.mark.parametrize("name", ASCII)
def test_c09_ascii_stays_as_it_is(name: str) -> None:
    assert encode(name) == name


@pytest.mark.parametrize("name", REFUSED)
def test_c09_what_is_no_name(name: str) -> None:
    with pytest.raises(ValueError, match=r"."):
        encode(name)


@pytest.mark.parametrize(
    "name",
    [
        "xn--zzzzzz.example",
        "xn--i-7iq.ws",
        "xn--.example",
        "xn--" + "a" * 5000,
        "XN--STRAE-OQA.example",
        "127.0.0.1",
        "::1",
        "",
    ],
)
def test_c09_what_stands_for_nothing_is_shown_as_it_is(name: str) -> None:
    assert readable(name) == name


@given(st.text(max_size=30))
def test_c09_whatever_is_written(name: str) -> None:
    try:
        sent = encode(name)
    except ValueError:
        return
    assert sent.isascii()
    assert encode(sent) == sent
    assert encode(readable(sent)) == sent


@pytest.mark.parametrize(
    ("name", "sent"),
    [
        ("straße.example", b"xn--strae-oqa.example"),
        ("example.org.", b"example.org"),
        ("my_host.local", b"my_host.local"),
    ],
)
def test_c09_as_certificates_have_it(name: str, sent: bytes) -> None:
    assert tls_name(name) == sent


@pytest.mark.parametrize(
    "name", ["", ".", "a..b", "a" * 64, "a." * 127 + "a", "☃.net", "\u00ad", "ü" * 2000]
)
def test_c09_what_no_certificate_has(name: str) -> None:
    with pytest.raises(ValueError, match=r"."):
        tls_name(name)


def test_c09_nobody_uses_what_python_has_for_it() -> None:
    """Its codec is IDNA 2003, and `socket` uses that for whatever is not ASCII."""
    for path in Path(nodepass.__file__).parent.rglob("*.py"):
        text = path.read_text(encoding="utf-8")
        assert 'encode("idna"' not in text, path.name
        is_resolver = path.name in ("resolver.py", "hostname.py")
        assert is_resolver or not re.search(r"getaddrinfo\(|gethostbyname|import idna", text)


def test_ascii_loads_no_tables() -> None:
    script = (
        "import sys; from nodepass.config.url import Config;"
        "Config.parse('client://my_host.example:1/127.0.0.1:2', {});"
        "sys.exit(f'{sys.modules.keys()}' if 'idna' in sys.modules else 0)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=30, check=False
    )
    assert done.returncode == 0, done.stderr
