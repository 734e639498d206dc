"""Certificates, contexts, records, and why a handshake failed."""

__all__ = ["_openssl", "advisory", "codec", "contexts"]
