"""Relays: connections joined by the engine; TLS handshakes and gates, too.

The only importer of the engine. Owns: the choice between the native engine and its slow
twin, handing sockets down, and turning completions into results (`operations` has their shapes).
Called by `server` and `client`; one `Relays` serves every tunnel of a process.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import importlib
import os
import re
import socket
import sys
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING, Final, Protocol, cast

from nodepass.config.environment import Settings
from nodepass.errors import TlsError
from nodepass.observe.log import Log
from nodepass.runtime import fork, threads
from nodepass.tls.advisory import outdated

from .operations import (
    Engine,
    Gate,
    Handshake,
    HandshakeResult,
    Reason,
    Relay,
    RelayResult,
    UdpRelay,
    UdpResult,
)

if TYPE_CHECKING:
    from OpenSSL.SSL import Connection

    from nodepass._fastcopy import EngineStatistics, Newcomer
    from nodepass.net.resolver import SocketAddress

__all__ = [
    "Engine", "Gate", "Handshake", "HandshakeResult", "Reason", "Relay", "RelayResult", "Relays",
    "UdpRelay", "UdpResult",
]  # fmt: skip

CLOSE_GRACE: Final = 5.0
"""Seconds that closing may wait for engine threads: a hundred times what they need."""
MAX_TIMEOUT: Final = 4e6
"""Seconds: the engine counts milliseconds in 32 bits."""
NO_ENGINE: Final = (
    "take a wheel for this platform, or have a C compiler and Python's headers, then "
    "pip install --force-reinstall --no-cache-dir"
    if sys.platform.startswith("linux")
    else "it needs Linux"
)
"""What to do about a missing native engine."""
_RELEASE: Final = re.compile(r"(\d+)\.(\d+)(?:\.(\d+))?")
_GSO_BROKEN: Final = ((7, 0, 0), (7, 1, 5))
"""Kernels, from the first to the one before the second, that spoil headers and checksums of
runs of equally long datagrams: Linux commit b10b446 until 78effd8."""


ENDS_A_TURN: Final = 256
"""Ends that are handed out in one turn of the loop: some 5 ms, with what follows from them."""
NEWCOMERS_A_TURN: Final = 64
"""The same of UDP sources that wait for a link."""


class _Crew:
    """One engine and what runs on it."""

    def __init__(self, engine: Engine, newcomer: type[Newcomer]) -> None:
        self._loop = asyncio.get_running_loop()
        self.engine = engine
        self._newcomer = newcomer
        self._forks = fork.count()
        self.open: dict[int, Relay | Handshake | UdpRelay | Gate] = {}
        self._ends: deque[Relay | Handshake | UdpRelay | Gate] = deque()
        self._newcomers: deque[Newcomer] = deque()
        """News that the engine has told and nobody has heard yet."""
        self._again: asyncio.Handle | None = None
        self._loop.add_reader(engine.fileno(), self.drain)
        fork.own(self)

    def disown(self) -> list[int]:
        """Give up, in a forked child, what only the parent's engine could end."""
        works = [*self.open.values(), *self._ends]
        self.open.clear()
        self._ends.clear()
        self._newcomers.clear()
        for work in works:
            work.result.cancel()
        return []

    def drain(self, *, takes_all: bool = False, is_last: bool = False) -> None:
        """Hand out what the engine has to tell, as much as a turn of the loop bears.

        Args:
            takes_all: hand out all ends, since somebody needs the room that they make.
            is_last: the same, and nobody who is new is met any more.
        """
        if self._forks != fork.count():
            return  # a forked child: the news are the parent's
        for report in self.engine.poll():
            if isinstance(report, self._newcomer):
                self._newcomers.append(report)
                continue
            work = self.open.pop(report[0], None)
            if work is not None:
                work.ending = report  # type: ignore[assignment]  # the token is of its kind
                self._ends.append(work)
        left = len(self._ends) if is_last or takes_all else ENDS_A_TURN
        if is_last:
            self._newcomers.clear()
        elif len(self._ends) > left or self._newcomers:
            self._go_on_soon()
        while self._ends and left:
            left -= 1
            self._ends.popleft().finish()
        self._meet()  # behind ends: each of them may have made room

    def _meet(self) -> None:
        for _ in range(min(NEWCOMERS_A_TURN, len(self._newcomers))):
            newcomer = self._newcomers.popleft()
            gate = self.open.get(newcomer.gate)
            if isinstance(gate, Gate):
                gate.meet(newcomer)

    def _go_on_soon(self) -> None:
        if self._again is None:
            self._again = self._loop.call_soon(self._go_on)

    def _go_on(self) -> None:
        self._again = None
        self.drain()

    def leave_loop(self) -> None:
        self._loop.remove_reader(self.engine.fileno())
        if self._again is not None:
            self._again.cancel()
            self._again = None

    def forget(self) -> None:
        """Let go of what the engine did not end in time."""
        self.drain(is_last=True)
        for work in self.open.values():
            work.result.cancel()
        self.open.clear()


