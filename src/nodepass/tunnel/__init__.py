"""What a server and a client have in common."""

__all__ = ["control", "pool", "slot", "tunnel"]
