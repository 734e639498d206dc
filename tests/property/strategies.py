"""Everything that two peers can say, everything that they should not, and cuts of it."""

from __future__ import annotations

import itertools
from collections.abc import Callable

from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy

from nodepass.protocol import lines
from nodepass.protocol.messages import (
    KEY_SIZE,
    MAX_NUMBER,
    NONCE_SIZE,
    VERSION,
    Bye,
    Drain,
    Fail,
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
    Refuse,
    Remote,
    SeedLaunch,
    SeedSignal,
    Welcome,
)

HEX = "0123456789abcdef"

keys = st.binary(min_size=KEY_SIZE, max_size=KEY_SIZE)
nonces = st.binary(min_size=NONCE_SIZE, max_size=NONCE_SIZE)
bindings = st.just(b"") | st.binary(min_size=32, max_size=32)
"""What proofs are bound to: nothing without TLS, else 32 bytes of its exporter."""
sessions = st.text(HEX, min_size=16, max_size=16)
seed_ids = st.text(HEX, min_size=8, max_size=8)
words = st.text("abcdefghijklmnopqrstuvwxyz-", min_size=1, max_size=32)
numbers = st.one_of(
    st.integers(0, 20), st.integers(0, MAX_NUMBER - 1), st.sampled_from([0, MAX_NUMBER - 1])
)
versions = st.one_of(st.just(VERSION), st.integers(VERSION, MAX_NUMBER - 1))
names = st.text(
    st.characters(exclude_categories=("C", "Z")) | st.sampled_from(" /?&=#%:"),
    min_size=1,
    max_size=20,  # of 12 bytes each at most, once percent-encoded: 240
)
visitors = st.one_of(
    st.just(""),
    st.ip_addresses(v=4).map(lambda ip: f"{ip}:{int(ip) % 65536}"),
    st.ip_addresses(v=6).map(lambda ip: f"[{ip}]:{int(ip) % 65536}"),
)

seed_greetings = st.builds(Greeting, st.integers(1, 65535), st.integers(0, 2))
native_greetings = st.builds(
    Greeting, st.integers(0, 65535), st.integers(0, 2), nonces, st.booleans(), versions
)
greetings = seed_greetings | native_greetings
hellos = st.builds(Hello, names, nonces, st.none() | keys, versions)
claims = st.builds(LinkClaim, sessions, numbers, keys)
answers = st.one_of(
    st.builds(Welcome, sessions, numbers, st.none() | keys, st.none() | keys),
    st.builds(Refuse, words),
)
native_signals: SearchStrategy[NativeSignal] = st.one_of(
    st.builds(Launch, st.sampled_from(Kind), numbers, visitors),
    st.builds(Fail, numbers, words),
    st.builds(Idle, numbers),
    st.builds(Ping, numbers),
    st.builds(Pong, numbers),
    st.just(Drain()),
    st.builds(Bye, words),
)
seed_signals: SearchStrategy[SeedSignal] = st.one_of(
    st.just(Heartbeat()),
    st.builds(SeedLaunch, seed_ids, st.sampled_from(Kind)),
    st.builds(Remote, st.integers(1, 65535)),
)

valid_lines = st.one_of(
    greetings.map(lines.pack_greeting),
    hellos.map(lines.pack_hello),
    claims.map(lines.pack_link_claim),
    answers.map(lines.pack_answer),
    native_signals.map(lines.pack_signal),
    seed_signals.map(lines.pack_signal),
).map(lambda line: line[:-1])
"""Without LF."""


@st.composite
def edited(draw: Callable[[SearchStrategy[int]], int], data: bytes, times: int = 1) -> bytes:
    """Change, insert or delete so many bytes."""
    line = bytearray(data)
    for _ in range(times):
        at = draw(st.integers(0, max(0, len(line) - 1)))
        byte = draw(st.sampled_from(b"\n\0&=?#%0:/p\xff") | st.integers(0, 255))
        match draw(st.integers(0, 2)):
            case 0 if line:
                line[at] = byte
            case 1 if line:
                del line[at]
            case _:
                line.insert(at, byte)
    return bytes(line)


garbage = st.one_of(
    st.binary(max_size=80),
    st.text("/:#?&=0123456789abcdefghilnoprtuvw\n\0", max_size=80).map(str.encode),
    st.tuples(valid_lines, st.integers(1, 3)).flatmap(lambda pair: edited(*pair)),
    valid_lines.map(lambda line: line * 20),
    st.sampled_from(["tcp://", "//", "hello://", "welcome://", "link://", "ping://", "bye://"])
    .flatmap(lambda scheme: st.text(max_size=40).map(lambda rest: scheme + rest))
    .map(lambda text: text.encode("utf-8", "surrogatepass")),
)
"""What a stranger, a later release or a broken peer might write; with and without LF inside."""


@st.composite
def cuts(draw: Callable[[SearchStrategy[list[int]]], list[int]], data: bytes) -> list[bytes]:
    """Cut bytes into pieces anywhere; none of them is empty."""
    places = draw(st.lists(st.integers(0, len(data)), max_size=12))
    edges = sorted({0, *places, len(data)})
    return [data[a:b] for a, b in itertools.pairwise(edges)]
