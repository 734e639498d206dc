"""A link with a long round trip: two network namespaces joined by veth and `tc netem`.

For tests that run as root on a kernel with sch_netem. Everything lives in namespaces of
its own; the machine's own network is not touched.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from contextlib import contextmanager
from typing import TYPE_CHECKING, Final, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Iterator

SERVER_ADDRESS: Final = "10.77.0.1"
CLIENT_ADDRESS: Final = "10.77.0.2"


class Unavailable(Exception):
    """This machine cannot do it; the text says why."""


class Spaces(NamedTuple):
    """Command prefixes that run a program on either side."""

    server: tuple[str, ...]
    client: tuple[str, ...]
    names: tuple[str, str]

    def plug(self, state: str) -> None:
        """Pull the cable on the client's side ("down"), or plug it in again ("up")."""
        _run("ip", "-n", self.names[1], "link", "set", "np0", state)


def _run(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise Unavailable(f"{' '.join(command)}: {done.stderr.strip() or done.returncode}")


@contextmanager
def delayed_link(milliseconds: int) -> Iterator[Spaces]:
    """Join two namespaces by a link that takes so long one way; 0 leaves netem out.

    Raises:
        Unavailable: no root, no `ip` or `tc`, or a kernel without netem.
    """
    if shutil.which("ip") is None or shutil.which("tc") is None:
        raise Unavailable("needs ip and tc (iproute2)")
    names = [f"np-{os.getpid()}-{side}" for side in "sc"]
    made: list[str] = []
    try:
        for name in names:
            _run("ip", "netns", "add", name)
            made.append(name)
        _run("ip", "-n", names[0], "link", "add", "np0", "type", "veth",
             "peer", "name", "np0", "netns", names[1])  # fmt: skip
        for name, address in zip(names, (SERVER_ADDRESS, CLIENT_ADDRESS), strict=True):
            _run("ip", "-n", name, "address", "add", f"{address}/24", "dev", "np0")
            for device in ("lo", "np0"):
                _run("ip", "-n", name, "link", "set", device, "up")
            if milliseconds:
                _run("tc", "-n", name, "qdisc", "add", "dev", "np0", "root",
                     "netem", "delay", f"{milliseconds}ms", "limit", "100000")  # fmt: skip
        server, client = (("ip", "netns", "exec", name) for name in names)
        yield Spaces(server, client, (names[0], names[1]))
    finally:
        for name in made:
            subprocess.run(["ip", "netns", "del", name], capture_output=True, check=False)
