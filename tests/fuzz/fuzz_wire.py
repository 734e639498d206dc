# Invariant: whatever a peer writes, and however the network cuts it, reading it ends in a value,
# in PeerWireError, or (handshakes only) in TunnelError; all at once = byte by byte; no signal a
# session sends in answer is malformed; and no text made of it can break out of a log line.
"""Fuzz everything that reads bytes from the network.

    python tests/fuzz/fuzz_wire.py                    60 seconds over the corpus, without tools
    python tests/fuzz/fuzz_wire.py --seconds=600
    python tests/fuzz/fuzz_wire.py tests/fuzz/corpus  with atheris installed: its own options

The first byte of an input chooses which reader gets the rest.
"""

from __future__ import annotations

import importlib
import importlib.util
import random
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final

from nodepass.errors import PeerWireError, TunnelError
from nodepass.protocol import frames, lines, strangers
from nodepass.protocol.handshake import ClientHandshake, ServerHandshake
from nodepass.protocol.messages import Dialect, Greeting, Hello, LinkClaim
from nodepass.protocol.proof import LinkKey
from nodepass.protocol.session import Lost, Role, Session

CORPUS: Final = Path(__file__).with_name("corpus")
KEY: Final = bytes(range(32))
NONCE: Final = bytes(range(16))
SESSION: Final = "0123456789abcdef"
TOKENS: Final = [b"\n", b"//", b"://", b"?", b"&", b"#", b"=", b"%0a", b"\0", b"\xff", b"9" * 17,
                 b"v=2", b"n=", b"p=", b"k=", b"i=", b"idle=", b"from=", b"why=", b"tcp://",
                 b"hello://", b"link://", b"welcome://", b"x" * 1024]  # fmt: skip
"""What a mutation may put in: the places where a reader decides something."""


def read_line(line: bytes) -> None:
    """Every parser of one line."""
    told = strangers.identify(line)
    for parse in (lines.parse_greeting, lines.parse_opening, lines.parse_answer):
        try:
            parse(line)
        except PeerWireError as exc:
            told += str(exc)
    try:
        lines.parse_signal(line, Dialect.NATIVE)
    except PeerWireError as exc:
        told += str(exc)
    lines.parse_signal(line, Dialect.SEED)
    assert told.isprintable(), told


def read_as_server(data: bytes) -> None:
    """A connection to the tunnel port, with and without a password."""
    for key in (None, KEY):
        server = ServerHandshake(Greeting(0, 0, NONCE, key is not None, 2), key)
        told = ""
        try:
            opening = server.receive(data)
            if isinstance(opening, Hello):
                server.accept(opening, session=SESSION, idle=1, fresh_key=KEY)
                assert key is None, "a guessed password"
            elif isinstance(opening, LinkClaim):
                key_of_it = LinkKey(KEY, opening.session)
                assert not server.is_link_proven(opening, key_of_it), "a guessed key"
        except (PeerWireError, TunnelError) as exc:
            told = str(exc)
        assert told.isprintable(), told


def read_as_client(data: bytes) -> None:
    """A server's greeting, and behind it the answer to our hello."""
    for key in (None, KEY):
        client = ClientHandshake(key)
        told = ""
        try:
            if client.receive_greeting(data) is None:
                continue
            rest = client.rest()
            client.hello("web", NONCE)
            client.receive_answer(rest)
        except (PeerWireError, TunnelError) as exc:
            told = str(exc)
        assert told.isprintable(), told


def read_as_session(data: bytes) -> None:
    """A control channel in each role and dialect, at once and byte by byte."""
    for role in Role:
        for dialect in Dialect:
            whole = Session(role, dialect, now=0.0, interval=5.0)
            events = whole.receive_data(data, 0.0) if data else []
            drops = Session(role, dialect, now=0.0, interval=5.0)
            dripped = [e for byte in data for e in drops.receive_data(bytes([byte]), 0.0)]
            assert events == dripped
            sent = whole.data_to_send()
            assert sent == drops.data_to_send()
            for line in sent.split(b"\n")[:-1]:
                lines.parse_signal(line, dialect)
            for event in events:
                assert not isinstance(event, Lost) or event.reason.isprintable()


def read_frames(data: bytes) -> None:
    """The UDP frames of a launched link."""
    buffer = frames.FrameBuffer()
    packed = b"".join(frames.pack_frame(datagram) for datagram in buffer.feed(data))
    assert data.startswith(packed)
    assert buffer.has_rest is (len(packed) < len(data))


READERS: Final[list[Callable[[bytes], None]]] = [
    read_line,
    read_as_server,
    read_as_client,
    read_as_session,
    read_frames,
]


def one_input(data: bytes) -> None:
    """Judge one input; raises, with the input as a note, when the invariant does not hold."""
    if not data:
        return
    try:
        READERS[data[0] % len(READERS)](data[1:])
    except Exception as exc:
        exc.add_note(f"input: {data!r}")
        raise


def corpus() -> list[bytes]:
    """Return the kept inputs, in a fixed order."""
    return [path.read_bytes() for path in sorted(CORPUS.iterdir())]


def mutations(seeds: list[bytes], seed: int) -> Iterator[bytes]:
    """Go on for ever from the corpus; the same seed gives the same inputs."""
    # Not for secrets: a failing run must be repeatable.
    rng = random.Random(seed)
    while True:
        data = bytearray(rng.choice(seeds))
        for _ in range(rng.randint(1, 4)):
            at = rng.randint(1, max(1, len(data)))
            match rng.randrange(5):
                case 0:
                    data[at:at] = rng.choice(TOKENS)
                case 1:
                    data[at : at + 1] = bytes([rng.randrange(256)])
                case 2:
                    del data[at : at + rng.randint(1, 8)]
                case 3:
                    other = rng.choice(seeds)
                    data[at:] = other[rng.randint(1, max(1, len(other))) :]
                case _:
                    data[at:at] = data[at : at + rng.randint(1, 40)]
        data[:1] = bytes([rng.randrange(len(READERS))])
        yield bytes(data[:4096])


def run(seconds: float, seed: int) -> int:
    """Judge the corpus and then mutations of it; return how many inputs there were."""
    seeds = corpus()
    for data in seeds:
        for reader in range(len(READERS)):
            one_input(bytes([reader]) + data[1:])
    count = len(seeds) * len(READERS)
    end = time.monotonic() + seconds
    for data in mutations(seeds, seed):
        if time.monotonic() > end:
            return count
        one_input(data)
        count += 1
    raise AssertionError("mutations do not end")


def main(arguments: list[str]) -> None:
    """Run under atheris if it is there, else for so many seconds without."""
    if importlib.util.find_spec("atheris") is not None:
        atheris = importlib.import_module("atheris")
        atheris.instrument_all()
        atheris.Setup([sys.argv[0], *arguments], one_input)
        atheris.Fuzz()
        return
    seconds = 60.0
    for argument in arguments:
        if argument.startswith("--seconds="):
            seconds = float(argument.partition("=")[2])
    seed = random.SystemRandom().randrange(2**32)
    print(f"{run(seconds, seed)} inputs, seed {seed}: the invariant holds")


if __name__ == "__main__":
    main(sys.argv[1:])
