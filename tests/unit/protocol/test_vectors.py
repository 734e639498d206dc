"""Both recorded conversations with the Go program, replayed from either side without sockets.

Byte for byte what our side must write, and what it must make of the bytes that the other side
wrote. tests/system/test_vectors.py does the same over sockets.
"""

from __future__ import annotations

import pytest
from tests.kit.recording import Row, recording, written

from nodepass.errors import PeerWireError
from nodepass.protocol import lines
from nodepass.protocol.handshake import ClientHandshake
from nodepass.protocol.messages import (
    Dialect,
    Greeting,
    Heartbeat,
    Kind,
    SeedLaunch,
    SeedSignal,
    Signal,
    Unknown,
)
from nodepass.protocol.session import Event, Role, Session

NAMES = ["seed-server", "seed-client"]
TCP, UDP = Kind.TCP, Kind.UDP

SERVER_SIGNALS: list[Signal] = [
    Heartbeat(),
    SeedLaunch("45cdc958", TCP),
    SeedLaunch("0a9a2651", UDP),
]
"""What stands behind the greeting on control in seed-server.json."""

CLIENT_SIGNALS: list[Signal] = [
    Heartbeat(),
    Unknown(b"ping://1"),
    SeedLaunch("aaaa0001", TCP),
    SeedLaunch("aaaa0002", UDP),
    SeedLaunch("deadbeef", TCP),
]
"""The same of seed-client.json; the third row is a launch of a link that nobody knows."""


def control_of(name: str) -> tuple[bytes, bytes]:
    """Return the greeting line, and all that the server wrote behind it."""
    line, lf, rest = written(recording(name), "control", "s>c").partition(b"\n")
    return line + lf, rest


@pytest.mark.parametrize("name", NAMES)
def test_recordings_are_whole(name: str) -> None:
    rows = recording(name)
    assert all(isinstance(row, Row) for row in rows)
    assert written(rows, "control", "c>s") == b"", "a seed client never writes on control"
    assert {row.direction for row in rows} <= {"s>c", "c>s", "c>t", "t>c"}


# ------------------------------------------------------------------ we are the client


def test_client_reads_the_greeting_of_the_go_server() -> None:
    """It may come with the first heartbeat in one segment, or byte by byte."""
    greeting, rest = control_of("seed-server")
    client = ClientHandshake()
    assert client.receive_greeting(greeting + rest) == Greeting(4323, 0)
    assert client.rest() == rest
    slow = ClientHandshake()
    answers = [slow.receive_greeting(bytes([byte])) for byte in greeting]
    assert answers == [None] * (len(greeting) - 1) + [Greeting(4323, 0)]


def test_client_takes_v2_at_its_word() -> None:
    """The one row that we answer otherwise than the Go client, and must.

    Whoever recorded seed-client.json wrote `?v=2&nonce=00ff` to show that the Go client does
    not look at the query. To us v=2 promises a native greeting, which this is not. Without
    the promise we read it as the Go client does.
    """
    greeting, _ = control_of("seed-client")
    assert greeting == b"//9102?v=2&nonce=00ff#0\n"
    with pytest.raises(PeerWireError, match="nonce"):
        ClientHandshake().receive_greeting(greeting)
    client = ClientHandshake()
    assert client.receive_greeting(greeting.replace(b"v=2&", b"")) == Greeting(9102, 0)


@pytest.mark.parametrize(
    ("name", "signals"), [("seed-server", SERVER_SIGNALS), ("seed-client", CLIENT_SIGNALS)]
)
def test_client_hears_what_the_server_said(name: str, signals: list[Signal]) -> None:
    _, stream = control_of(name)
    said = stream.split(b"\n")[:-1]
    assert [lines.parse_signal(line, Dialect.SEED) for line in said] == signals
    launches: list[Event] = [s for s in signals if isinstance(s, SeedLaunch)]
    for size in (1, 2, 5, len(stream)):
        session = Session(Role.CLIENT, Dialect.SEED, now=0.0, interval=1.0)
        events = []
        for start in range(0, len(stream), size):
            events += session.receive_data(stream[start : start + size], 0.3)
        assert events == launches
        assert session.tick(0.3) == []
        assert session.data_to_send() == b"", "a seed client never writes on control"


@pytest.mark.parametrize("name", NAMES)
def test_client_reads_the_link_ids(name: str) -> None:
    """Eight characters and nothing behind them, on every data link."""
    rows = recording(name)
    links = sorted({row.channel for row in rows if row.channel.startswith("data")})
    assert len(links) == 3
    for link in links:
        first = next(row for row in rows if row.channel == link)
        assert first.direction == "s>c"
        assert lines.is_seed_id(first.data.decode())


# ------------------------------------------------------------------ we are the server


def test_server_writes_the_greeting_of_the_go_server() -> None:
    greeting, _ = control_of("seed-server")
    assert lines.pack_greeting(Greeting(4323, 0)) == greeting


def test_server_greets_so_that_a_go_client_understands() -> None:
    """Our greeting differs from the recorded one in the query only, which it does not read."""
    recorded, _ = control_of("seed-client")
    ours = lines.pack_greeting(Greeting(9102, 0, bytes(16), False, 2))
    assert ours == b"//9102?v=2&n=00000000000000000000000000000000&a=0#0\n"
    assert go_reads(ours) == go_reads(recorded) == (b"9102", b"0")


def go_reads(greeting: bytes) -> tuple[bytes, bytes]:
    """Host and fragment of Go's url.Parse(strings.TrimSpace(line))."""
    rest, _, fragment = greeting.strip().partition(b"#")
    return rest.removeprefix(b"//").partition(b"?")[0], fragment


@pytest.mark.parametrize(
    ("name", "signals"), [("seed-server", SERVER_SIGNALS), ("seed-client", CLIENT_SIGNALS)]
)
def test_server_writes_what_the_go_server_wrote(name: str, signals: list[Signal]) -> None:
    _, stream = control_of(name)
    session = Session(Role.SERVER, Dialect.SEED, now=0.0, interval=1.0)
    sent = b""
    for signal in signals:
        match signal:
            case Heartbeat():
                assert session.tick(session.next_tick()) == []
            case SeedLaunch(link_id, kind):
                session.launch(kind, link_id, "192.0.2.1:80")
            case Unknown(line):
                sent += session.data_to_send() + line + b"\n"  # the recorder's own words
    assert sent + session.data_to_send() == stream


@pytest.mark.parametrize("name", NAMES)
def test_server_hears_nothing_from_a_silent_client(name: str) -> None:
    session = Session(Role.SERVER, Dialect.SEED, now=0.0, interval=1.0)
    stream = written(recording(name), "control", "c>s")
    assert stream == b""
    for second in range(60):
        assert session.tick(float(second)) == []
    assert session.is_open
    [lost] = session.receive_data(stream, 60.0)
    assert "closed" in str(lost)


@pytest.mark.parametrize("line", [b"", b"//45cdc958#1", b"//0a9a2651#2"])
def test_each_recorded_signal_packs_back(line: bytes) -> None:
    signal = lines.parse_signal(line, Dialect.SEED)
    assert isinstance(signal, SeedSignal)
    assert lines.pack_signal(signal) == line + b"\n"
