"""Every byte and rule between the two ends. Sans-IO."""

__all__ = ["backoff", "handshake", "lines", "messages", "proof", "session", "strangers"]
