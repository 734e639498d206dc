"""acceptor: what becomes of a connection between its greeting and its first whole line."""

from __future__ import annotations

import asyncio
import gc
import logging
import time
import weakref

import pytest
from tests.kit.acceptor_desk import Street
from tests.kit.engines import both
from tests.kit.timing import until, within

from nodepass.net import descriptors, hosts, tcp
from nodepass.protocol import lines
from nodepass.protocol.messages import Hello, LinkClaim
from nodepass.server.acceptor import MAX_PENDING, MAX_PENDING_PER_SOURCE

HELLO = lines.pack_hello(Hello("somebody", b"n" * 16))
CLAIM = lines.pack_link_claim(LinkClaim("ab" * 8, 7, b"p" * 32))


def most() -> int:
    """Most callers at once on this machine."""
    return min(MAX_PENDING, descriptors.descriptor_limit() // 8)


# --- greeting and openings ---------------------------------------------------------------------


@both
async def test_greets_at_once_and_never_the_same_twice() -> None:
    async with Street(data_port=9102) as street:
        first, second = (lines.parse_greeting(street.greeting(street.come())[:-1]) for _ in "ab")
        assert (first.data_port, first.tls, first.is_native) == (9102, 0, True)
        assert first.nonce != second.nonce
        assert len(street.acceptor) == 2


@both
@pytest.mark.parametrize(("line", "kind"), [(HELLO, Hello), (CLAIM, LinkClaim)])
async def test_hands_over_who_has_said_what_it_is(
    line: bytes, kind: type[Hello | LinkClaim]
) -> None:
    async with Street() as street:
        far = street.come("::1", 5)
        far.send(line + b"behind")
        await until(lambda: street.openings, 5, "the opening")
        caller, opening = street.openings[0]
        assert isinstance(opening, kind)
        assert (caller.host, caller.port, caller.address) == ("::1", 5, "[::1]:5")
        assert caller.handshake.rest() == b"behind"
        assert len(street.acceptor) == 0
        far.send(b"more")
        await asyncio.sleep(0.01)
        assert caller.sock.recv(10) == b"more", "the acceptor reads no further"
        assert street.counters.strangers == 0


@pytest.mark.parametrize("line", [HELLO, CLAIM, b"nonsense\n", b""])
async def test_nothing_of_a_caller_waits_for_the_garbage_collector(line: bytes) -> None:
    """It would keep what TLS has allocated, which the collector does not see."""
    gc.collect()
    gc.disable()
    try:
        async with Street() as street:
            far = street.come()
            (caller,) = (weakref.ref(one.handshake) for one in street.acceptor._pending.values())
            far.send(line)
            far.close()
            await until(lambda: not len(street.acceptor), 5, "its end")
            while street.openings:
                street.openings.pop()[0].sock.close()
            await asyncio.sleep(0)
            assert caller() is None
    finally:
        gc.enable()


@both
async def test_lines_may_come_in_pieces() -> None:
    async with Street() as street:
        far = street.come()
        for piece in (HELLO[:1], HELLO[1:20], HELLO[20:-1]):
            far.send(piece)
            await asyncio.sleep(0.005)
            assert not street.openings
        far.send(HELLO[-1:])
        await until(lambda: street.openings, 5, "the opening")


@both
async def test_a_deadline_does_not_hit_who_has_passed() -> None:
    async with Street(timeout=0.03) as street:
        street.come().send(HELLO)
        await until(lambda: street.openings, 5, "the opening")
        await asyncio.sleep(0.06)
        assert street.openings[0][0].sock.fileno() >= 0
        assert street.counters.strangers == 0


# --- who is turned away ------------------------------------------------------------------------


@both
@pytest.mark.parametrize(
    "garbage",
    [b"GET / HTTP/1.1\r\n\r\n", b"\x16\x03\x01\x02\x00\n", b"hello://?v=2\n", b"x" * 5000, b"\n"],
)
async def test_garbage_is_reset_at_once(garbage: bytes) -> None:
    async with Street() as street:
        far = street.come()
        far.send(garbage)
        await until(lambda: street.is_out(far), 5, "its end")
        assert street.counters.strangers == 1
        assert len(street.acceptor) == 0
        assert not street.openings


@both
@pytest.mark.parametrize("said", [b"", b"hello://half"])
@pytest.mark.parametrize("how", ["end", "reset"])
async def test_who_leaves_is_counted(said: bytes, how: str) -> None:
    async with Street() as street:
        far = street.come()
        far.send(said)
        await asyncio.sleep(0.01)
        if how == "reset":
            tcp.reset(far)
        else:
            far.close()
        await until(lambda: not len(street.acceptor), 5, "its end")
        assert street.counters.strangers == 1


async def test_who_has_left_before_the_greeting() -> None:
    async with Street() as street:
        street.leaving()
        assert len(street.acceptor) == 0
        assert street.counters.strangers == 1


@both
@pytest.mark.parametrize(
    ("said", "data_port", "why"),
    [
        (b"", 0, "seed clients are not admitted"),
        (b"", 9102, "cannot reach the data port 9102"),
        (b"GET / HT", 0, "unfinished; an HTTP client"),
    ],
)
async def test_deadline_says_why(
    said: bytes, data_port: int, why: str, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.DEBUG, "nodepass"):
        async with Street(timeout=0.03, level="warn", data_port=data_port) as street:
            far = street.come()
            far.send(said)
            await until(lambda: street.is_out(far), 5, "its end")
            assert street.counters.strangers == 1
    assert why in caplog.text


@both
async def test_a_silent_one_delays_nobody() -> None:
    async with Street(timeout=5) as street:
        for _ in range(50):
            street.come("10.9.9.9")
        far = street.come()
        far.send(HELLO)
        async with within(1):
            while not street.openings:
                await asyncio.sleep(0)


# --- limits ------------------------------------------------------------------------------------


@both
async def test_limit_of_one_address_makes_room_at_the_cost_of_one_of_it() -> None:
    async with Street() as street:
        inside = [street.come() for _ in range(MAX_PENDING_PER_SOURCE)]
        other = street.come("10.0.0.2")
        late = street.come()
        assert sum(map(street.is_out, inside)) == 1
        assert not any(street.is_out(far) for far in [other, late])
        assert len(street.acceptor) == MAX_PENDING_PER_SOURCE + 1
        late.send(HELLO)
        await until(lambda: street.openings, 5, "a client behind a crowd of its address")
        assert not street.is_out(street.come())
        assert street.counters.strangers == 1


@both
async def test_limit_counts_only_who_has_said_nothing_yet() -> None:
    """A burst of a client's links accepted in one turn: their lines are here, only unread."""
    async with Street() as street:
        for _ in range(MAX_PENDING_PER_SOURCE):
            street.come().send(CLAIM)
        late = street.come()
        assert len(street.openings) == MAX_PENDING_PER_SOURCE
        assert not street.is_out(late)
        late.send(CLAIM)
        await until(lambda: len(street.openings) == MAX_PENDING_PER_SOURCE + 1, 5, "the last")
        assert street.counters.strangers == 0


async def test_crowd_is_swept_again_in_the_next_turn() -> None:
    async with Street() as street:
        inside = [street.come() for _ in range(MAX_PENDING_PER_SOURCE)]
        street.come()
        left = [far for far in inside if not street.is_out(far)]
        assert len(left) == len(inside) - 1
        await asyncio.sleep(0)
        left[0].send(CLAIM)
        street.come()
        assert len(street.openings) == 1, "it is heard before anybody has to go"
        assert not street.is_out(left[0])
        assert street.counters.strangers == 1


async def test_room_is_made_where_there_is_anybody() -> None:
    async with Street() as street:
        street.acceptor.make_room()
        far = street.come()
        street.acceptor.make_room()
        assert street.is_out(far)
        assert len(street.acceptor) == 0


async def test_few_descriptors_bound_the_crowd(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(descriptors, "descriptor_limit", lambda: 80)
    async with Street() as street:
        for number in range(20):
            street.come(f"10.0.{number}.1")
        assert len(street.acceptor) == 10
        assert street.counters.strangers == 10


@both
async def test_limit_of_all_makes_room_at_the_cost_of_the_crowd() -> None:
    async with Street() as street:
        crowd = [street.come("10.1.1.1") for _ in range(40)]
        others = [street.come(f"10.0.{n // 30}.1") for n in range(most() - 40)]
        newcomer = street.come("10.2.2.2")
        assert not street.is_out(newcomer)
        assert sum(map(street.is_out, crowd)) == 1, "one of those who are most"
        assert not any(street.is_out(far) for far in others)
        assert len(street.acceptor) == most()
        assert street.counters.strangers == 1


@both
async def test_limit_of_all_spares_the_addresses_of_clients() -> None:
    async with Street() as street:
        street.known.add("10.1.1.1")
        ours = [street.come("10.1.1.1") for _ in range(MAX_PENDING_PER_SOURCE)]
        strangers = [street.come(f"10.0.{n}.1") for n in range(most() - len(ours))]
        street.come("10.2.2.2")
        assert not any(street.is_out(far) for far in ours)
        assert sum(street.is_out(far) for far in strangers) == 1


@pytest.mark.parametrize(
    ("clients", "count"), [(0, 64), (1, 128), (2, 192), (3, 192)], ids=["none", "1", "2", "3"]
)
async def test_c16_clients_that_share_an_address_may_all_refill(clients: int, count: int) -> None:
    """Beyond three quarters of all places the rest is for others."""
    if most() < MAX_PENDING:
        pytest.skip("too few descriptors here")
    async with Street() as street:
        street.clients = clients
        street.known.add("10.1.1.1")
        ours = [street.come("10.1.1.1") for _ in range(count)]
        assert not any(street.is_out(far) for far in ours)
        ours.append(street.come("10.1.1.1"))
        assert sum(street.is_out(far) for far in ours) == 1


async def test_limit_of_all_where_everybody_is_known() -> None:
    async with Street() as street:
        hosts = [f"10.0.{n // 60}.1" for n in range(most())]
        street.known.update(hosts)
        inside = [street.come(host) for host in hosts]
        assert not street.is_out(street.come("10.2.2.2"))
        assert sum(street.is_out(far) for far in inside) == 1


@both
async def test_limit_goes_down_with_those_who_leave() -> None:
    async with Street(timeout=0.05) as street:
        for _ in range(MAX_PENDING_PER_SOURCE):
            street.come()
        await until(lambda: not len(street.acceptor), 5, "the deadline of all")
        assert not street.is_out(street.come())
        assert street.counters.strangers == MAX_PENDING_PER_SOURCE


# --- throttle ---------------------------------------------------------------------------------


@pytest.fixture
def long_penalty(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever has failed waits for longer than a test takes."""
    monkeypatch.setattr("nodepass.server.throttle.FIRST_DELAY", 60.0)
    monkeypatch.setattr("nodepass.server.throttle.LONGEST_DELAY", 60.0)


def fail(street: Street, source: str = "10.0.0.1") -> None:
    street.throttle.fail(source, asyncio.get_running_loop().time())


@both
async def test_hello_of_who_has_failed_waits_its_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nodepass.server.throttle.FIRST_DELAY", 0.1)
    async with Street() as street:
        fail(street)
        start = time.monotonic()
        far = street.come()
        far.send(HELLO + b"behind")
        await until(lambda: street.openings, 5, "the opening")
        assert time.monotonic() - start >= 0.1
        caller, _ = street.openings[0]
        assert caller.handshake.rest() == b"behind"
        assert (len(street.acceptor), street.counters.strangers) == (0, 0)


@both
async def test_hello_of_anybody_else_does_not_wait(long_penalty: None) -> None:
    async with Street() as street:
        fail(street)
        street.come("10.0.0.1").send(HELLO)
        street.come("10.0.0.2").send(HELLO)
        await until(lambda: street.openings, 5, "the opening")
        await asyncio.sleep(0.02)
        assert [caller.host for caller, _ in street.openings] == ["10.0.0.2"]
        assert len(street.acceptor) == 1


@both
async def test_links_do_not_wait(long_penalty: None) -> None:
    """Their proof is of 32 random bytes: there is nothing to guess."""
    async with Street() as street:
        fail(street)
        street.come().send(CLAIM)
        await until(lambda: street.openings, 5, "the opening")


@both
async def test_addresses_of_one_network_are_one_source(long_penalty: None) -> None:
    async with Street() as street:
        fail(street, hosts.source_of("2001:db8::1"))
        street.come("2001:db8::2").send(HELLO)
        street.come("2001:db8:0:1::2").send(HELLO)
        await until(lambda: street.openings, 5, "the opening")
        await asyncio.sleep(0.02)
        assert [caller.host for caller, _ in street.openings] == ["2001:db8:0:1::2"]


@both
async def test_who_waits_still_counts_and_may_have_to_go(
    long_penalty: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("nodepass.server.acceptor.MAX_PENDING_PER_SOURCE", 3)
    async with Street() as street:
        fail(street)
        waiting = [street.come() for _ in range(3)]
        for far in waiting:
            far.send(HELLO)
        await until(lambda: all(c.wait for c in street.acceptor._pending.values()), 5, "them")
        late = street.come()
        assert len(street.acceptor) == 3
        assert [street.is_out(far) for far in waiting].count(True) == 1
        assert not street.is_out(late)
        assert street.counters.strangers == 1
        assert street.openings == []


@both
async def test_guessers_do_not_always_push_out_who_waits_with_them(
    long_penalty: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A right client behind a guesser's address: as the oldest it would never get its turn."""
    monkeypatch.setattr("nodepass.server.acceptor.MAX_PENDING_PER_SOURCE", 3)
    chosen: list[int] = []

    def choose_last(count: int) -> int:
        chosen.append(count)
        return count - 1

    monkeypatch.setattr("secrets.randbelow", choose_last)
    async with Street() as street:
        fail(street)
        right = street.come()
        right.send(HELLO)
        for _ in range(12):
            street.come().send(HELLO)
            await until(lambda: all(c.wait for c in street.acceptor._pending.values()), 5, "them")
        assert not street.is_out(right)
        assert chosen == [3] * 10


@both
async def test_c24_a_silent_crowd_does_not_push_out_who_has_begun() -> None:
    """A neighbour behind the client's address who calls all the time and never says a word."""
    async with Street() as street:
        honest = [street.come() for _ in range(20)]
        for far in honest:
            far.send(HELLO[:5])
        await until(
            lambda: sum(bool(c.said) for c in street.acceptor._pending.values()) == 20, 5, ""
        )
        for _ in range(5 * MAX_PENDING_PER_SOURCE):
            street.come()
        assert not any(map(street.is_out, honest))
        for far in honest:
            far.send(HELLO[5:])
        await until(lambda: len(street.openings) == 20, 5, "all of them")


@both
async def test_c24_nor_do_those_who_begin_and_never_end() -> None:
    async with Street() as street:
        for _ in range(MAX_PENDING_PER_SOURCE - 1):
            street.come().send(b"x")
        await until(
            lambda: all(c.said for c in street.acceptor._pending.values()), 5, "their first letter"
        )
        honest = street.come()
        for _ in range(MAX_PENDING_PER_SOURCE // 2):
            street.come().send(b"x")
            await asyncio.sleep(0.001)
        assert not street.is_out(honest), "though it has not said a word yet"


@both
async def test_c24_the_oldest_is_nobodys_favourite() -> None:
    """A flood that turns a whole crowd over within a round trip leaves some of the slow."""
    async with Street() as street:
        slow = [street.come() for _ in range(MAX_PENDING_PER_SOURCE // 2)]
        for _ in range(MAX_PENDING_PER_SOURCE + 6):
            street.come()
        left = sum(not street.is_out(far) for far in slow)
        assert left > 0, (
            "each has a chance of about a half: 32 times tails is one in 4,000 million"
        )


@both
async def test_the_silent_go_before_those_who_wait(
    long_penalty: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("nodepass.server.acceptor.MAX_PENDING_PER_SOURCE", 2)
    async with Street() as street:
        fail(street)
        silent, waiting = street.come(), street.come()
        waiting.send(HELLO)
        await until(lambda: any(c.wait for c in street.acceptor._pending.values()), 5, "it")
        street.come()
        assert (street.is_out(silent), street.is_out(waiting)) == (True, False)


@both
async def test_who_waits_is_dropped_at_its_deadline(long_penalty: None) -> None:
    async with Street() as street:
        fail(street)
        far = street.come()
        far.send(HELLO)
        (caller,) = street.acceptor._pending.values()
        await until(lambda: caller.wait, 5, "its wait")
        assert len(street.acceptor._deadlines) == 1, "its time goes on"
        street.acceptor._expire(caller)
        await asyncio.sleep(0.01)
        assert street.is_out(far)
        assert caller.wait is not None
        assert caller.wait.cancelled()
        assert street.openings == []


@both
async def test_wait_ends_in_time_for_an_answer(long_penalty: None) -> None:
    """Or one wrong password would shut its whole address out where time-outs are short."""
    async with Street(timeout=0.4) as street:
        fail(street)
        street.come().send(HELLO)
        await until(lambda: street.openings, 5, "the opening")
        assert street.counters.strangers == 0


@both
async def test_who_waits_and_leaves_is_let_go(long_penalty: None) -> None:
    async with Street() as street:
        fail(street)
        far = street.come()
        far.send(HELLO)
        (caller,) = street.acceptor._pending.values()
        await until(lambda: caller.wait, 5, "its wait")
        tcp.reset(far)
        street.acceptor.close()
        assert len(street.acceptor) == 0
        await asyncio.sleep(0.01)
        assert street.openings == []


# --- seed clients ------------------------------------------------------------------------------


@both
async def test_promotes_the_newest_silent_caller_of_an_address() -> None:
    async with Street(timeout=0.05, data_port=9102) as street:
        for port, host in ((1, "10.0.0.1"), (2, "10.0.0.1"), (3, "10.0.0.2"), (4, "10.0.0.1")):
            far = street.come(host, port)
            if port == 4:
                far.send(b"hello://half")
        caller = street.acceptor.promote("10.0.0.1", 0.0)
        assert caller is not None
        assert caller.port == 2, "newest but one: the newest has begun a line of the native kind"
        assert len(street.acceptor) == 3
        assert street.acceptor.promote("10.0.0.9", 0.0) is None
        await asyncio.sleep(0.1)
        assert caller.sock.fileno() >= 0, "its deadline is over"
        assert street.counters.strangers == 3


async def test_promotes_nobody_whose_line_is_here_but_unread() -> None:
    async with Street(data_port=9102) as street:
        street.come().send(HELLO)
        assert street.acceptor.promote("10.0.0.1", 0.0) is None
        assert len(street.openings) == 1


async def test_promotes_nobody_who_came_a_moment_ago() -> None:
    async with Street(data_port=9102) as street:
        street.come(port=1)
        await asyncio.sleep(0.06)
        street.come(port=2)
        caller = street.acceptor.promote("10.0.0.1", 0.05)
        assert caller is not None
        assert caller.port == 1
        assert street.acceptor.promote("10.0.0.1", 0.05) is None


@both
async def test_close_resets_everybody() -> None:
    async with Street() as street:
        inside = [street.come() for _ in range(3)]
        street.acceptor.close()
        street.acceptor.close()
        assert len(street.acceptor) == 0
        assert all(street.is_out(far) for far in inside)
        assert street.counters.strangers == 0
