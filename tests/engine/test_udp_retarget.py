"""A dialled relay goes on with another socket: nothing of the visitor's is lost or doubled."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import socket
import sys
from pathlib import Path

import pytest
from tests.kit.engine_rig import PATIENCE, Kind
from tests.kit.udp_rig import UdpRig
from tests.kit.udp_words import frame, hear_frame, udp_pair, udp_socket, unix_datagrams

from nodepass.errors import EngineClosed, EngineError

every_kind = pytest.mark.parametrize("kind", ["native", "native-2", "twin"], indirect=True)
tls_or_not = pytest.mark.parametrize("is_tls", [False, True], ids=["plain", "tls"])


def refused(rig: UdpRig, token: int, fd: int) -> int:
    """Return the errno with which a new target is refused."""
    with pytest.raises(EngineError) as caught:
        rig.engine.udp_retarget(token, fd)
    return caught.value.errno or 0


def retarget(rig: UdpRig, token: int, sock: socket.socket) -> None:
    assert rig.engine.udp_retarget(token, sock.fileno()) is True
    sock.detach()


@every_kind
@tls_or_not
async def test_c1_a_relay_goes_on_with_another_target(kind: Kind, is_tls: bool) -> None:
    async with UdpRig(kind) as rig:
        first, inner = udp_pair()
        old = os.fstat(inner.fileno()).st_ino
        number = inner.fileno()
        relay = rig.dial(is_tls=is_tls, target=inner)
        await relay.near.say(frame(b"one"))
        assert await rig.mouth(first).hear() == b"one"
        far, near = udp_pair()
        other = rig.mouth(far)
        retarget(rig, relay.token, near)
        async with asyncio.timeout(PATIENCE):
            while is_open(number, old):
                await asyncio.sleep(0.001)
        await relay.near.say(frame(b"two") + frame(b"three"))
        assert await other.hear_many(2) == [b"two", b"three"]
        other.say(b"answer")
        assert await hear_frame(relay.near) == b"answer"
        counts = rig.counts(relay.token)
        assert (counts.datagrams_up, counts.datagrams_down) == (3, 1)
        rig.engine.abort(relay.token)
        await rig.over(relay.token)


def is_open(fd: int, inode: int) -> bool:
    """Tell whether a number still stands for the socket that it stood for.

    By way of /proc where there is one: a thread sanitizer takes fstat() for a use of the very
    descriptor that a thread of the engine closes meanwhile.
    """
    listed = Path(f"/proc/self/fd/{fd}")
    try:
        found = listed.stat() if listed.parent.exists() else os.fstat(fd)
    except OSError:
        return False
    return found.st_ino == inode


@every_kind
async def test_c1_sockets_may_follow_each_other_in_a_hurry(kind: Kind) -> None:
    """Those that no thread has taken yet are closed; the last one counts."""
    async with UdpRig(kind) as rig:
        relay = rig.dial()
        mouths = []
        for _ in range(50):
            far, near = udp_pair()
            mouths.append(rig.mouth(far))
            retarget(rig, relay.token, near)
        await relay.near.say(frame(b"last"))
        assert await mouths[-1].hear() == b"last"
        rig.engine.abort(relay.token)
        await rig.over(relay.token)


@every_kind
async def test_c1_the_end_may_overtake_a_new_target(kind: Kind) -> None:
    async with UdpRig(kind) as rig:
        for _ in range(30):
            relay = rig.dial()
            far, near = udp_pair()
            rig.mouth(far)
            rig.engine.abort(relay.token)
            if rig.engine.udp_retarget(relay.token, near.fileno()):
                near.detach()
            near.close()
            await rig.over(relay.token)


@every_kind
async def test_c1_what_cannot_be_taken_stays_the_callers(kind: Kind) -> None:
    async with UdpRig(kind) as rig:
        relay, raw = rig.dial(), rig.dial(raw=True)
        gate = rig.gate()
        reader, writer = os.pipe()
        with socket.socket() as tcp, udp_socket() as blocking, contextlib.ExitStack() as stack:
            tcp.setblocking(False)
            blocking.setblocking(True)
            assert refused(rig, relay.token, -1) == errno.EBADF
            assert refused(rig, relay.token, reader) == errno.ENOTSOCK
            assert refused(rig, relay.token, tcp.fileno()) == errno.EPROTOTYPE
            assert refused(rig, relay.token, blocking.fileno()) == errno.EINVAL
            far, near = (stack.enter_context(one) for one in udp_pair())
            for token in (raw.token, gate.token, 1 << 40, 0):
                assert rig.engine.udp_retarget(token, near.fileno()) is False
            far.send(b"still here")
            await asyncio.sleep(0)
            assert near.recv(100) == b"still here"
        for end in (reader, writer):
            os.close(end)
        await relay.near.say(frame(b"as before"))
        assert await relay.target.hear() == b"as before"
        for token in (relay.token, raw.token, gate.token):
            rig.engine.abort(token)
            await rig.over(token)


@every_kind
async def test_c1_after_close_nothing_is_taken(kind: Kind) -> None:
    async with UdpRig(kind) as rig:
        token = rig.dial().token
        far, near = udp_pair()
        with far, near:
            assert await rig.close() is True
            with pytest.raises(EngineClosed):
                rig.engine.udp_retarget(token, near.fileno())
            near.send(b"mine")
            assert far.recv(100) == b"mine"


@pytest.mark.skipif(sys.platform != "linux", reason="datagrams of AF_UNIX wait there")
@every_kind
async def test_c1_what_waits_for_room_leaves_by_the_new_socket(kind: Kind) -> None:
    async with UdpRig(kind) as rig:
        full, inner = unix_datagrams()
        relay = rig.dial(target=inner)
        with full:
            said = [b"%04d" % step * 100 for step in range(400)]
            await relay.near.say(b"".join(map(frame, said)))
            await rig.counted(relay.token, datagrams_up=1)
            await rig.let_pass(0.1)
            far, near = udp_pair()
            other = rig.mouth(far)
            assert rig.counts(relay.token).datagrams_up < len(said), "it is not full"
            retarget(rig, relay.token, near)
            await rig.counted(relay.token, datagrams_up=len(said))
            heard = rig.mouth(full).hear_now()
            heard += await other.hear_many(len(said) - len(heard))
        assert heard == said
        rig.engine.abort(relay.token)
        await rig.over(relay.token)
