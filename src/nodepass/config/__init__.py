"""What the user asked for: URLs, variables, passwords, as frozen values."""

__all__ = ["environment", "hostname", "password", "spelling", "url"]
