"""An engine that is dropped with TLS flows and handshakes open harms nobody."""

import asyncio
import gc
import warnings

from tests.isolated.scripts.stage import KIND, descriptors, play, pour_secured
from tests.kit.engine_rig import Rig
from tests.kit.tls_rig import SHAPES, join, our_end


async def script() -> None:
    join_once = Rig(KIND)  # whatever OpenSSL opens, it opens now
    join(join_once, "ab")
    for sock in join_once.socks:
        sock.close()
    join_once.engine.close()
    del join_once
    before = descriptors()
    for _ in range(10):
        rig = Rig(KIND)
        threads = [thread for shape in SHAPES for thread in pour_secured(join(rig, shape))]
        lent = []
        for step in range(4):
            _, inner = rig.ends()
            lent.append(inner)
            rig.engine.handshake(inner.fileno(), our_end(step % 2 == 0))
        await asyncio.sleep(0.02)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            del rig.engine
            gc.collect()
        assert any(issubclass(warning.category, ResourceWarning) for warning in caught)
        for thread in threads:
            thread.join()
        for sock in rig.socks + lent:
            assert sock.fileno() >= 0
            sock.close()
    for _ in range(500):
        if descriptors() == before:
            return
        await asyncio.sleep(0.01)
    raise AssertionError("descriptors stayed")


play(script())
