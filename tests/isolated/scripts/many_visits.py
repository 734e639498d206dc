"""Dial another machine far oftener in a minute than there are local ports.

Run as root: makes two network namespaces, joined by a cable, with 120 local ports on the side that
dials, and ends each connection first, so that its port stays in TIME-WAIT. The kernel's own
defaults otherwise.
"""

from __future__ import annotations

import asyncio
import ctypes
import os
import socket
import subprocess
import sys
import threading

from nodepass.net import tcp, tcp_dial

CLONE_NEWNET = 0x40000000
VISITS = 600
HERE, THERE = "10.91.0.1", "10.91.0.2"


def run(*words: str) -> None:
    subprocess.run(words, check=True, capture_output=True)


def enter(name: str) -> None:
    fd = os.open(f"/run/netns/{name}", os.O_RDONLY)
    try:
        if ctypes.CDLL(None, use_errno=True).setns(fd, CLONE_NEWNET):
            raise OSError(ctypes.get_errno(), "setns")
    finally:
        os.close(fd)


def serve(name: str, ready: threading.Event, address: list[tuple[str, int]]) -> None:
    """Read each connection to its end, then end it, too."""
    enter(name)
    with socket.create_server((THERE, 0), backlog=64) as server:
        address.append(server.getsockname())
        ready.set()
        while True:
            far, _ = server.accept()
            with far:
                while far.recv(1000):
                    pass


async def visit(address: tuple[str, int]) -> None:
    loop = asyncio.get_running_loop()
    for number in range(VISITS):
        try:
            sock = await tcp_dial.dial(*address, 5)
        except OSError as exc:
            sys.exit(f"visit {number}: {exc}")
        with sock:
            tcp.disarm(sock)
            sock.shutdown(socket.SHUT_WR)  # this side ends first, and waits for the other
            assert await loop.sock_recv(sock, 1) == b""
    print("ok")


def main() -> None:
    here, there = (f"np-{os.getpid()}-{side}" for side in ("a", "b"))
    try:
        for name in (here, there):
            run("ip", "netns", "add", name)
        run(
            "ip",
            "link",
            "add",
            "np0",
            "netns",
            here,
            "type",
            "veth",
            "peer",
            "np1",
            "netns",
            there,
        )
        for name, device, host in ((here, "np0", HERE), (there, "np1", THERE)):
            run("ip", "-n", name, "addr", "add", f"{host}/24", "dev", device)
            run("ip", "-n", name, "link", "set", device, "up")
        for setting in ("ip_local_port_range=40000 40119", "tcp_tw_reuse=2"):
            run("ip", "netns", "exec", here, "sysctl", "-qw", f"net.ipv4.{setting}")
        ready = threading.Event()
        address: list[tuple[str, int]] = []
        threading.Thread(target=serve, args=(there, ready, address), daemon=True).start()
        ready.wait(10)
        enter(here)
        asyncio.run(visit(address[0]))
    finally:
        for name in (here, there):
            subprocess.run(["ip", "netns", "del", name], check=False, capture_output=True)


main()
