"""Hosts as sockets name them: IPv4 as IPv4, and what counts as one source."""

from __future__ import annotations

import socket


def plain_host(host: str) -> str:
    """Undo what a dual-stack socket makes of an IPv4 address."""
    return host.removeprefix("::ffff:") if "." in host else host


def source_of(host: str) -> str:
    """Return what counts as one source: an IPv4 address, or the /64 of an IPv6 address."""
    if ":" not in host:
        return host
    return socket.inet_pton(socket.AF_INET6, host.partition("%")[0])[:8].hex(":", 2)
