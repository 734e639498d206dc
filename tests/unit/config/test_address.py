"""address: every form of host:port, and which listeners get into each other's way."""

from __future__ import annotations

import pytest

from nodepass.config.address import Address, is_number, leads_to, overlap, parse_address
from nodepass.errors import ConfigError

GOOD = [
    ("127.0.0.1:80", Address("127.0.0.1", 80), "127.0.0.1:80"),
    ("[::1]:80", Address("::1", 80), "[::1]:80"),
    ("[2001:DB8:0::1]:65535", Address("2001:db8::1", 65535), "[2001:db8::1]:65535"),
    ("[fe80::1%eth0]:1", Address("fe80::1%eth0", 1), "[fe80::1%eth0]:1"),
    ("[fe80::1%25eth0]:1", Address("fe80::1%eth0", 1), "[fe80::1%eth0]:1"),
    (":10101", Address("", 10101), ":10101"),
    ("example.org:0443", Address("example.org", 443), "example.org:443"),
    ("my_host-1.local.:7", Address("my_host-1.local.", 7), "my_host-1.local.:7"),
    ("bücher.example:80", Address("xn--bcher-kva.example", 80), "bücher.example:80"),
    ("straße.example:80", Address("xn--strae-oqa.example", 80), "straße.example:80"),
    ("xn--strae-oqa.example:80", Address("xn--strae-oqa.example", 80), "straße.example:80"),
    ("ＦＡß．de:80", Address("xn--fa-hia.de", 80), "faß.de:80"),
    ("１２７．０．０．１:80", Address("127.0.0.1", 80), "127.0.0.1:80"),
    ("a" * 63 + ":1", Address("a" * 63, 1), "a" * 63 + ":1"),
]

BAD = [
    ("", "is missing"),
    ("host", "port is missing"),
    ("host:", "port is missing"),
    ("[::1]", "port is missing"),
    ("host:0", "port '0'"),
    ("host:65536", "port '65536'"),
    ("host:-1", "port '-1'"),
    ("host:http", "port 'http'"),
    ("host:80/x", "port '80/x'"),
    ("host:²", "port '²'"),
    ("host:" + "9" * 5000, "is not a number 1..65535"),
    ("::1:80", "brackets"),
    ("[::1:80", "bracket"),
    ("[::1]80", "bracket"),
    ("[::g]:80", "[::g] is not an IPv6 address"),
    ("[127.0.0.1]:80", "not an IPv6 address"),
    ("1.2.3:80", "not an IPv4 address"),
    ("1.2.3.256:80", "not an IPv4 address"),
    ("-host:80", "not a host name"),
    ("a..b:80", "not a host name"),
    ("ho st:80", "not a host name"),
    ("a" * 64 + ":80", "not a host name"),
    ("a." * 127 + "a:80", "not a host name"),
    ("ü" * 64 + ":80", "not a host name"),
    (".:80", "not a host name"),
    ("\u00ad:80", "not a host name"),
    ("☃.net:80", "'☃.net' is not a host name: codepoint U+2603"),
    ("℀.example:80", "not a host name"),
    ("bücher．example：80", "not a host name"),
    ("٣.٣:80", "not a host name"),
]


@pytest.mark.parametrize(("text", "address", "shown"), GOOD)
def test_reads_and_shows(text: str, address: Address, shown: str) -> None:
    assert parse_address("tunnel", text) == address
    assert str(address) == shown


@pytest.mark.parametrize(("text", "says"), BAD)
def test_refuses_and_names_the_option(text: str, says: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_address("target", text)
    assert caught.value.option == "target"
    assert says in caught.value.message
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "expected"),
    [("0", True), ("123456789", True), ("1234567890", False), ("", False), ("²", False)],
)
def test_is_number(text: str, expected: bool) -> None:
    assert is_number(text) is expected


@pytest.mark.parametrize(
    ("one", "other", "expected"),
    [
        ("127.0.0.1", "127.0.0.1", True),
        ("127.0.0.1", "127.0.0.2", False),
        ("", "127.0.0.1", True),
        ("", "::1", True),
        ("", "", True),
        ("0.0.0.0", "127.0.0.1", True),
        ("0.0.0.0", "localhost", True),
        ("0.0.0.0", "::1", False),
        ("0.0.0.0", "::", False),
        ("::", "::1", True),
        ("::", "127.0.0.1", False),
        ("localhost", "127.0.0.1", False),
        ("localhost", "localhost", True),
    ],
)
def test_overlap_is_symmetric(one: str, other: str, expected: bool) -> None:
    assert overlap(Address(one, 80), Address(other, 80)) is expected
    assert overlap(Address(other, 80), Address(one, 80)) is expected
    assert not overlap(Address(one, 80), Address(other, 81))


@pytest.mark.parametrize(
    ("dialled", "listened", "expected"),
    [
        ("127.0.0.1", "127.0.0.1", True),
        ("127.0.0.1", "", True),
        ("127.0.0.1", "0.0.0.0", True),
        ("127.0.0.1", "::", False),
        ("127.0.0.1", "localhost", True),
        ("::1", "::", True),
        ("::1", "", True),
        ("::1", "0.0.0.0", False),
        ("", "127.0.0.1", True),
        ("", "", True),
        ("localhost", "::1", True),
        ("localhost", "::", True),
        ("example.org", "example.org", True),
        ("example.org", "", False),
        ("192.0.2.1", "0.0.0.0", False),
        ("127.0.0.2", "127.0.0.1", False),
        ("localhost", "127.0.0.10", False),
    ],
)
def test_what_a_dial_is_sure_to_reach(dialled: str, listened: str, expected: bool) -> None:
    assert leads_to(Address(dialled, 80), Address(listened, 80)) is expected
    assert not leads_to(Address(dialled, 80), Address(listened, 81))
