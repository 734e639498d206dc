"""Everything one test sets up, taken down in order whatever happens.

`async with Arena(…) as arena:` starts targets, proxies and nodepass processes; at the end
each process that still runs must stop cleanly on SIGTERM. When the test fails, all logs are
printed.
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Final, NamedTuple, Self, Unpack

from .authority import Issued
from .middle import MiddleMan, Tricks
from .process import Nodepass
from .proxy import Proxy
from .secure import LibrarySide, library_server, secure
from .stream import CHUNK, Stream
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


async def _greet(files: Issued, stream: Stream) -> None:
    await stream.write(f"//0?v=2&n={secrets.token_hex(16)}&a=0#2\n".encode())
    await secure(stream, LibrarySide(library_server(files), is_server=True))


def _at(password: str) -> str:
    return f"{password}@" if password else ""


class Arena:
    """Owner of a test's processes, targets and proxies."""

    def __init__(self, folder: Path, engine: str = "", **env: str) -> None:
        self._folder = folder
        self._env = {**QUICK, **({"NODEPASS_ENGINE": engine} if engine else {}), **env}
        self._processes: list[Nodepass] = []
        self._services: list[Target | Proxy | MiddleMan] = []

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

    def middle_man(self, upstream: int, **tricks: Unpack[Tricks]) -> MiddleMan:
        """Put a middle man before a tunnel port."""
        man = MiddleMan(upstream, **tricks)
        self._services.append(man)
        return man

    def tls_greeter(self, files: Issued) -> Target:
        """Serve a greeting of mode 2 and a certificate that our own server would not show."""
        return self.target(partial(_greet, files))

    def nodepass(self, *urls: str, **env: str) -> Nodepass:
        """Prepare a process; the test starts it."""
        process = Nodepass(*urls, env={**self._env, **env}, folder=self._folder)
        self._processes.append(process)
        return process

    async def server(
        self,
        target_port: int,
        tunnel_port: int,
        query: str = "",
        *,
        password: str = "",
        **env: str,
    ) -> Nodepass:
        """Start a server; its visitors go to target_port."""
        process = self.nodepass(
            f"server://{_at(password)}127.0.0.1:{tunnel_port}/127.0.0.1:{target_port}{query}",
            **env,
        )
        await process.start()
        return process

    def dialling(
        self,
        tunnel_port: int,
        target_port: int,
        query: str = "",
        *,
        password: str = "",
        **env: str,
    ) -> Nodepass:
        """Start a client that may never find its server."""
        process = self.nodepass(
            f"client://{_at(password)}127.0.0.1:{tunnel_port}/127.0.0.1:{target_port}{query}",
            **env,
        )
        process.spawn()
        return process

    async def client(
        self,
        tunnel_port: int,
        target_port: int,
        query: str = "",
        *,
        password: str = "",
        **env: str,
    ) -> Nodepass:
        """Start a client, and wait until it has found its server."""
        process = self.dialling(tunnel_port, target_port, query, password=password, **env)
        await process.ready()
        return process

    async def tunnel(
        self,
        target: Target | int,
        *,
        server: str = "",
        client: str = "",
        password: str = "",
        env: Mapping[str, str] | None = None,
    ) -> Tunnel:
        """Start a pair in front of a target; `server` and `client` are their query strings."""
        port, tunnel_port = free_port(), free_port()
        far = target if isinstance(target, int) else target.port
        settings = dict(env or {})
        listening = self.nodepass(
            f"server://{_at(password)}127.0.0.1:{tunnel_port}/127.0.0.1:{port}{server}",
            **settings,
        )
        listening.spawn()  # interpreters start side by side; the client retries until it is there
        dialling = self.dialling(tunnel_port, far, client, password=password, **settings)
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
