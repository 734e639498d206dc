"""System calls of a server and a client, for each new connection and for each gigabyte.

Both are real processes, with strace attached while a load runs. How many events a turn of a loop
finds depends on the machine, and with it the calls that wait and wake; everything else is the
same from run to run, and one call more in the life of a connection shows.
"""

from __future__ import annotations

import asyncio
import importlib.util
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import pytest
from tests.count import strace
from tests.count.strace import Tally
from tests.engine.conftest import HAS_NATIVE, WHY_NOT
from tests.kit.arena import Arena, Tunnel
from tests.kit.stream import Stream, connect
from tests.kit.timing import settled

ENV: Final = {
    "NODEPASS_ENGINE": "native",
    "NODEPASS_THREADS": "1",
    "NODEPASS_SPLICE": "1",
    # As many idle links whatever the rate: none is dialled but to replace one that was taken.
    "MIN_POOL_CAPACITY": "64",
    "MAX_POOL_CAPACITY": "64",
    # No heartbeats and no reports within the test.
    "REPORT_INTERVAL": "60s",
    # Some releases of libuv hand epoll_ctl to io_uring where there is one.
    "UV_USE_IO_URING": "0",
}
QUERY: Final = "?udp=0"

CONNECTIONS: Final = 300
"""Counted ones, after a third as many that warm up."""
AT_ONCE: Final = 8
REQUEST: Final = bytes(100)
ANSWER: Final = bytes(200)

BULK: Final = 512 << 20
"""Bytes carried one way."""
CHUNK: Final = 1 << 20
"""Bytes of one write of the sender."""
GB: Final = 1 << 30

SLACK: Final = 0.5
"""Calls per connection more than the table says: half of the one that a careless line would add.
From run to run they vary by less than 0.05, on a crowded machine, too."""

LEAST: Final = 0.25
"""Share of an entry below which something has not been counted."""

AWAKE: Final = frozenset({"epoll_wait", "epoll_pwait", "epoll_pwait2", "read", "write"})
"""Calls that wait, or wake another thread, or tell why one was woken: a turn of a loop has its
own, however many events it finds. Only the total bounds them."""

PASSED_OVER: Final = frozenset({"clock_gettime", "gettimeofday", "restart_syscall"})
"""No code of ours makes them: asking for the time is a call only where the kernel has no quicker
way, and the last is brought about by strace itself."""

CEILINGS: Final = {"getpid": 3.0, "getrandom": 1.5}
"""Calls per connection of what may also be fewer: each door of the engine asks whether it is in a
forked child, and a turn may use one for many; new kernels have randomness without a call."""

OTHERS: Final = 0.5
"""Calls per connection of all that is named nowhere here, together: locks (futex), memory."""

MOST_PER_GB: Final = GB / (64 << 10)
"""Calls of any kind, on either side: 64 KiB a call, a default pipe in and out again would be twice
as many. From 3100 to 8400 were seen: the faster one side is, the smaller are its pieces."""

MOST_COPYING: Final = 400
"""Calls per GB that take bytes into the process or out of it; splice carries all but the first,
after some thirty of them."""

LEAST_SPLICES: Final = 2 * GB / (16 << 20)
"""Calls per GB, in and out, if a pipe held 16 MiB: without root none holds more than 1 MiB."""

COPYING: Final = ("recvfrom", "recvmsg", "sendto", "sendmsg", "read", "readv", "write", "writev")


@dataclass(frozen=True)
class Side:
    """What one connection costs on one side."""

    steady: dict[str, float]
    """Calls by name that do not depend on who is faster; of accept4 those that found somebody."""
    most: float
    """All calls together, those that vary included."""


TABLE: Final = {
    "server": Side(
        {
            "accept4": 2,  # the visitor, and the link that replaces his
            "close": 2,
            "epoll_ctl": 7,
            "fcntl": 2,
            "getsockname": 2,
            "getsockopt": 3,
            "ioctl": 2,
            "recvfrom": 5,
            "sendto": 3,
            "setsockopt": 4,
            "shutdown": 2,
        },
        55,  # 40 to 46 were seen
    ),
    "client": Side(
        {
            "close": 2,
            "connect": 2,  # a link and a target
            "epoll_ctl": 7,
            "fcntl": 2,
            "getsockname": 2,
            "getsockopt": 3,
            "recvfrom": 5,
            "sendto": 3,
            "setsockopt": 7,  # one of them arms the link at its birth
            "shutdown": 2,
            "socket": 2,
        },
        52,  # 42 to 44 were seen
    ),
}


