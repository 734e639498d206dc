"""The password: text that never shows, and where the environment keeps it.

Whoever keeps a password in a file, a variable or a vault gets a line end along with it, and
sometimes what an editor, a shell or a form has put around it. One line end is no part of a
password, wherever it comes from. What else cannot be meant is refused at the start: two ends
that disagree by a blank would later tell of a middle man.

No error raised here carries any part of a password, neither in its text nor in the
exceptions it stands for. The one file that is read is NODEPASS_PASSWORD_FILE.

`config` calls it; everyone may hold a `Secret`.
"""

from __future__ import annotations

import contextlib
import os
import re
import select
import stat
import sys
import unicodedata
from collections.abc import Mapping
from pathlib import Path
from typing import NoReturn

from nodepass.errors import ConfigError

__all__ = [
    "PASSWORD_LIMIT", "CommonPassword", "Secret", "checked", "is_exposed",
    "keep_out_of_core_dumps", "utf8",
]  # fmt: skip

PASSWORD_LIMIT = 1024
"""Bytes of a password; enough for a key file, and an end to reading a device."""

PIPE_PATIENCE = 5.0
"""Seconds that a password may take to come out of a pipe; a start must not hang on it."""

PR_SET_DUMPABLE = 4
"""include/uapi/linux/prctl.h."""

VARIABLE, FILE_VARIABLE = "NODEPASS_PASSWORD", "NODEPASS_PASSWORD_FILE"

BOM = "\ufeff"
UTF16_MARKS = (b"\xff\xfe", b"\xfe\xff")
INVISIBLE = ("Cc", "Cf", "Zl", "Zp", "Zs")
"""Categories of Unicode: controls, format characters, blanks of all kinds."""

# A line of an environment file. Base64 may end in '=' and base32 is upper case, so something
# has to follow the '='; random passwords hold one, too, so the name has to look like one.
_ASSIGNMENT = re.compile(
    r"(?:(?P<export>export|set|setx)[ \t]+)?(?P<name>[A-Za-z_][A-Za-z0-9_]*)[ \t]*=[ \t]*(?!=*$)",
    re.IGNORECASE,
)
_SECRET_NAME = re.compile(r"[A-Z_][A-Z0-9_]{3,}|.*(?i:pass|secret|token|pwd).*|(?i:pw|psk)")


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


class CommonPassword:
    """The password that no URL carries; read when it is first wanted, and only once.

    A pipe, as a shell's <(command) gives it, hands out what it holds a single time, however
    many URLs there are.

    Args:
        environ: the variables; held on to.
    """

    def __init__(self, environ: Mapping[str, str]) -> None:
        self._environ = environ
        self._found: tuple[Secret | None, str] | None = None

    def read(self) -> tuple[Secret | None, str]:
        """Return the password or None, and the variable it came from.

        Raises:
            ConfigError: it cannot be read or used; names the variable.
        """
        if self._found is None:
            self._found = _from_environment(self._environ)
        return self._found


def _from_environment(environ: Mapping[str, str]) -> tuple[Secret | None, str]:
    text, path = environ.get(VARIABLE), environ.get(FILE_VARIABLE)
    if text is not None and path is not None:
        raise ConfigError(VARIABLE, f"and {FILE_VARIABLE} are both set; keep one")
    if path is not None:
        return _from_file(path), FILE_VARIABLE
    return None if text is None else checked(VARIABLE, text), VARIABLE


def _is_path(text: str) -> bool:
    """Tell whether this can only be meant as a path: it exists, or a folder on its way does."""
    # Neither "." nor "/", which every text with a slash in it has. These looks raise nothing
    # but ValueError, for NUL; those of `Path` do, with the whole text in the error.
    folders = [folder for folder in Path(text).parents if folder.name]
    try:
        return os.path.lexists(text) or any(map(os.path.isdir, folders))
    except ValueError:
        return False


