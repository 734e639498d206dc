"""Certificates, strangers and their exchanges, for the tests of contexts."""

from __future__ import annotations

import contextlib
import shutil
import subprocess
from collections.abc import Iterator

from tests.kit.pump import (
    Outcome,
)

from nodepass.tls.codec import Records


def exchange(outcome: Outcome) -> None:
    """Make sure that words pass in both directions, and that both ends close."""
    assert outcome.is_good, outcome
    server, client = Records(outcome.server), Records(outcome.client)
    assert server.open(client.seal(b"hello")) == b"hello"
    assert client.open(server.seal(b"x" * 100_000)) == b"x" * 100_000
    assert client.binding() == server.binding()
    assert (server.open(client.end()), server.has_ended) == (b"", True)
    assert (client.open(server.end()), client.has_ended) == (b"", True)


OPENSSL = shutil.which("openssl")


@contextlib.contextmanager
def program(*args: str) -> Iterator[subprocess.Popen[bytes]]:
    assert OPENSSL is not None
    pipe = subprocess.PIPE
    with subprocess.Popen([OPENSSL, *args], stdin=pipe, stdout=pipe, stderr=pipe) as process:
        try:
            yield process
        finally:
            process.kill()
            process.communicate()
