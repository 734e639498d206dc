"""Everything one test sets up, taken down in order whatever happens.

`async with Arena(…) as arena:` starts targets, proxies and nodepass processes; at the end
each process that still runs must stop cleanly on SIGTERM. When the test fails, all logs are
printed.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Final, NamedTuple, Self

from .process import Nodepass
from .proxy import Proxy
from .stream import CHUNK
from .target import Handler, Target
from .timing import free_port

QUICK: Final = {"SHUTDOWN_TIMEOUT": "2s", "SERVICE_COOLDOWN": "500ms", "MIN_POOL_CAPACITY": "4"}
"""Environment of most tests: short pauses, few idle links."""


class Tunnel(NamedTuple):
    """A server and a client that have found each other."""

    server: Nodepass
    client: Nodepass
    port: int
    """Where visitors go."""
    tunnel_port: int
    """Where the client dials, seen from the server."""


class Arena:
    """Owner of a test's processes, targets and proxies."""

    def __init__(self, folder: Path, engine: str = "", **env: str) -> None:
        self._folder = folder
        self._env = {**QUICK, **({"NODEPASS_ENGINE": engine} if engine else {}), **env}
        self._processes: list[Nodepass] = []
        self._services: list[Target | Proxy] = []

    def target(self, handler: Handler, *, host: str = "127.0.0.1", port: int = 0) -> Target:
        """Serve a handler."""
        target = Target(handler, host=host, port=port)
        self._services.append(target)
        return target

    def proxy(self, upstream: int, *, delay: float = 0.0, piece: int = CHUNK) -> Proxy:
        """Put a proxy before a port."""
        proxy = Proxy(upstream, delay=delay, piece=piece)
        self._services.append(proxy)
        return proxy

    def nodepass(self, *urls: str, **env: str) -> Nodepass:
        """Prepare a process; the test starts it."""
        process = Nodepass(*urls, env={**self._env, **env}, folder=self._folder)
        self._processes.append(process)
        return process

    async def server(
        self, target_port: int, tunnel_port: int, query: str = "", **env: str
    ) -> Nodepass:
        """Start a server; its visitors go to target_port."""
        process = self.nodepass(
            f"server://127.0.0.1:{tunnel_port}/127.0.0.1:{target_port}{query}", **env
        )
        await process.start()
        return process

    async def client(
        self, tunnel_port: int, target_port: int, query: str = "", **env: str
    ) -> Nodepass:
        """Start a client, and wait until it has found its server."""
        process = self.nodepass(
            f"client://127.0.0.1:{tunnel_port}/127.0.0.1:{target_port}{query}", **env
        )
        await process.start()
        return process

    async def tunnel(
        self,
        target: Target | int,
        *,
        server: str = "",
        client: str = "",
        env: Mapping[str, str] | None = None,
    ) -> Tunnel:
        """Start a pair in front of a target; `server` and `client` are their query strings."""
        port, tunnel_port = free_port(), free_port()
        far = target if isinstance(target, int) else target.port
        settings = dict(env or {})
        listening = self.nodepass(
            f"server://127.0.0.1:{tunnel_port}/127.0.0.1:{port}{server}", **settings
        )
        dialling = self.nodepass(
            f"client://127.0.0.1:{tunnel_port}/127.0.0.1:{far}{client}", **settings
        )
        listening.spawn()  # interpreters start side by side; the client retries until it is there
        dialling.spawn()
        await listening.ready()
        await dialling.ready()
        return Tunnel(listening, dialling, port, tunnel_port)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            if error is None:
                for process in reversed(self._processes):  # clients were started last
                    if process.is_running:
                        await process.stop()
                    elif process.was_started:
                        process.check()
        except BaseException:
            self._print_logs()
            raise
        else:
            if error is not None:
                self._print_logs()
        finally:
            for process in self._processes:
                if process.is_running:
                    process.kill()
            for service in self._services:
                await service.close()

    def _print_logs(self) -> None:
        for process in self._processes:
            print(f"--- {' '.join(process.urls)}")
            print(process.log[-20000:])
