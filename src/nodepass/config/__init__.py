"""What the user asked for: URLs, variables, passwords, as frozen values."""

__all__ = ["address", "environment", "hostname", "parameters", "password", "spelling", "url"]
