"""What a server and a client have in common."""

__all__ = ["base", "control", "pool", "slots"]