class Relays:
    """The engine of this process, and every relay and TLS handshake that runs on it.

    Args:
        settings: which engine, how many threads, whether splice may be used.

    Must be made in the loop that uses it, and closed.
    """

    def __init__(self, settings: Settings) -> None:
        self._loop = asyncio.get_running_loop()
        self._settings = settings
        self.kind, self._module = _choose(settings.engine)
        """"native" or "python"."""
        self._crew = self._hire(self._module)
        self._gso = settings.udp_gso and _may_use_gso()
        self._tls_module: _Module | None = None
        self._tls_crew: _Crew | None = None
        self._is_closed = False
        self._forks = fork.count()
        fork.shield(self._loop)

    def __len__(self) -> int:
        works = [work for crew in self._crews() for work in crew.open.values()]
        return sum(1 for work in works if not isinstance(work, Gate))

    def __repr__(self) -> str:
        return f"<Relays {self.kind} open={len(self)}>"

    def join(
        self,
        a: socket.socket,
        b: socket.socket,
        *,
        tls_a: Connection | None = None,
        tls_b: Connection | None = None,
        head_a: bytes = b"",
        head_b: bytes = b"",
    ) -> Relay:
        """Join two connections; both belong to the engine from here on.

        Args:
            a: connected, non-blocking, known to no task, transport or watch.
            b: the same.
            tls_a: TLS of a, its handshake done; None = a carries plain bytes.
            tls_b: TLS of b.
            head_a: plaintext already read from a, owed to b first.
            head_b: plaintext already read from b, owed to a first.

        Raises:
            EngineError: the engine is full or closed; both sockets are still the caller's.
        """
        crew = self._crew if tls_a is None and tls_b is None else self._tls()
        token = crew.engine.relay(
            a.fileno(),
            b.fileno(),
            tls_a=tls_a,
            tls_b=tls_b,
            head_a=head_a,
            head_b=head_b,
            idle=self._settings.tcp_idle_timeout,
        )
        return self._begin(crew, token, a, b)

    def connect(
        self,
        link: socket.socket,
        sock: socket.socket,
        address: SocketAddress | None,
        *,
        tls: Connection | None = None,
        head: bytes = b"",
        timeout: float,
    ) -> Relay:
        """Connect a socket and join a link with it; both belong to the engine from here on.

        Args:
            link: connected, non-blocking, known to no task, transport or watch.
            sock: not connected, otherwise the same.
            address: where it is to be connected, no name; None = its connect has begun.
            tls: TLS of the link, its handshake done.
            head: plaintext already read from the link.
            timeout: seconds that the connect may take; no kernel tries for MAX_TIMEOUT.

        Returns:
            The relay. Its result is UNMET where no connection came about.

        Raises:
            EngineError: the engine is full or closed; both sockets are still the caller's.
        """
        crew = self._crew if tls is None else self._tls()
        token = crew.engine.dial(
            link.fileno(),
            sock.fileno(),
            address,
            tls=tls,
            head=head,
            timeout=min(timeout, MAX_TIMEOUT),
            idle=self._settings.tcp_idle_timeout,
        )
        return self._begin(crew, token, link, sock)

    def _begin(self, crew: _Crew, token: int, a: socket.socket, b: socket.socket) -> Relay:
        a.detach()
        b.detach()
        relay = Relay(crew.engine, token, self._loop.create_future())
        crew.open[token] = relay
        return relay

    def shake(self, sock: socket.socket, connection: Connection) -> Handshake:
        """Begin a TLS handshake; socket and connection are lent until its result is there.

        Args:
            sock: connected, non-blocking, known to no task, transport or watch.
            connection: on memory BIOs, in accept or connect state.

        Raises:
            EngineError: the engine is full or closed; nothing has been lent.
        """
        crew = self._tls()
        token = crew.engine.handshake(sock.fileno(), connection)
        handshake = Handshake(crew.engine, token, self._loop.create_future(), connection)
        crew.open[token] = handshake
        return handshake

    async def secure(self, sock: socket.socket, connection: Connection) -> HandshakeResult:
        """Do a TLS handshake; cancelled, it ends when socket and connection are back.

        Raises:
            EngineError: as `shake`.
        """
        handshake = self.shake(sock, connection)
        try:
            return await asyncio.shield(handshake.result)
        except asyncio.CancelledError:
            handshake.abort()
            while not handshake.result.done() and self._forks == fork.count():
                # An abort takes one turn of the engine; the number must not be reused before.
                with contextlib.suppress(asyncio.CancelledError):
                    await asyncio.wait({handshake.result})
            raise

    def serve(
        self,
        sock: socket.socket,
        on_newcomer: Callable[[Gate, Newcomer], None],
        *,
        has_tls: bool,
    ) -> Gate:
        """Open a gate on a bound UDP socket, which is the engine's from here on.

        Args:
            sock: non-blocking, known to no task or transport.
            on_newcomer: called with each source that waits for a link.
            has_tls: whether its links speak TLS.

        Returns:
            The gate; its result resolves when it is closed.

        Raises:
            EngineError: the engine is full or closed; the socket is still the caller's.
        """
        crew = self._tls() if has_tls else self._crew
        token = crew.engine.udp_serve(
            sock.fileno(), datagram=self._settings.udp_data_buf_size, gso=self._gso
        )
        sock.detach()
        gate = Gate(crew.engine, token, self._loop.create_future(), on_newcomer)
        crew.open[token] = gate
        return gate

    def bind(
        self,
        gate: Gate,
        newcomer: Newcomer,
        link: socket.socket,
        *,
        tls: Connection | None = None,
        head: bytes = b"",
        idle: float,
        is_raw: bool = False,
    ) -> UdpRelay:
        """Join a source that waits at a gate with a link; that is the engine's from here on.

        Args:
            link: connected, non-blocking, known to no task, transport or watch.
            tls: TLS of the link, its handshake done.
            head: plaintext already read from the link.
            idle: seconds of silence that end it.
            is_raw: seed dialect: one datagram, one answer, no frames.

        Returns:
            The relay; its result resolves when it has ended.

        Raises:
            EngineError: nobody waits any more, or the engine is full or closed; the link is
                still the caller's.
        """
        crew = next(crew for crew in self._crews() if crew.engine is gate.engine)
        token = crew.engine.udp_bind(
            newcomer.token, link.fileno(), tls=tls, head=head, idle=idle, raw=is_raw
        )
        link.detach()
        return self._begin_udp(crew, token)

    def dial(
        self,
        link: socket.socket,
        target: socket.socket,
        *,
        tls: Connection | None = None,
        head: bytes = b"",
        idle: float,
        is_raw: bool = False,
    ) -> UdpRelay:
        """Join a link with a connected UDP socket; both are the engine's from here on.

        Args, Returns, Raises: as `bind`.
        """
        crew = self._crew if tls is None else self._tls()
        token = crew.engine.udp_dial(
            link.fileno(),
            target.fileno(),
            tls=tls,
            head=head,
            datagram=self._settings.udp_data_buf_size,
            idle=idle,
            raw=is_raw,
            gso=self._gso,
        )
        link.detach()
        target.detach()
        return self._begin_udp(crew, token)

    def _begin_udp(self, crew: _Crew, token: int) -> UdpRelay:
        relay = UdpRelay(crew.engine, token, self._loop.create_future())
        crew.open[token] = relay
        return relay

    def drain(self) -> None:
        """Take note of what has ended by now, without waiting for the loop to come to it."""
        for crew in self._crews():
            crew.drain(takes_all=True)

    def load_tls(self) -> None:
        """Load what TLS needs; slow the first time (0.1 s), so not within a running loop.

        May be called from any thread.
        """
        if self._tls_module is not None:
            return
        for library in outdated():
            Log("relay").warn(
                "a library has known holes; pip install --upgrade nodepass cryptography pyOpenSSL",
                library=library,
            )
        trouble = self._module.tls_trouble()
        if trouble is None:
            self._tls_module = self._module
            return
        twin = _twin()
        hopeless = twin.tls_trouble()
        if hopeless is not None:
            raise TlsError(f"TLS cannot be used here: {hopeless}")
        Log("relay").warn(
            "TLS cannot run on the native engine; it runs on the slow Python engine instead",
            cause=trouble,
        )
        self._tls_module = twin

    @property
    def alpn_selector(self) -> int | None:
        """Address of the C function that picks our ALPN name; None = let Python do it."""
        self.load_tls()
        assert self._tls_module is not None
        return self._tls_module.alpn_selector()

    def statistics(self) -> EngineStatistics:
        """Return the engine's own figures."""
        return self._crew.engine.statistics()

    async def close(self, deadline: float = CLOSE_GRACE) -> bool:
        """Abort what is open and stop the engine; idempotent.

        Args:
            deadline: seconds that its threads may take to end.

        Returns:
            False if a thread did not end in time and was left alone.
        """
        if self._is_closed:
            return True
        self._is_closed = True
        if self._forks != fork.count():
            return True  # threads and descriptors are those of the parent
        is_joined = True
        for crew in self._crews():
            crew.leave_loop()
            if crew is self._crew and self.kind == "native":
                # Joining threads blocks for a moment; the twin has none and lives on this loop.
                is_joined = await threads.run(functools.partial(crew.engine.close, deadline))
            else:
                crew.engine.close(deadline)
            crew.forget()
        await asyncio.sleep(0)  # whoever has lent a socket hears that it is back
        return is_joined

    def _hire(self, module: _Module) -> _Crew:
        engine = module.Engine(self._settings.threads, splice=self._settings.splice)
        return _Crew(engine, module.Newcomer)

    def _tls(self) -> _Crew:
        if self._tls_crew is None:
            self.load_tls()
            assert self._tls_module is not None
            is_same = self._tls_module is self._module
            self._tls_crew = self._crew if is_same else self._hire(self._tls_module)
        return self._tls_crew

    def _crews(self) -> list[_Crew]:
        if self._tls_crew is None or self._tls_crew is self._crew:
            return [self._crew]
        return [self._crew, self._tls_crew]


