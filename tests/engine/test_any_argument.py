"""Each argument of each method, one after the other, in the ways that have once gone wrong.

The stub says which there are; `tests/property/test_engine_interface.py` has them all at once.
"""

from __future__ import annotations

import asyncio
import errno
import socket
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
from tests.fuzz.engine_calls import (
    GOOD,
    KINDS_OF,
    METHODS,
    OPTIONS_OF,
    Fickle,
    Naughty,
    Pretender,
    Raising,
    Word,
    parameters,
)
from tests.fuzz.engine_stage import Stage, linger, stage
from tests.kit.engine_rig import Kind, Rig, is_open, owned
from tests.kit.options import fold
from tests.kit.tls_rig import our_end

from nodepass.errors import EngineClosed, EngineError

Engine = Callable[..., Rig]
PLACES = [(method, name) for method in METHODS for name in parameters(method)]
WITHOUT_WORDS = {"tls", "tls_a", "tls_b", "head", "head_a", "head_b", "address", "options"}
"""Parameters that are no numbers."""
NUMBERS = [place for place in PLACES if place[1] not in WITHOUT_WORDS]
ADMITS = {"relay", "dial", "handshake", "udp_serve", "udp_bind", "udp_dial"}


def good(here: Stage, method: str) -> dict[str, Any]:
    """Return arguments that are followed."""
    found = {}
    used = 0
    for name in parameters(method):
        kind, choice = KINDS_OF.get(method, {}).get(name) or GOOD[name]
        what: Any = choice[0]
        if kind == "socket" and name != "target":
            what, used = choice[used], used + 1
        elif name == "target" and method in {"udp_dial", "udp_retarget"}:
            what = "udp"
        found[name] = here.value(Word(kind, what))
    if method == "handshake":
        found["tls"] = our_end(True)
    return found


def given(method: str, arguments: dict[str, Any]) -> dict[str, Any]:
    """Return arguments as the method wants them."""
    return fold(arguments) if method in OPTIONS_OF else arguments


async def set_the_stage(here: Stage, method: str) -> None:
    """Have somebody who waits at a gate, where the method is about that."""
    if method.startswith("udp_") and method not in {"udp_serve", "udp_dial"}:
        gate = socket.socket(type=socket.SOCK_DGRAM)
        gate.bind(("127.0.0.1", 0))
        gate.setblocking(False)
        here.tokens.append(here.engine.udp_serve(gate.fileno()))
        here.ports[here.tokens[-1]] = gate.getsockname()[1]
        gate.detach()
        here._send_datagrams()
        end = time.monotonic() + 5
        while not here.newcomers:
            assert time.monotonic() < end, "no newcomer"
            await asyncio.sleep(0.002)
            here._note(here.engine.poll())


@pytest.mark.parametrize(("method", "name"), NUMBERS)
async def test_a_number_is_asked_once(kind: Kind, method: str, name: str) -> None:
    """What has been checked is what is used: the next answer may be a larger one."""
    with stage(kind) as here:
        await set_the_stage(here, method)
        arguments = good(here, method)
        fickle = arguments[name] = Fickle([arguments[name], 1 << 40])
        if method == "__init__":
            kind.module.Engine(**arguments).close()
        else:
            result = getattr(here.engine, method)(**given(method, arguments))
            if method in ADMITS:
                here.connections.append(arguments.get("tls"))
                disown(here, method, arguments)
                here.tokens.append(result)
        assert fickle.asked == 1
        await here.strike()


def disown(here: Stage, method: str, arguments: dict[str, Any]) -> None:
    for key in ("fd", "fd_a", "fd_b", "target"):
        given = arguments.get(key)
        number = given.values[0] if isinstance(given, Fickle) else given
        for name, sock in list(here.here.items()):
            if sock.fileno() == number:
                del here.here[name]
                if method == "handshake":
                    here.others.append(sock)
                else:
                    sock.detach()


@pytest.mark.parametrize(("method", "name"), PLACES)
async def test_an_argument_that_raises_leaves_nothing_behind(
    kind: Kind, method: str, name: str
) -> None:
    with stage(kind) as here:
        await set_the_stage(here, method)
        arguments = good(here, method)
        arguments[name] = Raising()
        before = here.engine.statistics().flows_open
        call = kind.module.Engine if method == "__init__" else getattr(here.engine, method)
        with pytest.raises((Naughty, TypeError, EngineError)):
            call(**given(method, arguments))
        assert here.engine.statistics().flows_open == before
        for sock in here.here.values():
            assert is_open(sock.fileno())
            assert not linger(sock)[0]
        await here.strike()


@pytest.mark.parametrize(
    ("method", "name"), [place for place in NUMBERS if place[0] not in {"__init__", "close"}]
)
async def test_an_argument_that_closes_the_engine(kind: Kind, method: str, name: str) -> None:
    """Nothing is handed to workers that have gone: the descriptors stay the caller's."""
    with stage(kind) as here:
        await set_the_stage(here, method)
        arguments = good(here, method)
        arguments[name] = Fickle([arguments[name]], here.engine.close)
        if method in {"live", "udp_counts"}:
            getattr(here.engine, method)(**given(method, arguments))
        else:
            with pytest.raises(EngineClosed):
                getattr(here.engine, method)(**given(method, arguments))
        for sock in here.here.values():
            assert is_open(sock.fileno())
        await here.strike()


