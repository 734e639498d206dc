"""A tunnel: a service on one machine, used from another, through firewalls and NAT.

async with Server("server://:10101/:8080") as server:
    print(server.statistics())
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from .errors import (
    AuthError,
    ConfigError,
    DialError,
    EngineClosed,
    EngineError,
    ListenError,
    LocalWireError,
    NodePassError,
    PeerWireError,
    PoolClosed,
    PoolError,
    PoolTimeout,
    TlsError,
    TunnelError,
    WireError,
)

if TYPE_CHECKING:
    from .client.client import Client
    from .server.server import Server

    __version__: str

__all__ = [
    "AuthError",
    "Client",
    "ConfigError",
    "DialError",
    "EngineClosed",
    "EngineError",
    "ListenError",
    "LocalWireError",
    "NodePassError",
    "PeerWireError",
    "PoolClosed",
    "PoolError",
    "PoolTimeout",
    "Server",
    "TlsError",
    "TunnelError",
    "WireError",
    "__version__",
]


def __getattr__(name: str) -> object:
    # Loaded when asked for: `nodepass --help` must not pay for asyncio and the engine.
    if name == "__version__":
        from importlib.metadata import version

        return version("nodepass")
    if name == "Server":
        from .server.server import Server

        return Server
    if name == "Client":
        from .client.client import Client

        return Client
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
