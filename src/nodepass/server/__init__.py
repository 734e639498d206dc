"""The end that listens."""

__all__ = ["server"]
