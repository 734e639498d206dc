"""The end that dials."""

__all__ = ["client"]
