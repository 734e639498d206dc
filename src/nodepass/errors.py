"""Every error the package raises on purpose.

NodePassError
├── ConfigError(ValueError)          bad URL or option; names the option
├── WireError                        bytes that break the protocol
│   ├── LocalWireError               we tried to send nonsense: our bug
│   └── PeerWireError                they sent nonsense: drop the connection
├── TunnelError                      handshake refused, control lost, peer silent
│   ├── AuthError                    a proof did not match
│   └── TlsError                     TLS with the other side failed
├── PoolError
│   ├── PoolTimeout(TimeoutError)    no idle link within the deadline
│   └── PoolClosed                   the tunnel is being stopped
├── ListenError(OSError)             an address of ours cannot be had; address, errno
├── DialError(OSError)               nobody answered; address, errno, attempts
└── EngineError(OSError)             the engine refused; operation, errno
    └── EngineClosed                 the engine has been closed

This module imports nothing of ours; everybody may import it.
"""

from __future__ import annotations

import errno
import os

TOO_FEW_THREADS = "the system allows too few threads; see ulimit -u, TasksMax=, pids.max"
"""What is behind EAGAIN of pthread_create(3) and Python's "can't start new thread"."""

THREADED = ("start", "handshake")
"""Operations of the engine that start a thread."""


_TELLING = (
    errno.EMFILE,
    errno.ENFILE,
    errno.ENOMEM,
    errno.ENOBUFS,
    errno.ECONNREFUSED,
    errno.ECONNRESET,
    errno.EACCES,
    errno.EPERM,
    errno.ETIMEDOUT,
    errno.EHOSTUNREACH,
    errno.ENETUNREACH,
)
"""What tells most comes first: something is wrong here, a machine was met, nobody answered, there
is no way. A machine without IPv6 has no way to every IPv6 address, which tells nothing."""

SHOWN_ADDRESSES = 4
"""Of one failure; a name may have dozens."""


class NodePassError(Exception):
    """The root: catches everything that the package raises on purpose."""


class ConfigError(NodePassError, ValueError):
    """An option has a value that cannot be used."""

    def __init__(self, option: str, message: str) -> None:
        super().__init__(f"{option}: {message}")
        self.option = option
        """Name of the query parameter, variable or URL part at fault."""
        self.message = message
        """What it may be, one clause."""


class WireError(NodePassError):
    """Bytes that break the protocol."""


class LocalWireError(WireError, ValueError):
    """This side tried to send something the protocol cannot carry."""


class PeerWireError(WireError):
    """The other side sent something the protocol does not allow."""


class TunnelError(NodePassError):
    """The pairing with the other side failed or ended."""

    def __init__(self, message: str, *, reason: str = "") -> None:
        super().__init__(message)
        self.reason = reason
        """One of the protocol's refusal words, or empty."""


class AuthError(TunnelError):
    """A proof did not match, or the other side cannot prove anything."""

    fingerprint: str | None = None
    """Of the certificate that the server showed, to be compared with its own log."""


class TlsError(TunnelError):
    """TLS with the other side failed; the message says which side and why."""


class PoolError(NodePassError):
    """No link can be had."""


class PoolTimeout(PoolError, TimeoutError):
    """No link became idle within the deadline."""


class PoolClosed(PoolError):
    """The pool is closed; no link will ever come."""


class ListenError(NodePassError, OSError):
    """An address to listen on cannot be had."""

    def __init__(self, address: str, code: int, detail: str = "") -> None:
        text = detail or os.strerror(code).lower()
        super().__init__(code, f"cannot listen on {address}: {text}")
        self.address = address
        """What was asked for, as "host:port"."""

    def __str__(self) -> str:
        return str(self.args[1])


class DialError(NodePassError, OSError):
    """No address of a name could be reached."""

    def __init__(self, address: str, code: int, attempts: int, detail: str = "") -> None:
        text = detail or os.strerror(code).lower()
        super().__init__(code, f"cannot reach {address}: {text}")
        self.address = address
        """What was dialled, as "host:port"."""
        self.attempts = attempts
        """How many resolved addresses were tried; 0 = the name did not resolve."""

    @classmethod
    def of_all(cls, address: str, failures: dict[str, int]) -> DialError:
        """Make one error of several failed attempts.

        Args:
            address: what was dialled, as "host:port".
            failures: an errno for each address of it.

        Returns:
            An error with the errno that tells most; its text has every one, each with whom it
            concerns where they differ.
        """
        if not failures:
            return cls(address, errno.EHOSTUNREACH, 0, "no address")
        codes = sorted(set(failures.values()), key=_telling)
        parts = []
        for code in codes:
            whose = [host for host, failure in failures.items() if failure == code]
            shown = ", ".join(whose[:SHOWN_ADDRESSES])
            more = len(whose) - SHOWN_ADDRESSES
            if more > 0:
                shown += f" and {more} more"
            text = os.strerror(code).lower()
            parts.append(f"{text} ({shown})" if len(codes) > 1 else text)
        return cls(address, codes[0], len(failures), ", ".join(parts))

    def __str__(self) -> str:
        return str(self.args[1])


def _telling(code: int) -> int:
    return _TELLING.index(code) if code in _TELLING else len(_TELLING)


class EngineError(NodePassError, OSError):
    """The engine could not do what it was asked."""

    def __init__(self, operation: str, code: int) -> None:
        text = os.strerror(code)
        if code == errno.EAGAIN and operation in THREADED:
            text = TOO_FEW_THREADS
        super().__init__(code, f"engine {operation}: {text}")
        self.operation = operation
        """Name of the engine method or system call."""

    def __str__(self) -> str:
        return str(self.args[1])


class EngineClosed(EngineError):
    """The engine has been closed, or belongs to the parent of this process."""
