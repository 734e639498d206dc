"""What a server and a client have in common."""

__all__ = [
    "base",
    "context",
    "control",
    "demand",
    "idle_links",
    "open_relays",
    "pool",
    "slots",
]
