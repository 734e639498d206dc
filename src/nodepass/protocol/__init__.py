"""Every byte and rule between the two ends. Sans-IO."""

__all__ = ["handshake", "message", "proof", "session", "wire"]
