"""Tunnels without TLS do not pay for it: OpenSSL is loaded at the first use."""

import asyncio
import errno
import sys

from tests.isolated.scripts.stage import KIND, play
from tests.kit.engine_rig import Rig

from nodepass.errors import EngineError

HEAVY = {"OpenSSL", "cryptography", "ssl"}


async def script() -> None:
    before = set(sys.modules) & HEAVY
    assert before <= {"ssl"}  # asyncio loads the interpreter's own where there is one
    async with Rig(KIND) as rig:
        flow = rig.join()
        await rig.send(flow.visitor, b"plain")
        assert await rig.receive(flow.target, 5) == b"plain"
        assert KIND.module.alpn_selector() is None or KIND.is_native
        assert set(sys.modules) & HEAVY == before
        try:
            rig.engine.handshake(flow.visitor.fileno(), object())
        except EngineError as exc:
            assert exc.errno == errno.EOPNOTSUPP
        assert KIND.module.tls_trouble() is None
        assert {"OpenSSL", "cryptography"} <= set(sys.modules)
        await asyncio.sleep(0)


play(script())
