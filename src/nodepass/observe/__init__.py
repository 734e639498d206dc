"""What the program tells: log lines, counts, losses."""

__all__ = ["console", "log", "loss", "outlet", "stats"]
