"""The interpreter ends while TLS flows and handshakes are in full swing; nobody closed anything.

OpenSSL has exit handlers of its own: no worker may still be inside it by then.
"""

from __future__ import annotations

import asyncio
import atexit

kept: list[Rig] = []


@atexit.register
def close_kept() -> None:
    # Registered before the engine's own net, hence run after it.
    for rig in kept:
        for sock in rig.socks:
            sock.close()


from tests.isolated.scripts.stage import KIND, play, pour_secured  # noqa: E402
from tests.kit.engine_rig import Rig  # noqa: E402
from tests.kit.tls_rig import SHAPES, join, our_end  # noqa: E402


async def script() -> None:
    rig = Rig(KIND)
    kept.append(rig)
    for shape in SHAPES * 2:
        pour_secured(join(rig, shape))
    for step in range(6):
        _, sock = rig.ends()
        rig.socks.append(sock)
        rig.engine.handshake(sock.fileno(), our_end(step % 2 == 0))
    await asyncio.sleep(0.2)
    assert rig.engine.statistics().tls_in_use == 14


play(script())
