"""Proofs against fixed vectors, worked out from docs/protocol.md with another library."""

from __future__ import annotations

import itertools

import pytest

from nodepass.errors import LocalWireError
from nodepass.protocol import proof

KEY = bytes(range(32))
GREETING = b"//0?v=2&n=000102030405060708090a0b0c0d0e0f&a=1#0"
BINDING = b"\xbb" * 32
HELLO = b"hello://web?v=2&n=101112131415161718191a1b1c1d1e1f"
SESSION = "0123456789abcdef"
SCRIPT = proof.transcript(GREETING, b"", HELLO)


@pytest.mark.parametrize(
    ("parts", "joined"),
    [
        ((), b""),
        ((b"",), b"\0\0"),
        ((b"", b""), b"\0\0\0\0"),
        ((b"ab", b"c"), b"\0\2ab\0\1c"),
        ((b"a", b"bc"), b"\0\1a\0\2bc"),
        ((b"x" * 65535,), b"\xff\xff" + b"x" * 65535),
    ],
)
def test_length_prefixed(parts: tuple[bytes, ...], joined: bytes) -> None:
    assert proof.length_prefixed(*parts) == joined


def test_length_prefixed_refuses_what_no_length_can_say() -> None:
    with pytest.raises(LocalWireError, match="65535"):
        proof.length_prefixed(b"", b"x" * 65536)


def test_transcript() -> None:
    assert proof.length_prefixed(GREETING, b"", HELLO) == SCRIPT
    assert proof.transcript(GREETING, BINDING, HELLO + b"&p=" + b"ab" * 32) == (
        proof.length_prefixed(GREETING, BINDING, HELLO)
    )


def test_stretch_password() -> None:
    """Takes a tenth of a second: that is what it is for."""
    wanted = "d005b99cd5a8e6cd53cfccc5ad7272ef9c4ea7e79f1d88da367863ac1dbc82ef"
    assert proof.stretch_password("gänsefüßchen").hex() == wanted


def test_password_is_stretched_once_per_process() -> None:
    """Each tunnel of a process asks for it, and 32 MiB for 0.1 s are not to be spent twice."""
    proof.stretch_password.cache_clear()
    first = proof.stretch_password("one of several tunnels")
    assert proof.stretch_password("one of several tunnels") is first
    assert proof.stretch_password.cache_info().misses == 1


def test_stretched_passwords_differ_as_their_letters_do() -> None:
    made = {proof.stretch_password(word) for word in ("secret", "Secret", "secret ", "\udcff")}
    assert len(made) == 4
    assert {len(key) for key in made} == {32}


@pytest.mark.parametrize(
    ("made", "wanted"),
    [
        (
            proof.client_proof(KEY, SCRIPT),
            "0d1c41731729a0d5d6ee1fc17593809bd660395f23212d2f528f61c6f0789b7c",
        ),
        (
            proof.server_proof(KEY, SCRIPT, SESSION),
            "91f78853cb63622e3ee0f5cc22de6fe6c533d4b93cd3c266e56a77951554689b",
        ),
        (
            proof.session_key(KEY, SCRIPT, SESSION),
            "a0f80c978fdbb6a79be18364634b1317f153284b04df8aa1d9d8d63552f6e2f3",
        ),
        (
            proof.LinkKey(KEY, SESSION).proof(GREETING, BINDING, 7),
            "63a99ecc9c8ccd09d15c4c202b6d12d30d3bd902f14e912e89fcdddd0ce3b1a1",
        ),
    ],
    ids=["client", "server", "session key", "link"],
)
def test_vector(made: bytes, wanted: str) -> None:
    assert made.hex() == wanted


def test_whatever_changes_changes_the_link_proof() -> None:
    """Moving a byte from one part to the next is a change, too."""
    proofs = [
        proof.LinkKey(KEY, SESSION).proof(GREETING, BINDING, 7),
        proof.LinkKey(KEY[::-1], SESSION).proof(GREETING, BINDING, 7),
        proof.LinkKey(KEY, SESSION).proof(GREETING[:-1] + b"1", BINDING, 7),
        proof.LinkKey(KEY, SESSION).proof(GREETING, b"", 7),
        proof.LinkKey(KEY, SESSION).proof(GREETING + BINDING[:1], BINDING[1:], 7),
        proof.LinkKey(KEY, SESSION[:-1] + "0").proof(GREETING, BINDING, 7),
        proof.LinkKey(KEY, SESSION).proof(GREETING, BINDING, 8),
        proof.LinkKey(KEY, SESSION[:-1]).proof(GREETING, BINDING, int(SESSION[-1], 16) * 10 + 7),
        proof.client_proof(KEY, SCRIPT),
        proof.server_proof(KEY, SCRIPT, SESSION),
        proof.session_key(KEY, SCRIPT, SESSION),
    ]
    for left, right in itertools.combinations(proofs, 2):
        assert not proof.is_same_proof(left, right)


def test_is_same_proof() -> None:
    assert proof.is_same_proof(KEY, bytes(range(32)))
    assert not proof.is_same_proof(KEY, KEY[:-1])
    assert not proof.is_same_proof(KEY, b"")