def _from_file(path: str) -> Secret:
    try:
        data = _head(path)
    except (OSError, ValueError) as exc:
        why = (exc.strerror if isinstance(exc, OSError) else "no name of a file") or str(exc)
        if not _is_path(path):  # likely the password itself, which must not show
            reply = f"does not name a file that can be read ({why.lower()}); give its path"
            raise ConfigError(FILE_VARIABLE, reply) from None
        raise ConfigError(FILE_VARIABLE, f"cannot read {path!r}: {why.lower()}") from exc
    if data.startswith(UTF16_MARKS):
        raise ConfigError(FILE_VARIABLE, f"{path!r} is UTF-16; save it as UTF-8")
    text = utf8(data)
    if text is None and len(data) > PASSWORD_LIMIT:
        text = data.decode(errors="ignore")  # cut off within a character
    if text is None:
        raise ConfigError(FILE_VARIABLE, f"{path!r} holds bytes that are not UTF-8")
    return checked(FILE_VARIABLE, text, f"{path!r} ")


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


def checked(option: str, text: str, where: str = "") -> Secret:
    """Wrap a password that can be used; one line end is taken off.

    Args:
        option: where it came from; named in the error.
        text: as typed, escapes undone.
        where: what the error's message begins with.

    Raises:
        ConfigError: it is empty, too long, not UTF-8, or cannot have been meant.
    """
    if text.endswith("\n"):
        text = text[:-1].removesuffix("\r")
    fault = _fault_of(text)
    if fault is not None:
        raise ConfigError(option, where + fault)
    return Secret(text)


def _fault_of(text: str) -> str | None:
    """Say what is wrong with a password, without any of its letters."""
    data = text.encode(errors="surrogatepass")
    if not data:
        return f"is empty; a password has 1..{PASSWORD_LIMIT} bytes"
    if utf8(data) is None:  # bytes of another encoding, which Python keeps as surrogates
        return "holds bytes that are not UTF-8"
    if "\0" in text:
        return "holds a NUL byte, as text in UTF-16 does; a password is UTF-8"
    if BOM in text:
        return "holds a byte order mark, which some editors put before a text; save it without"
    found = _lines_fault(text) or _ends_fault(text)
    if found is not None:
        return found
    if any(unicodedata.category(letter) == "Cc" and letter != "\t" for letter in text):
        return "holds a control character"
    if len(data) > PASSWORD_LIMIT:
        return f"is too long; a password has 1..{PASSWORD_LIMIT} bytes"
    given = _ASSIGNMENT.match(text)
    if given is not None and (given["export"] or _SECRET_NAME.fullmatch(given["name"])):
        return "looks like NAME=value, a line of an environment file; give the value alone"
    return None


def _lines_fault(text: str) -> str | None:
    if "\n" in text or "\r" in text.rstrip("\r"):
        return "has more than one line; a password is one, of what keygen prints the first"
    if text.endswith("\r"):
        return "ends in a carriage return, of a file with the line ends of Windows; take it off"
    return None


def _ends_fault(text: str) -> str | None:
    for verb, letter in (("begins with", text[0]), ("ends in", text[-1])):
        if unicodedata.category(letter) in INVISIBLE:
            kind = "a blank" if letter.isspace() else "an invisible character"
            return f"{verb} {kind}, which can hardly be meant; take it off"
    return None


def utf8(data: bytes) -> str | None:
    """Decode, or return None: an UnicodeDecodeError would carry the bytes along."""
    try:
        return data.decode()
    except UnicodeDecodeError:
        return None


def keep_out_of_core_dumps() -> None:
    """Have the kernel write no core dump of this process, which would hold the password.

    Nor can a debugger of the same user look into it any more; root can. A resource limit would not
    do: a core_pattern that names a program does not heed it. Linux only; never raises.

    Source: prctl(2), PR_SET_DUMPABLE.
    """
    if not sys.platform.startswith("linux"):
        return
    with contextlib.suppress(ImportError, OSError, AttributeError):
        import ctypes

        ctypes.CDLL(None).prctl(PR_SET_DUMPABLE, 0, 0, 0, 0)
