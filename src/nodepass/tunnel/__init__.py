"""What a server and a client have in common."""

__all__ = [
    "base",
    "context",
    "control",
    "demand",
    "idle_links",
    "pool",
    "slots",
]
