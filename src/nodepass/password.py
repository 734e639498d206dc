"""The password: text that never shows, and where the environment keeps it.

No error raised here carries any part of a password, neither in its text nor in the
exceptions it stands for. The one file that is read is NODEPASS_PASSWORD_FILE.

`config` calls it; everyone may hold a `Secret`.
"""

from __future__ import annotations

import os
import select
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import NoReturn

from .errors import ConfigError

__all__ = ["PASSWORD_LIMIT", "Secret", "checked", "from_environment", "is_exposed", "utf8"]

PASSWORD_LIMIT = 1024
"""Bytes of a password; enough for a key file, and an end to reading a device."""

PIPE_PATIENCE = 5.0
"""Seconds that a password may take to come out of a pipe; a start must not hang on it."""

VARIABLE, FILE_VARIABLE = "NODEPASS_PASSWORD", "NODEPASS_PASSWORD_FILE"


class Secret:
    """Text that shows itself as *** wherever it is printed."""

    __slots__ = ("_text",)

    def __init__(self, text: str) -> None:
        self._text = text

    def reveal(self) -> str:
        """Return the text itself; never into a line, a message or a file."""
        return self._text

    def __repr__(self) -> str:
        return "***"

    def __format__(self, spec: str) -> str:
        return "***"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Secret) and other._text == self._text

    def __hash__(self) -> int:
        return hash(self._text)

    def __reduce__(self) -> NoReturn:
        raise TypeError("a secret is not written anywhere")


def from_environment(environ: Mapping[str, str]) -> tuple[Secret | None, str]:
    """Read the password that no URL carries.

    Returns:
        The password or None, and the variable it came from.

    Raises:
        ConfigError: it cannot be read or used; names the variable.
    """
    text, path = environ.get(VARIABLE), environ.get(FILE_VARIABLE)
    if text is not None and path is not None:
        raise ConfigError(VARIABLE, f"and {FILE_VARIABLE} are both set; keep one")
    if path is not None:
        return _from_file(path), FILE_VARIABLE
    return None if text is None else checked(VARIABLE, text), VARIABLE


def _from_file(path: str) -> Secret:
    try:
        line = _head(path)
    except (OSError, ValueError) as exc:
        why = (exc.strerror if isinstance(exc, OSError) else None) or str(exc)
        raise ConfigError(FILE_VARIABLE, f"cannot read {path!r}: {why.lower()}") from exc
    text = utf8(line.removesuffix(b"\n").removesuffix(b"\r"))
    if text is None:
        raise ConfigError(FILE_VARIABLE, f"{path!r} holds bytes that are not UTF-8")
    return checked(FILE_VARIABLE, text)


def _head(path: str) -> bytes:
    """Return a file's first bytes; a pipe may be one, if somebody writes into it soon."""
    room = PASSWORD_LIMIT + len("\r\n")
    if not hasattr(os, "O_NONBLOCK"):  # Windows
        with Path(path).open("rb") as file:
            return file.read(room)
    fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        data = b""
        while len(data) < room:
            if not select.select([fd], [], [], PIPE_PATIENCE)[0]:
                raise TimeoutError(f"nothing came out of it in {PIPE_PATIENCE:g} s")
            piece = os.read(fd, room - len(data))
            if not piece:
                break
            data += piece
        return data
    finally:
        os.close(fd)


def is_exposed(path: str) -> bool:
    """Tell whether every user of this machine may read the file of a password or a key."""
    if os.name != "posix":
        return False  # elsewhere the mode bits do not say who may read
    try:
        return bool(Path(path).stat().st_mode & stat.S_IROTH)
    except OSError:
        return False


def checked(option: str, text: str) -> Secret:
    """Wrap a password that can be used.

    Args:
        option: where it came from; named in the error.
        text: as typed, escapes undone.

    Raises:
        ConfigError: it is empty, too long, or not UTF-8.
    """
    data = text.encode(errors="surrogatepass")
    if not 0 < len(data) <= PASSWORD_LIMIT:
        raise ConfigError(
            option, f"is empty or too long; a password has 1..{PASSWORD_LIMIT} bytes"
        )
    if utf8(data) is None:  # bytes of another encoding, which Python keeps as surrogates
        raise ConfigError(option, "holds bytes that are not UTF-8")
    return Secret(text)


def utf8(data: bytes) -> str | None:
    """Decode, or return None: an UnicodeDecodeError would carry the bytes along."""
    try:
        return data.decode()
    except UnicodeDecodeError:
        return None
