"""What the program tells: log lines, counts, losses."""

__all__ = ["console", "drop", "log", "outlet", "stats"]
