"""`nodepass keygen`: a fresh password, and the lines that use it on both machines.

The password goes into a file, and stands neither in the words nor in the environment of what
runs. The line that writes it begins with a blank, which keeps it out of the history of many
shells, and holds nothing that one shell has and another has not; `install` empties the file
first, so `>>` serves shells that are told not to overwrite. The lines between hold nothing that
does harm where a shell does not take '#' for a comment (zsh): no quote, bracket or ';'.

Only `main` calls it.
"""

from __future__ import annotations

import secrets
from collections.abc import Sequence

from nodepass.config.url import parse_host
from nodepass.errors import ConfigError

__all__ = ["make_secret", "text"]

SECRET_SIZE = 32
"""Random bytes: 256 bits, nobody guesses them; 43 characters of base64url."""

TUNNEL_PORT = 10101
EXAMPLE_HOST = "rented.example.org"

USAGE = """\
usage: nodepass keygen [HOST]

  Prints a fresh password and the lines that make an encrypted tunnel with it: one that keeps it
  in a file, on both machines; one for the server, whose visitors come to port 8080; one for the
  client, whose service listens on port 80. Change the ports as you need them.
  HOST is the server's name or address, as the client reaches it.
  The password alone:  nodepass keygen | head -n 1
"""

LINES = """\
{secret}

# on both machines, into a file that only you can read:
 install -m 600 /dev/null ~/nodepass.secret && echo '{secret}' >> ~/nodepass.secret

# on the server, where visitors come to port 8080:
NODEPASS_PASSWORD_FILE=~/nodepass.secret nodepass 'server://:{port}/:8080?tls=1'

# on the client, where the service listens on 127.0.0.1:80{hint}:
NODEPASS_PASSWORD_FILE=~/nodepass.secret nodepass 'client://{tunnel}/127.0.0.1:80?tls=1'
"""


def text(words: Sequence[str]) -> str:
    """Return what `nodepass keygen` prints, ending in a line feed.

    Args:
        words: those after "keygen".

    Raises:
        ConfigError: they are not at most one host.
    """
    if words and words[0] in ("--help", "-h"):
        return USAGE
    if len(words) > 1 or any(word.startswith("-") for word in words):
        raise ConfigError("keygen", "takes one word at most, the server's host")
    # A host that was read has no character that means something between single quotes.
    host = parse_host("HOST", words[0]) if words else EXAMPLE_HOST
    return LINES.format(
        secret=make_secret(),
        port=TUNNEL_PORT,
        tunnel=f"[{host}]:{TUNNEL_PORT}" if ":" in host else f"{host}:{TUNNEL_PORT}",
        hint="" if words else f", with {EXAMPLE_HOST} replaced by the name of the server",
    )


def make_secret() -> str:
    """Return 43 characters of base64url that no program takes for an option."""
    while (secret := secrets.token_urlsafe(SECRET_SIZE)).startswith("-"):
        pass
    return secret
