"""Sockets: names, dialling, listening, readiness, deadlines."""

__all__ = ["deadlines", "listener", "local_ports", "readiness", "resolver", "tcp", "udp"]
