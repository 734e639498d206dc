"""errors: the tree of the module's docstring, and what each error carries and says."""

from __future__ import annotations

import errno
import inspect
import os
import pickle

import pytest

from nodepass import errors

TREE: dict[str, tuple[str, ...]] = {
    "NodePassError": ("Exception",),
    "ConfigError": ("NodePassError", "ValueError"),
    "WireError": ("NodePassError",),
    "LocalWireError": ("WireError", "ValueError"),
    "PeerWireError": ("WireError",),
    "TunnelError": ("NodePassError",),
    "AuthError": ("TunnelError",),
    "TlsError": ("TunnelError",),
    "PoolError": ("NodePassError",),
    "PoolTimeout": ("PoolError", "TimeoutError"),
    "PoolClosed": ("PoolError",),
    "ListenError": ("NodePassError", "OSError"),
    "DialError": ("NodePassError", "OSError"),
    "EngineError": ("NodePassError", "OSError"),
    "EngineClosed": ("EngineError",),
}


def test_the_tree() -> None:
    classes = dict(inspect.getmembers(errors, inspect.isclass))
    assert {name: tuple(b.__name__ for b in c.__bases__) for name, c in classes.items()} == TREE


def test_the_docstring_draws_every_error() -> None:
    drawn = {
        line.strip("├│└─ ").split("(")[0].split(" ")[0]
        for line in (errors.__doc__ or "").splitlines()
    }
    assert set(TREE) <= drawn


def test_config_error() -> None:
    error = errors.ConfigError("log", "is loud")
    assert (error.option, error.message, str(error)) == ("log", "is loud", "log: is loud")


def test_tunnel_error() -> None:
    assert errors.TunnelError("refused", reason="auth").reason == "auth"
    assert errors.AuthError("proof").reason == ""


def test_listen_error() -> None:
    error = errors.ListenError("127.0.0.1:1", errno.EADDRINUSE)
    assert str(error) == "cannot listen on 127.0.0.1:1: address already in use"
    assert (error.errno, error.address) == (errno.EADDRINUSE, "127.0.0.1:1")
    assert (
        str(errors.ListenError("x:1", 0, "no such name")) == "cannot listen on x:1: no such name"
    )


def test_dial_error() -> None:
    error = errors.DialError("h:1", errno.ECONNREFUSED, 2)
    assert str(error) == "cannot reach h:1: connection refused"
    assert (error.errno, error.address, error.attempts) == (errno.ECONNREFUSED, "h:1", 2)
    assert str(errors.DialError("h:1", 0, 0, "no such name")) == "cannot reach h:1: no such name"


@pytest.mark.parametrize("kind", [errors.EngineError, errors.EngineClosed])
def test_engine_error(kind: type[errors.EngineError]) -> None:
    error = kind("relay", errno.EBADF)
    assert str(error) == f"engine relay: {os.strerror(errno.EBADF)}"
    assert (error.errno, error.operation) == (errno.EBADF, "relay")


def test_errors_without_arguments_of_their_own_travel() -> None:
    error = pickle.loads(pickle.dumps(errors.PoolTimeout("no link")))
    assert isinstance(error, TimeoutError)
