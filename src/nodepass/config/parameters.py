"""The table of URL parameters: which end takes each, what it may be, what the help says."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class Mode(StrEnum):
    """Which end of the tunnel this is."""

    SERVER = "server"
    CLIENT = "client"


BOTH = (Mode.SERVER, Mode.CLIENT)
LEVELS = ("debug", "info", "warn", "error", "fatal", "none")
SWITCH = ("0", "1")


@dataclass(frozen=True, slots=True)
class Parameter:
    """One query parameter: who takes it, what it may be, what the help says."""

    name: str
    modes: tuple[Mode, ...]
    default: str
    values: tuple[str, ...]
    meaning: str


PARAMETERS: tuple[Parameter, ...] = (
    Parameter("log", BOTH, "info", LEVELS, "least level that is printed"),
    Parameter(
        "tls",
        BOTH,
        "0",
        ("0", "1", "2"),
        "server: 0 plain, 1 self-signed, 2 crt and key; client: the least accepted",
    ),
    Parameter("crt", (Mode.SERVER,), "", (), "PEM file: certificate and its chain, for tls=2"),
    Parameter("key", (Mode.SERVER,), "", (), "PEM file: the key of crt"),
    Parameter("ca", (Mode.CLIENT,), "", (), "PEM file to trust, not the system's; implies tls=2"),
    Parameter("sni", (Mode.CLIENT,), "", (), "server name, not the tunnel host; implies tls=2"),
    Parameter("compat", BOTH, "1", SWITCH, "0 = refuse peers of the seed dialect"),
    Parameter("data", (Mode.SERVER,), "0", (), "port of the seed dialect's data listener"),
    Parameter("tcp", BOTH, "1", SWITCH, "0 = carry no TCP"),
    Parameter("udp", BOTH, "1", SWITCH, "0 = carry no UDP"),
    Parameter("name", (Mode.CLIENT,), "", (), "how the server names this client"),
)
