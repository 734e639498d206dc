"""What the interpreter and the kernel do to a running program: threads, forks."""

__all__ = ["fork", "threads"]
