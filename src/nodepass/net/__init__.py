"""Sockets: names, dialling, listening, readiness, deadlines."""

__all__ = ["datagram", "listener", "localport", "net", "patience", "resolver", "watch"]
