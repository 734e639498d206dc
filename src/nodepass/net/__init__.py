"""Sockets: names, dialling, listening, readiness, deadlines."""

__all__ = [
    "deadlines",
    "descriptors",
    "hosts",
    "listener",
    "local_ports",
    "readiness",
    "resolver",
    "tcp",
    "tcp_dial",
    "udp",
]