async def test_peer_that_goes_while_its_arguments_are_looked_at(kind: Kind) -> None:
    with stage(kind) as here:
        await set_the_stage(here, "udp_bind")
        peer = here.newcomers[-1]

        def end_it() -> None:
            here.engine.abort(peer)
            end = time.monotonic() + 5
            while not any(report.token == peer for report in here.engine.poll()):
                assert time.monotonic() < end
                time.sleep(0.001)

        fd = Fickle([here.socket_number("tcp")], end_it)
        with pytest.raises(EngineError) as caught:
            here.engine.udp_bind(peer, fd)
        assert caught.value.errno == errno.ENOENT
        await here.strike()


async def test_numbers_are_not_taken_for_pointers(kind: Kind) -> None:
    with stage(kind) as here:
        a, b = here.socket_number("tcp"), here.socket_number("tcp-2")
        for value in (Pretender(), object(), here.tls("empty"), here.tls("on-socket"), "tls"):
            for method, words in (
                ("relay", {"fd_a": a, "fd_b": b, "tls_a": value}),
                ("handshake", {"fd": a, "tls": value}),
            ):
                with pytest.raises(EngineError) as caught:
                    getattr(here.engine, method)(**words)
                assert caught.value.errno == errno.EOPNOTSUPP
        await here.strike()


async def test_a_descriptor_is_taken_once(engine: Engine) -> None:
    async with engine() as rig:
        visitor, a = rig.ends()
        target, b = rig.ends()
        fd = a.fileno()
        token = rig.hand_over(a, b)
        _, other = rig.ends()
        with owned(other):
            with pytest.raises(EngineError) as caught:
                rig.engine.relay(other.fileno(), fd)
            assert caught.value.errno == errno.EBUSY
            assert not linger(other)[0]
        await rig.send(visitor, b"still")
        assert await rig.receive(target, 5) == b"still"
        rig.engine.abort(token)
        await rig.ended(token)
        # The number is free, and may be handed over again by whoever gets it.
        flows = [rig.join() for _ in range(4)]
        for flow in flows:
            rig.engine.abort(flow.token)
            await rig.ended(flow.token)


async def test_a_refused_call_leaves_the_callers_watch_alone(kind: Kind) -> None:
    """The loop knows who watches by the number alone."""
    with stage(kind) as here:
        here.socket_number("unix")
        sock = here.here["unix"]
        heard = asyncio.Event()
        loop = asyncio.get_running_loop()
        loop.add_reader(sock.fileno(), heard.set)
        for second in (-1, sock.fileno(), here.socket_number("file"), here.socket_number("udp")):
            with pytest.raises(EngineError):
                here.engine.relay(sock.fileno(), second)
        here.others[-1].send(b"!")
        async with asyncio.timeout(5):
            await heard.wait()
        loop.remove_reader(sock.fileno())
        await here.strike()


async def test_a_connection_is_lent_once(engine: Engine) -> None:
    """Two threads in one SSL would be the end of both."""
    async with engine() as rig:
        tls = our_end(True)
        _, a = rig.ends()
        _, b = rig.ends()
        with owned(a, b):
            token = rig.engine.handshake(a.fileno(), tls)
            with pytest.raises(EngineError) as caught:
                rig.engine.handshake(b.fileno(), tls)
            assert caught.value.errno == errno.EBUSY
            with pytest.raises(EngineError) as caught:
                rig.engine.handshake(a.fileno(), our_end(True))
            assert caught.value.errno == errno.EBUSY
            rig.engine.abort(token)
            await rig.ended(token)
            token = rig.engine.handshake(b.fileno(), tls)
            rig.engine.abort(token)
            await rig.ended(token)


async def test_connection_of_an_engine_that_was_dropped_is_free_again(kind: Kind) -> None:
    tls = our_end(True)
    for _ in range(2):
        a, b = socket.socketpair()
        with owned(a, b):
            a.setblocking(False)
            opened = kind.module.Engine()
            opened.handshake(a.fileno(), tls)
            opened.close()
            if not kind.is_native:
                opened.poll()
            del opened


async def test_close_that_may_take_no_number_of_seconds(kind: Kind) -> None:
    opened = kind.module.Engine()
    for deadline in (float("nan"), "5", None, 1j):
        with pytest.raises((ValueError, TypeError)):
            opened.close(deadline)
    assert opened.fileno() >= 0
    assert opened.close(float("inf"))
    assert opened.close(-1)


async def test_close_from_many_threads(kind: Kind) -> None:
    if not kind.is_native:
        pytest.skip("the twin is called from the thread of its loop only")
    for _ in range(20):
        opened = kind.module.Engine(2)
        results: list[bool] = []
        threads = [
            threading.Thread(target=lambda: results.append(opened.close()))  # noqa: B023
            for _ in range(4)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert results == [True] * 4
