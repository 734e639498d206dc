"""Names to addresses, afresh at every call, in threads that nobody has to wait for.

Owns: the lookups under way. A resolver whose servers are gone holds its thread for many
seconds, and both asyncio and uvloop wait for their own lookup threads before a process may
end; ours are daemons, so a stop during a network outage stays a matter of milliseconds.
Called by `tcp`.
"""

from __future__ import annotations

import asyncio
import socket
from functools import partial
from typing import cast

from nodepass.config.hostname import encode
from nodepass.errors import TOO_FEW_THREADS
from nodepass.runtime import threads

SocketAddress = tuple[str, int] | tuple[str, int, int, int]
Candidate = tuple[int, SocketAddress]
"""Address family, and what a socket of it connects or binds to."""

_Key = tuple[asyncio.AbstractEventLoop, str, int, int]
_under_way: dict[_Key, asyncio.Future[list[Candidate]]] = {}
"""At most one lookup for each question: so many visitors of one name cost one thread."""


async def resolve(host: str, port: int, flags: int = 0) -> list[Candidate]:
    """Look a name up; who asks while the same lookup is under way shares its answer.

    Args:
        host: name or address.
        flags: AI_* of getaddrinfo(3).

    Returns:
        TCP addresses in the resolver's order, each once; at least one.

    Raises:
        socket.gaierror: the name has no address, or nobody could be asked.
    """
    if _is_address(host):
        return _ask(host, port, flags | socket.AI_NUMERICHOST)
    loop = asyncio.get_running_loop()
    key = (loop, host, port, flags)
    answer = _under_way.get(key)
    if answer is None:
        answer = _under_way[key] = loop.create_future()
        answer.add_done_callback(lambda done: done.cancelled() or done.exception())
        if not threads.start(partial(_look_up, key, answer), "nodepass-resolver"):
            # Not here instead: a name server that is gone would hold everybody up for long.
            del _under_way[key]
            raise socket.gaierror(socket.EAI_AGAIN, TOO_FEW_THREADS)
    return await asyncio.shield(answer)


def _is_address(host: str) -> bool:
    """Tell whether no name server is needed: then no thread is, either."""
    host, _, _zone = host.partition("%")
    for family in (socket.AF_INET, socket.AF_INET6):
        try:
            socket.inet_pton(family, host)
        except (OSError, ValueError):
            continue
        return True
    return False


def _ask(host: str, port: int, flags: int) -> list[Candidate]:
    name = encode(host)  # ASCII; of other letters Python would make IDNA 2003
    found = socket.getaddrinfo(name, port, type=socket.SOCK_STREAM, flags=flags)
    # dict: a hosts file may list one address twice; cast: typeshed knows builds without IPv6
    return list(dict.fromkeys((int(f), cast(SocketAddress, a)) for f, _, _, _, a in found))


def _look_up(key: _Key, answer: asyncio.Future[list[Candidate]]) -> None:
    """Runs in a thread of its own."""
    loop, host, port, flags = key
    try:
        result: list[Candidate] | OSError = _ask(host, port, flags)
    except ValueError:  # from `encode`, or Python has met a label that is too long
        result = socket.gaierror(socket.EAI_NONAME, "not a name")
    except OSError as exc:
        result = exc
    try:
        loop.call_soon_threadsafe(_tell, key, answer, result)
    except RuntimeError:  # the loop has been closed; nobody waits any more
        _under_way.pop(key, None)


def _tell(
    key: _Key, answer: asyncio.Future[list[Candidate]], result: list[Candidate] | OSError
) -> None:
    _under_way.pop(key, None)
    if answer.done():
        return
    if isinstance(result, OSError):
        answer.set_exception(result)
    else:
        answer.set_result(result)


def literal(host: str, port: int) -> Candidate | None:
    """Return how to dial a host, None if it is a name and has to be resolved."""
    host, _, zone = host.partition("%")
    if zone:
        return _scoped(host, port, zone)
    for family in (socket.AF_INET, socket.AF_INET6):
        try:
            socket.inet_pton(family, host)
        except OSError:
            continue
        return family, (host, port)
    return None


def _scoped(host: str, port: int, zone: str) -> Candidate | None:
    try:
        socket.inet_pton(socket.AF_INET6, host)
        return socket.AF_INET6, (host, port, 0, socket.if_nametoindex(zone))
    except OSError:
        return None
