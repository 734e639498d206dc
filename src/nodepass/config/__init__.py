"""What the user asked for: URLs, variables, passwords, as frozen values."""

__all__ = ["config", "environment", "hostname", "password", "spelling"]
