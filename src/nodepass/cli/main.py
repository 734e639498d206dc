"""The command line: words in, exit code out.

    0  ended by a signal, or did what was asked    1  could not start    2  wrong option
    130  interrupted before it could start anything

Every option is read and checked before anything starts. What is heavy (asyncio and all
above it) is imported where it is needed, so that `--help` and wrong options answer at once.
Nothing imports this module but `__main__` and the console script.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, NoReturn

from nodepass.errors import ConfigError

if TYPE_CHECKING:
    from nodepass.config.environment import Settings
    from nodepass.config.url import Config

__all__ = ["main"]

FINE, CRASHED, WRONG_OPTION = 0, 1, 2

INTERRUPTED = 130
"""What shells say of a program that SIGINT ended: 128 + 2."""

LATER = ("bench", "doctor", "service", "top")
"""Commands that are announced and not in this build yet."""

_OPTION = re.compile(r"--[a-z-]+|-[A-Za-z](?=[^-]|$)")


COMMANDS = ("demo", "keygen", "help", "version")
MODES = ("server", "client")

SHORT = 4
"""Letters; in a longer command two of them may be wrong for it to be known again."""

_WORD = re.compile(r"[A-Za-z]{2,12}")
"""What might be a command; not long enough to hold much of a password."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program.

    Args:
        argv: words after the program's name; None = those of this process.

    Returns:
        The exit code.
    """
    try:
        _fill_standard_streams()
        return _obey(list(sys.argv[1:] if argv is None else argv))
    except ConfigError as exc:
        return _refuse(str(exc))
    except KeyboardInterrupt:
        # Until `runner` listens to signals, and that is after all that has to be imported.
        return INTERRUPTED
    except Exception as exc:  # noqa: BLE001 - the outer edge of the program
        return _crash(exc)


def _obey(words: Sequence[str]) -> int:
    exposed = None
    if any("@" in word for word in words):  # the password of a URL, whatever it stands beside
        from .proctitle import hide_passwords

        exposed = hide_passwords(words)
    if words[:1] == ["help"] and words[1:] in (["demo"], ["keygen"]):
        words = [words[1], "--help"]
    if words[:1] == ["demo"]:
        from .demo import main as run_demo

        return run_demo(words[1:])
    if words[:1] == ["keygen"]:
        return _keygen(words[1:])
    if "--help" in words or "-h" in words or words == ["help"]:
        from .help import text

        print(text(), end="")
        return FINE
    if "--version" in words or "-V" in words or words == ["version"]:
        print(_version())
        return FINE
    if words and words[0] in LATER:
        raise ConfigError(words[0], "is not in this build yet")
    if not words:
        from .help import FIRST_STEPS

        # An error all the same: $URL may be empty where this runs unattended.
        return _refuse("url: is missing", FIRST_STEPS)
    return _run(words, exposed)


def _fill_standard_streams() -> None:
    """Open what an init script may have closed.

    Otherwise the first sockets would become descriptors 0 to 2, and whatever writes to
    "standard error" would write to a visitor.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest free number, which is this one
    if sys.stdout is None:
        sys.stdout = os.fdopen(1, "w", closefd=False)
    if sys.stderr is None:
        sys.stderr = os.fdopen(2, "w", closefd=False)


def _refuse(message: str, more: str = "") -> int:
    """Say in one line what is wrong, and to people more; without `logging` if that will do."""
    from nodepass.config.environment import log_format

    line = f"nodepass: error: {message}\n"
    if log_format(os.environ) == "json":
        from nodepass.observe.console import Console

        with Console("json"):
            sys.stderr.write(line)
    else:
        from nodepass.observe.outlet import tell

        tell(line + more)
    return WRONG_OPTION


def _crash(exc: Exception) -> int:
    from nodepass.config.environment import log_format
    from nodepass.observe.console import Console

    with Console(log_format(os.environ)) as console:
        console.crash(exc)
    return CRASHED


def _keygen(words: Sequence[str]) -> int:
    from .keygen import text

    print(text(words), end="")
    return FINE


def _version() -> str:
    from importlib.util import find_spec

    from nodepass import __version__

    native = find_spec("nodepass._fastcopy") is not None
    engine = "native" if native and os.environ.get("NODEPASS_ENGINE") != "python" else "python"
    return f"nodepass {__version__} (engine {engine}, Python {sys.version.split()[0]})"


def _run(urls: Sequence[str], exposed: str | None) -> int:
    settings, configs = _read(urls, os.environ)
    # The configs hold it now. A library of ours may start a process, which inherits the rest.
    os.environ.pop("NODEPASS_PASSWORD", None)
    from .runner import run

    return run(configs, settings, exposed)


def _refuse_word(word: str) -> NoReturn:
    """Say what a word that is no URL may have been meant for; it is shown if that is plain."""
    from nodepass.config.spelling import distance

    if _WORD.fullmatch(word):
        typed = word.lower()
        known = ((not k.startswith(typed), distance(typed, k), k) for k in (*COMMANDS, *MODES))
        is_other, slips, near = min(known)
        if not is_other or slips <= 1 or (slips == 2 and len(near) > SHORT):
            meant = f"{near}://…" if near in MODES else f"nodepass {near}"
            raise ConfigError(word, f"is neither a command nor a URL; did you mean {meant}?")
    raise ConfigError(
        "url",
        "starts neither with server:// nor with client://, and is no command; those are"
        f" {', '.join(COMMANDS)}",
    )


def _read(urls: Sequence[str], environ: Mapping[str, str]) -> tuple[Settings, list[Config]]:
    from nodepass.config.environment import Settings
    from nodepass.config.password import CommonPassword
    from nodepass.config.spelling import suggest
    from nodepass.config.url import Config, check_together, label_together

    for word in urls:
        if word.startswith("-"):
            # Without what may be glued to it: --password=…, -p…
            option = _OPTION.match(word)
            shown = option[0] if option else "-"
            is_command = shown.lstrip("-") in COMMANDS[:2]
            hint = (
                f"did you mean nodepass {shown.lstrip('-')}?"
                if is_command
                else suggest(shown, ("--help", "--version"))
            )
            raise ConfigError(shown, f"is not an option; {hint}")
        if "://" not in word and word.isascii():
            _refuse_word(word)
    settings = Settings.from_environment(environ)
    common = CommonPassword(environ)
    configs = [Config.parse(url, environ, settings, common) for url in urls]
    check_together(configs)
    return settings, label_together(configs)
