"""What a program is that does not speak our protocol, from its first bytes. Pure."""

from __future__ import annotations


def identify(start: bytes) -> str:
    """Name what wrote these first bytes, for a log line a user can act on."""
    if not start:
        return (
            "a program that says nothing (is this the tunnel port? NodePass 1.0.0-1.0.2 and 1.4 "
            "or later wait for us to speak)"
        )
    if start[:1] == b"\x16" or start[:2] == b"\x15\x03":
        return "a TLS program (NodePass 1.0.0-1.0.2 speaks TLS from the first byte)"
    if start.startswith(b"HTTP/"):
        return "an HTTP server (NodePass 1.13 and later handshakes over HTTP)"
    if start.split(b" ", 1)[0] in (b"GET", b"POST", b"HEAD", b"PUT", b"OPTIONS", b"CONNECT"):
        if b"authorization: bearer" in start.lower():
            return "NodePass 1.13 or later (handshake over HTTP)"
        return "an HTTP client (NodePass 1.13 and later handshakes over HTTP)"
    if start.startswith(b"SSH-"):
        return "an SSH server"
    if start.startswith(b"np://"):
        return "NodePass 1.6 to 1.12"
    if start.startswith((b"//+", b"//-")):
        return "NodePass 1.2.2 to 1.5"
    if start.startswith(b"//#"):
        return "NodePass 1.1.1 to 1.2.1"
    if start.startswith((b"[PASSPORT]", b"[]")):
        return "NodePass 1.0.0"
    shown = start[:32].decode("ascii", errors="replace")
    printable = "".join(c if c.isprintable() and c != "\ufffd" else "." for c in shown)
    return f"no release we know (it wrote {printable!r})"
