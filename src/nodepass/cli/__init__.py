"""Words in, exit code out."""

__all__ = ["main"]