# --- the load ------------------------------------------------------------------------------------


async def answer(stream: Stream) -> None:
    assert await stream.read_exactly(len(REQUEST)) == REQUEST
    await stream.write(ANSWER)


async def visit(port: int, count: int) -> None:
    """Make so many short connections, AT_ONCE of them side by side."""
    numbers = iter(range(count))

    async def visitor() -> None:
        for _ in numbers:
            async with await connect(port) as stream:
                await stream.write(REQUEST)
                assert await stream.read_all() == ANSWER

    async with asyncio.TaskGroup() as group:
        for _ in range(AT_ONCE):
            group.create_task(visitor())


async def pour(stream: Stream) -> None:
    chunk = bytes(CHUNK)
    for _ in range(BULK // CHUNK):
        await stream.write(chunk)


async def fetch(port: int) -> None:
    """Take all that the target pours."""
    room = bytearray(CHUNK)
    loop = asyncio.get_running_loop()
    taken = 0
    async with await connect(port) as stream:
        while size := await loop.sock_recv_into(stream.sock, room):
            taken += size
    assert taken == BULK


async def quiet(tunnel: Tunnel) -> None:
    """Wait until both have closed what has ended, and all idle links are there again."""
    await settled(lambda: (tunnel.server.fds(), tunnel.client.fds()), 10, "no more to be closed")


async def tallied(stack: AsyncExitStack, tunnel: Tunnel, folder: Path) -> dict[str, Tally]:
    return {
        "server": await stack.enter_async_context(Tally(tunnel.server.pid, folder)),
        "client": await stack.enter_async_context(Tally(tunnel.client.pid, folder)),
    }


# --- the tests -----------------------------------------------------------------------------------


def per(unit: float, tally: Tally) -> dict[str, float]:
    """Return calls per connection or per GB, the most frequent first, and print them."""
    found = {name: count / unit for name, count in tally.calls.most_common()}
    print(f"{sum(found.values()):10.2f}  all together")
    print(*(f"{count:10.2f}  {name}" for name, count in found.items()), sep="\n")
    return {name: count for name, count in found.items() if name not in PASSED_OVER}


def check_connections(side: str, tally: Tally, connections: int) -> None:
    """Fail if one side has made other calls than the table says."""
    table = TABLE[side]
    found = per(connections, tally)
    total = sum(found.values())
    found["accept4"] = found.get("accept4", 0.0) - tally.errors["accept4"] / connections
    where = f"If that is meant to be, it is the table of {__file__} that has to change."
    for name, count in table.steady.items():
        was = found.pop(name, 0.0)
        what = f"{side}: {was:.2f} × {name} per connection, the table says {count}. {where}"
        assert was <= count + SLACK, what
        assert was > count * LEAST, what
    for name, most in CEILINGS.items():
        was = found.pop(name, 0.0)
        assert was <= most, f"{side}: {was:.2f} × {name} per connection, at most {most}. {where}"
    others = {name: count for name, count in found.items() if name not in AWAKE}
    assert sum(others.values()) <= OTHERS, f"{side}: calls that no table names: {others}. {where}"
    what = f"{side}: {total:.1f} calls per connection, at most {table.most}. {where}"
    assert total <= table.most, what


def check_bulk(side: str, tally: Tally) -> None:
    """Fail if one side has made more calls than it may for the bytes that it has carried."""
    found = per(BULK / GB, tally)
    total = sum(found.values())
    copying = sum(found.get(name, 0.0) for name in COPYING)
    assert total <= MOST_PER_GB, f"{side}: {total:.0f} calls per GB, at most {MOST_PER_GB:.0f}"
    assert copying <= MOST_COPYING, f"{side}: {copying:.0f} copying calls, at most {MOST_COPYING}"
    assert found.get("splice", 0) >= LEAST_SPLICES, f"{side}: carries bytes we know not how"


@pytest.fixture
def can_count() -> None:
    if not HAS_NATIVE:
        pytest.skip(WHY_NOT)
    if importlib.util.find_spec("uvloop") is None:
        pytest.skip("not installed: uvloop, whose calls the table counts")
    reason = strace.why_not()
    if reason:
        pytest.skip(reason)


@pytest.mark.slow
@pytest.mark.deadline(40)
async def test_a_connection_makes_the_calls_that_it_did(can_count: None, tmp_path: Path) -> None:
    async with Arena(tmp_path, **ENV) as arena:
        tunnel = await arena.tunnel(arena.target(answer), server=QUERY, client=QUERY)
        await visit(tunnel.port, CONNECTIONS // 3)
        await quiet(tunnel)
        async with AsyncExitStack() as stack:
            tallies = await tallied(stack, tunnel, tmp_path)
            await visit(tunnel.port, CONNECTIONS)
            await quiet(tunnel)
        for side, tally in tallies.items():
            check_connections(side, tally, CONNECTIONS)


@pytest.mark.slow
@pytest.mark.deadline(40)
async def test_a_gigabyte_makes_few_calls(can_count: None, tmp_path: Path) -> None:
    async with Arena(tmp_path, **ENV) as arena:
        tunnel = await arena.tunnel(arena.target(pour), server=QUERY, client=QUERY)
        await quiet(tunnel)
        async with AsyncExitStack() as stack:
            tallies = await tallied(stack, tunnel, tmp_path)
            await fetch(tunnel.port)
        for side, tally in tallies.items():
            check_bulk(side, tally)


# --- that they can fail --------------------------------------------------------------------------


def expected(side: str) -> Tally:
    """Return a tally with exactly what the table says for CONNECTIONS."""
    tally = Tally(0, Path())
    for name, count in TABLE[side].steady.items():
        tally.calls[name] = round(count * CONNECTIONS)
    return tally


@pytest.mark.parametrize("side", TABLE)
def test_what_the_table_says_passes(side: str) -> None:
    check_connections(side, expected(side), CONNECTIONS)


@pytest.mark.parametrize(
    ("side", "call", "more"),
    [(side, call, more) for side in TABLE for call in TABLE[side].steady for more in (1, -99)]
    + [(side, "futex", 1) for side in TABLE]
    + [(side, "getpid", 4) for side in TABLE]
    + [(side, "epoll_wait", 30) for side in TABLE],
)
def test_one_call_more_or_none_at_all_fails(side: str, call: str, more: int) -> None:
    tally = expected(side)
    tally.calls[call] = max(0, tally.calls[call] + more * CONNECTIONS)
    with pytest.raises(AssertionError, match=call if call != "epoll_wait" else "at most"):
        check_connections(side, tally, CONNECTIONS)


def test_turning_people_away_is_no_accepting() -> None:
    tally = expected("server")
    tally.calls["accept4"] *= 2
    with pytest.raises(AssertionError, match="accept4"):
        check_connections("server", tally, CONNECTIONS)
    tally.errors["accept4"] = tally.calls["accept4"] // 2
    check_connections("server", tally, CONNECTIONS)


@pytest.mark.parametrize(
    ("calls", "complaint"),
    [
        ({}, "know not how"),
        ({"splice": 20_000}, "calls per GB"),
        ({"splice": 4000, "recvfrom": 150, "sendto": 150}, "copying"),
    ],
)
def test_bulk_in_small_pieces_or_copied_fails(calls: dict[str, int], complaint: str) -> None:
    tally = Tally(0, Path())
    tally.calls.update(calls)
    with pytest.raises(AssertionError, match=complaint):
        check_bulk("server", tally)


SUMMARY: Final = """\
% time     seconds  usecs/call     calls    errors syscall
------ ----------- ----------- --------- --------- ----------------
 48.96    0.090164          24      3624       412 splice
  0.54    0.001000           5       200           futex
100.00    0.184150          47      3824       412 total
"""


def test_a_summary_is_read_right() -> None:
    assert strace.parse(SUMMARY) == ({"splice": 3624, "futex": 200}, {"splice": 412})
