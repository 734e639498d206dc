"""Host names as people write them, and as DNS, TLS and certificates have them.

A name may hold letters of any script; on the wire it is ASCII, each label of other letters
as xn--… How one becomes the other is IDNA 2008 (RFC 5891) behind the mapping of UTS 46 that
browsers use, without its "transitional" part: straße.example is not strasse.example. The codec
"idna" of Python is IDNA 2003, which dials the wrong one of the two, so nothing here may hand
letters beyond ASCII to `socket` or to that codec.

What is ASCII already stays as it is, with underscores and with labels that are encoded.

Pure text; whoever encodes or shows a name asks here.
"""

from __future__ import annotations

__all__ = ["HOST_LIMIT", "encode", "readable", "tls_name"]

HOST_LIMIT = 253
"""Characters of a host name, RFC 1035 section 2.3.4."""

LABEL_LIMIT = 63
"""Characters of one label, RFC 1035 section 2.3.4."""

WRITTEN_LIMIT = 4 * HOST_LIMIT
"""Characters of a name before it is encoded: it may lose some on the way, but not so many."""

ENCODED = "xn--"


def encode(name: str) -> str:
    """Turn a name into ASCII.

    Args:
        name: as it was written; ASCII comes back unchanged, whatever it is.

    Raises:
        ValueError: no host name can be written so; the text says why. What UTS 46 maps to
            ASCII ("．" to ".", "／" to "/") is not looked at any further.

    Source: UTS 46, section 4; RFC 5891, section 5.
    """
    if name.isascii():
        return name
    if len(name) > WRITTEN_LIMIT:
        raise ValueError("too long")
    import idna  # 10 ms and its tables, which few ever need

    labels = idna.uts46_remap(name, std3_rules=False, transitional=False).split(".")
    return ".".join(
        label if label.isascii() else idna.alabel(label).decode("ascii") for label in labels
    )


def readable(name: str) -> str:
    """Turn labels that are encoded into the letters they stand for, where that is certain.

    Args:
        name: ASCII, a name or an address.
    """
    if ENCODED not in name:
        return name
    return ".".join(_readable_label(label) for label in name.split("."))


def _readable_label(label: str) -> str:
    if not label.startswith(ENCODED) or len(label) > LABEL_LIMIT:
        return label
    import idna

    try:
        letters = idna.ulabel(label)
        return letters if encode(letters) == label else label
    except ValueError:
        return label


def tls_name(name: str) -> bytes:
    """Return a name as TLS sends it and as certificates hold it: no dot at the end.

    Raises:
        ValueError: it is no name; the empty one is none either.
    """
    plain = encode(name).rstrip(".")
    if len(plain) > HOST_LIMIT:
        raise ValueError("too long")
    if not all(0 < len(label) <= LABEL_LIMIT for label in plain.split(".")):
        raise ValueError("a label of it is empty or too long")
    return plain.encode("ascii")
