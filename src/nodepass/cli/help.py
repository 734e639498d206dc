"""The text of `nodepass --help`, written from the tables it describes.

Only `main` calls it.
"""

from __future__ import annotations

from collections.abc import Sequence

from nodepass.config.environment import VARIABLES
from nodepass.config.parameters import PARAMETERS, Mode, Parameter

__all__ = ["FIRST_STEPS", "text"]

HEAD = """\
nodepass - a tunnel between two machines; the client dials out, so it needs no open port

usage: nodepass URL [URL ...]          run these tunnels until SIGINT or SIGTERM
       nodepass demo                   see and measure a tunnel on this machine
       nodepass keygen [HOST]          make a password; prints the lines for both machines
       nodepass --version | --help

  server://[password@]tunnel_host:tunnel_port/target_host:target_port[?log=...&...]
  client://[password@]tunnel_host:tunnel_port/target_host:target_port[?log=...&...]

  The server listens on the tunnel address for clients and on the target address for visitors.
  The client dials the tunnel address, and its own target address for each visitor.
  Hosts are IPv4, [IPv6] or names. None at all (:10101) is every address of the server, and
  this machine for the client. '?' and '&' mean something to a shell: put the URL in quotes.
  A password in a URL can be seen by other users of the machine for a moment, and in the shell's
  history: better set NODEPASS_PASSWORD_FILE. The Go program has no passwords, so any password
  shuts it out.

examples:
  A password, in a file that only you can read; copy the file to the other machine:
    (umask 077; nodepass keygen | head -n 1 > ~/nodepass.secret)
  A web server at home, seen on port 8080 of a rented machine, encrypted:
    rented machine   NODEPASS_PASSWORD_FILE=~/nodepass.secret nodepass "server://:10101/:8080?tls=1"
    at home          NODEPASS_PASSWORD_FILE=~/nodepass.secret nodepass \\
                              "client://rented.example.org:10101/127.0.0.1:80?tls=1"
  The ssh of that machine as well, in the same two processes:
    rented machine   NODEPASS_PASSWORD_FILE=~/nodepass.secret nodepass \\
                              "server://:10101/:8080?tls=1" "server://:10102/:2222?tls=1"
    at home          NODEPASS_PASSWORD_FILE=~/nodepass.secret nodepass \\
                              "client://rented.example.org:10101/127.0.0.1:80?tls=1" \\
                              "client://rented.example.org:10102/127.0.0.1:22?tls=1"
  With every detail in the log:
    NODEPASS_PASSWORD_FILE=~/nodepass.secret nodepass \\
                              "server://[2001:db8::1]:10101/127.0.0.1:5432?tls=1&log=debug"
"""

FIRST_STEPS = """
nodepass - a tunnel between two machines; the client dials out, so it needs no open port

  nodepass demo              see and measure a tunnel on this machine
  nodepass keygen [HOST]     make a password; prints the lines for both machines
  nodepass --help            all there is, with examples

A web server at home, seen on port 8080 of a rented machine. A password, copied to both:
  (umask 077; nodepass keygen | head -n 1 > ~/nodepass.secret)
On the rented machine:
  NODEPASS_PASSWORD_FILE=~/nodepass.secret nodepass "server://:10101/:8080?tls=1"
At home:
  NODEPASS_PASSWORD_FILE=~/nodepass.secret nodepass \\
      "client://rented.example.org:10101/127.0.0.1:80?tls=1"
"""
"""What the command says when it is called without a word: half a screen that leads on."""

TAIL = """\
exit code: 0 ended by a signal, 1 could not start, 2 wrong option, 130 interrupted while starting
signals:   SIGINT, SIGTERM end after the open relays, a second one at once;
           SIGHUP re-reads the certificates
"""

NOTE = """\
  Durations are Go's: 300ms, 5s, 1m30s, 2h45m. Each name may also be spelt NODEPASS_<NAME>, which
  no other program means: that goes first, and there a bad value is an error. Under a general name
  it gets a warning, and the default stays. Empty is as good as not set, but for a password.
"""

PASSWORD_ROW = ("NODEPASS_PASSWORD[_FILE]", "-", "the password, or a file that holds it")


def text() -> str:
    """Return the whole help, ending in a line feed."""
    parameters = [(p.name, _where(p), p.default or "-", _meaning(p)) for p in PARAMETERS]
    variables = [(v.name, v.default, v.meaning) for v in VARIABLES]
    parts = (
        HEAD,
        _table(("query", "where", "default", "meaning"), parameters),
        _table(("environment", "default", "meaning"), [*variables, PASSWORD_ROW]),
        NOTE,
        TAIL,
    )
    return "\n".join(parts)


def _where(parameter: Parameter) -> str:
    return "both" if len(parameter.modes) == len(Mode) else parameter.modes[0].value


def _meaning(parameter: Parameter) -> str:
    said = parameter.meaning
    if parameter.name == "log":
        said += ": " + " ".join(parameter.values)
    return said


def _table(head: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    """Lay out columns, each as wide as its longest cell."""
    lines = [head, *rows]
    widths = [max(len(line[column]) for line in lines) for column in range(len(head))]
    return "".join(
        "  "
        + "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        + "\n"
        for line in lines
    )
