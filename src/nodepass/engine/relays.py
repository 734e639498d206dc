"""Relays: connections joined by the engine; TLS handshakes and gates, too.

Owns: handing sockets down, and the engines that run (`choice` says which, `running` hears them,
`operations` has the shapes of results). Called by `server` and `client`; one `Relays` serves
every tunnel of a process.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import socket
from collections.abc import Callable
from typing import TYPE_CHECKING, Final

from nodepass.config.environment import Settings
from nodepass.errors import TlsError
from nodepass.observe.log import Log
from nodepass.runtime import fork, threads
from nodepass.tls.advisory import outdated

from .choice import EngineModule, choose, load_twin, may_use_gso
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
from .running import RunningEngine
from .types import EngineStatistics, FlowOptions, Newcomer

if TYPE_CHECKING:
    from OpenSSL.SSL import Connection

    from nodepass.net.resolver import SocketAddress

__all__ = [
    "Engine", "Gate", "Handshake", "HandshakeResult", "Reason", "Relay", "RelayResult", "Relays",
    "UdpRelay", "UdpResult",
]  # fmt: skip

CLOSE_GRACE: Final = 5.0
"""Seconds that closing may wait for engine threads: a hundred times what they need."""
MAX_TIMEOUT: Final = 4e6
"""Seconds: the engine counts milliseconds in 32 bits."""


class Relays:
    """The engine of this process, and every relay and TLS handshake that runs on it.

    Args:
        settings: which engine, how many threads, whether splice may be used.

    Must be made in the loop that uses it, and closed.
    """

    def __init__(self, settings: Settings) -> None:
        self._loop = asyncio.get_running_loop()
        self._settings = settings
        self.kind, self._module = choose(settings.engine)
        """"native" or "python"."""
        self._running = self._start(self._module)
        self._tcp_options = FlowOptions(idle=settings.tcp_idle_timeout)
        self._last_dial = self._tcp_options
        self._udp_options = FlowOptions(
            datagram=settings.udp_data_buf_size, gso=settings.udp_gso and may_use_gso()
        )
        self._tls_module: EngineModule | None = None
        self._tls_running: RunningEngine | None = None
        self._is_closed = False
        self._forks = fork.count()
        fork.shield(self._loop)

    def __len__(self) -> int:
        works = [work for running in self._all_running() for work in running.open.values()]
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
        running = self._running if tls_a is None and tls_b is None else self._tls()
        token = running.engine.relay(
            a.fileno(),
            b.fileno(),
            tls_a=tls_a,
            tls_b=tls_b,
            head_a=head_a,
            head_b=head_b,
            options=self._tcp_options,
        )
        return self._begin(running, token, a, b)

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
        running = self._running if tls is None else self._tls()
        token = running.engine.dial(
            link.fileno(),
            sock.fileno(),
            address,
            tls=tls,
            head=head,
            options=self._dial_options(timeout),
        )
        return self._begin(running, token, link, sock)

    def _dial_options(self, timeout: float) -> FlowOptions:
        if timeout != self._last_dial.timeout:  # it is always the same, and so is the value then
            self._last_dial = self._tcp_options._replace(timeout=min(timeout, MAX_TIMEOUT))
        return self._last_dial

    def _begin(
        self, running: RunningEngine, token: int, a: socket.socket, b: socket.socket
    ) -> Relay:
        a.detach()
        b.detach()
        relay = Relay(running.engine, token, self._loop.create_future())
        running.open[token] = relay
        return relay

    def shake(self, sock: socket.socket, connection: Connection) -> Handshake:
        """Begin a TLS handshake; socket and connection are lent until its result is there.

        Args:
            sock: connected, non-blocking, known to no task, transport or watch.
            connection: on memory BIOs, in accept or connect state.

        Raises:
            EngineError: the engine is full or closed; nothing has been lent.
        """
        running = self._tls()
        token = running.engine.handshake(sock.fileno(), connection)
        handshake = Handshake(running.engine, token, self._loop.create_future(), connection)
        running.open[token] = handshake
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
        running = self._tls() if has_tls else self._running
        token = running.engine.udp_serve(sock.fileno(), options=self._udp_options)
        sock.detach()
        gate = Gate(running.engine, token, self._loop.create_future(), on_newcomer)
        running.open[token] = gate
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
        running = next(running for running in self._all_running() if running.engine is gate.engine)
        token = running.engine.udp_bind(
            newcomer.token,
            link.fileno(),
            tls=tls,
            head=head,
            options=self._udp_options._replace(idle=idle, raw=is_raw),
        )
        link.detach()
        return self._begin_udp(running, token)

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
        running = self._running if tls is None else self._tls()
        token = running.engine.udp_dial(
            link.fileno(),
            target.fileno(),
            tls=tls,
            head=head,
            options=self._udp_options._replace(idle=idle, raw=is_raw),
        )
        link.detach()
        target.detach()
        return self._begin_udp(running, token)

    def _begin_udp(self, running: RunningEngine, token: int) -> UdpRelay:
        relay = UdpRelay(running.engine, token, self._loop.create_future())
        running.open[token] = relay
        return relay

    def drain(self) -> None:
        """Take note of what has ended by now, without waiting for the loop to come to it."""
        for running in self._all_running():
            running.drain(takes_all=True)

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
        twin = load_twin()
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
        return self._running.engine.statistics()

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
        for running in self._all_running():
            running.leave_loop()
            if running is self._running and self.kind == "native":
                # Joining threads blocks for a moment; the twin has none and lives on this loop.
                is_joined = await threads.run(functools.partial(running.engine.close, deadline))
            else:
                running.engine.close(deadline)
            running.forget()
        await asyncio.sleep(0)  # whoever has lent a socket hears that it is back
        return is_joined

    def _start(self, module: EngineModule) -> RunningEngine:
        return RunningEngine(module.Engine(self._settings.threads, splice=self._settings.splice))

    def _tls(self) -> RunningEngine:
        if self._tls_running is None:
            self.load_tls()
            assert self._tls_module is not None
            is_same = self._tls_module is self._module
            self._tls_running = self._running if is_same else self._start(self._tls_module)
        return self._tls_running

    def _all_running(self) -> list[RunningEngine]:
        if self._tls_running is None or self._tls_running is self._running:
            return [self._running]
        return [self._running, self._tls_running]
