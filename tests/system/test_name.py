"""F15: a name that moves is followed, because it is resolved again at every dial."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from tests.kit.arena import Arena
from tests.kit.stream import exchange
from tests.kit.target import echo
from tests.kit.timing import free_port, within

if TYPE_CHECKING:
    from collections.abc import Callable

NAME = "moving.nodepass.test"
"""Under .test, which no name server may answer: RFC 6761, 6.2."""


def _private_hosts(hosts: Path) -> list[str]:
    """Make a command prefix under which hosts stands in for /etc/hosts; skip where impossible."""
    unshare = shutil.which("unshare")
    if unshare is None or not Path("/etc/hosts").exists():
        pytest.skip("needs unshare and /etc/hosts")
    prefix = [
        unshare,
        "--mount",
        *(["--map-root-user"] if os.geteuid() else []),
        "sh",
        "-c",
        'mount --bind "$0" /etc/hosts && exec "$@"',
        str(hosts),
    ]
    if subprocess.run([*prefix, "true"], capture_output=True, check=False).returncode:
        pytest.skip("may not mount over /etc/hosts, not even in a namespace of its own")
    return prefix


async def test_f15_process_follows_a_name_in_the_hosts_file(tmp_path: Path) -> None:
    hosts = tmp_path / "hosts"
    hosts.write_text(f"127.0.0.2 {NAME}\n")
    prefix = _private_hosts(hosts)
    async with Arena(tmp_path) as arena, within(30):
        target, tunnel_port = arena.target(echo), free_port()
        ports = [free_port(), free_port()]
        servers = [
            arena.nodepass(f"server://127.0.0.{number}:{tunnel_port}/127.0.0.1:{port}")
            for number, port in zip((2, 3), ports, strict=True)
        ]
        for server in servers:
            await server.start()
        client = arena.nodepass(f"client://{NAME}:{tunnel_port}/127.0.0.1:{target.port}")
        await client.start(prefix)
        assert await exchange(ports[0], b"before") == b"before"
        hosts.write_text(f"127.0.0.3 {NAME}\n")  # in place: the mount shows this very file
        servers[0].kill()
        await client.logged("tunnel up", count=2, seconds=5)
        assert await exchange(ports[1], b"after") == b"after"


@pytest.mark.loops("asyncio")  # uvloop resolves inside libuv, out of reach of a patch
async def test_f15_embedded_client_follows_tunnel_and_target(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from nodepass import Client

    where = {"tunnel": "127.0.0.2", "target": "127.0.0.2"}
    monkeypatch.setattr(socket, "getaddrinfo", _resolver(where, socket.getaddrinfo))
    async with Arena(tmp_path) as arena, within(30):
        target_port, tunnel_port = free_port(), free_port()
        arena.target(echo, host="127.0.0.2", port=target_port)
        arena.target(echo, host="127.0.0.3", port=target_port)
        ports = [free_port(), free_port()]
        servers = [
            arena.nodepass(f"server://127.0.0.{number}:{tunnel_port}/127.0.0.1:{port}")
            for number, port in zip((2, 3), ports, strict=True)
        ]
        for server in servers:
            await server.start()
        async with Client(f"client://tunnel.test:{tunnel_port}/target.test:{target_port}"):
            await servers[0].logged("client connected")
            assert await exchange(ports[0], b"before") == b"before"
            where["target"] = "127.0.0.3"
            assert await exchange(ports[0], b"moved") == b"moved"
            where["tunnel"] = "127.0.0.3"
            servers[0].kill()
            await servers[1].logged("client connected")
            assert await exchange(ports[1], b"after") == b"after"


def _resolver(where: dict[str, str], real: Callable[..., object]) -> Callable[..., object]:
    def resolve(host: str | None, port: int | str | None, *args: int, **kwargs: int) -> object:
        name, _, domain = (host or "").partition(".")
        return real(where[name] if domain == "test" else host, port, *args, **kwargs)

    return resolve