def _may_use_gso() -> bool:
    release = os.uname().release if hasattr(os, "uname") else ""
    found = _RELEASE.match(release)
    if found is None or not _GSO_BROKEN[0] <= tuple(map(int, found.groups("0"))) < _GSO_BROKEN[1]:
        return True
    Log("relay").warn(
        "this kernel garbles datagrams that it cuts itself; NODEPASS_UDP_GSO=1 is not followed",
        kernel=release,
    )
    return False


class _Module(Protocol):
    Engine: Callable[..., Engine]
    Newcomer: type[Newcomer]

    def tls_trouble(self) -> str | None: ...
    def alpn_selector(self) -> int | None: ...


def _choose(wish: str) -> tuple[str, _Module]:
    if wish == "native":
        try:
            native = importlib.import_module("nodepass._fastcopy")
            twin = importlib.import_module("nodepass.engine.twin.engine")
            if native.ABI != twin.ABI:
                raise ImportError("it was built from another release")
            return "native", native
        except ModuleNotFoundError:
            Log("relay").warn(
                "the native engine cannot be loaded; the slow Python engine runs instead",
                cause=f"none was installed: {NO_ENGINE}",
            )
        except ImportError as exc:
            Log("relay").warn(
                "the native engine cannot be loaded; the slow Python engine runs instead",
                cause=str(exc),
            )
    else:
        Log("relay").warn("the slow Python engine runs, as NODEPASS_ENGINE=python asks")
    return "python", _twin()


def _twin() -> _Module:
    return cast(_Module, importlib.import_module("nodepass.engine.twin.engine"))
