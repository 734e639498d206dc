"""Many handshakes and TLS flows of every kind of end leave neither memory nor descriptors."""

import asyncio
import contextlib
import random
import ssl

from tests.isolated.scripts.stage import KIND, descriptors, play
from tests.kit.engine_rig import Rig, resident_bytes
from tests.kit.tls_rig import SHAPES, TlsEnd, cut, join, our_end

ROUND = 30
ROUNDS = 30


async def flow(rig: Rig, dice: random.Random) -> None:
    one = join(rig, dice.choice(SHAPES), head_a=bytes(dice.randint(0, 5000)))
    await one.visitor.say(bytes(dice.randint(1, 30_000)))
    end = dice.randint(0, 4)
    if end == 0:
        rig.engine.abort(one.token)
    elif end == 1:
        cut(one.visitor)
    elif end == 2:
        await one.visitor.end()
        await one.target.hear_all()
        await one.target.end()
        await one.visitor.hear_all()
    elif end == 3:
        await rig.send(one.tls_end().sock, b"\x17\x03\x03\x00\x20" + bytes(32))
    one.visitor.sock.close()
    one.target.sock.close()
    await rig.ended(one.token)


async def handshake(rig: Rig, dice: random.Random) -> None:
    is_server = dice.random() < 0.5
    outer, inner = rig.ends()
    end = TlsEnd(rig, outer, is_server=not is_server)
    token = rig.engine.handshake(inner.fileno(), our_end(is_server))
    how = dice.randint(0, 3)
    if how == 0:
        rig.engine.abort(token)
    elif how == 1:
        await rig.send(outer, b"garbage, and much of it")
    elif how == 2:
        with contextlib.suppress(ssl.SSLError):
            await end.shake()
    outer.close()
    await rig.ended(token)
    inner.close()


async def script() -> None:
    dice = random.Random(3)
    async with Rig(KIND) as rig:
        warm = 0
        for number in range(ROUNDS):
            await asyncio.gather(*(flow(rig, dice) for _ in range(ROUND)))
            await asyncio.gather(*(handshake(rig, dice) for _ in range(ROUND)))
            if number == ROUNDS // 3:
                warm = resident_bytes()
        statistics = rig.engine.statistics()
        assert (statistics.flows_total, statistics.handshakes) == (ROUND * ROUNDS,) * 2
        assert (statistics.flows_open, statistics.tls_in_use) == (0, 0)
        # One Connection costs 50 KiB and more: a leak of each would be 60 MB.
        assert resident_bytes() - warm < 12 << 20
    assert len(descriptors()) < 20


play(script())
