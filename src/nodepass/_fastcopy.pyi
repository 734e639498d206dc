# ruff: noqa: PYI011, PYI021 -- the defaults and docstrings of a compiled module are read here
"""The native engine: joins two sockets and moves bytes between them without Python."""

from typing import Final, final

from OpenSSL.SSL import Connection

from .engine.types import (
    PLAIN,
    Completion,
    EngineStatistics,
    FlowOptions,
    Newcomer,
    UdpCompletion,
    UdpCounts,
)
from .net.resolver import SocketAddress

ABI: Final[int]
REASON_FINISHED: Final[int]
"""Both directions saw EOF and every byte was handed to the other side's kernel. Of a handshake:
it is done and every byte of it was handed to the kernel."""
REASON_RESET: Final[int]
"""An error or a reset on `side`; the other side was reset, too."""
REASON_ABORTED: Final[int]
"""abort() or close()."""
REASON_IDLE: Final[int]
"""No byte moved for the idle limit; both sides were reset."""
REASON_UNMET: Final[int]
"""Side b of dial() could not be connected (`side` 2), or a died first (1); a was reset."""

def tls_trouble() -> str | None:
    """Say what is missing for TLS here; the first call loads OpenSSL.

    Returns:
        None: TLS flows and handshakes work. Otherwise one clause.
    """

def alpn_selector() -> int | None:
    """Return the address of a C function that chooses a server's ALPN protocol.

    Returns:
        What SSL_CTX_set_alpn_select_cb(3) wants; it chooses b"nodepass/2", and a client that
        does not offer it gets an alert. None in the twin.
    """

@final
class Engine:
    """Native threads that join pairs of sockets and move bytes between them.

    Args:
        threads: worker threads, 1..256.
        flows: how many pairs may be open at once; memory is used only for those that are.
        splice: let the kernel move bulk data without copying it through user space.
        patience: seconds, 1..4000000, of silence after which the far end of a connection counts
            as gone if it leaves something unanswered; see doubt().

    Raises:
        ValueError: an argument is out of range.
        EngineError: no descriptors, threads or memory.
    """

    def __init__(
        self,
        threads: int = 1,
        *,
        flows: int = 65536,
        splice: bool = True,
        patience: float = 50.0,
    ) -> None: ...
    def fileno(self) -> int:
        """Return the descriptor that is readable while completions wait.

        Returns:
            An eventfd for the event loop to watch; it stays the engine's.

        Raises:
            EngineClosed: after close(), or in a forked child.
        """

    def relay(
        self,
        fd_a: int,
        fd_b: int,
        *,
        tls_a: Connection | None = None,
        tls_b: Connection | None = None,
        head_a: bytes = b"",
        head_b: bytes = b"",
        options: FlowOptions = PLAIN,
    ) -> int:
        """Join two connected non-blocking stream sockets.

        Args:
            fd_a: descriptor of one side.
            fd_b: descriptor of the other side.
            tls_a: OpenSSL.SSL.Connection on memory BIOs, its handshake done, if a speaks TLS;
                what it has read already comes first.
            tls_b: the same for b.
            head_a: plaintext already read from a; it reaches b before anything else.
            head_b: plaintext already read from b; it reaches a before anything else.
            options: `idle` counts.

        Returns:
            A token, > 0. Both descriptors and Connections are the engine's from now on.

        Raises:
            EngineError: refused; the caller still owns everything. EOPNOTSUPP: see
                tls_trouble().
            EngineClosed: after close(), or in a forked child.
            ValueError: an option is out of range.

        After: one Completion with this token comes out of poll().
        """

    def dial(
        self,
        fd: int,
        target: int,
        address: SocketAddress | None,
        *,
        tls: Connection | None = None,
        head: bytes = b"",
        options: FlowOptions = PLAIN,
    ) -> int:
        """Connect a socket, and join a connected one with it.

        Args:
            fd: descriptor of side a, a connected non-blocking stream socket.
            target: descriptor of side b, a non-blocking stream socket that is not connected.
            address: where b is to be connected: host and port, for IPv6 also flow label and
                scope. The host is an address. None: its connect has begun already.
            tls: of a, see relay().
            head: plaintext already read from a; it reaches b before anything else.
            options: `timeout` counts, and `idle` for the relay that it becomes.

        Returns:
            A token, > 0. Both descriptors and the Connection are the engine's from now on.

        Raises:
            EngineError: refused; see relay().
            EngineClosed: after close(), or in a forked child.
            ValueError: the address is none, or an option is out of range.

        After: one Completion with this token comes out of poll(). Where no connection came about
            it has REASON_UNMET, side 2 and the errno, ETIMEDOUT when the time was over; or side 1,
            if a has died meanwhile. Side a is reset. Once b is connected all is as with relay().
        """

    def handshake(self, fd: int, tls: Connection) -> int:
        """Drive a TLS handshake on a connected non-blocking stream socket.

        Args:
            fd: descriptor; lent, never closed here.
            tls: OpenSSL.SSL.Connection on memory BIOs, set to accept or to connect, whose
                context has no Python callbacks; bytes may already lie in it.

        Returns:
            A token, > 0. Nobody else touches either until its completion was polled; then
            both are the caller's again.

        Raises:
            EngineError: refused; see relay().
            EngineClosed: after close(), or in a forked child.

        After: one Completion with this token comes out of poll(), with REASON_FINISHED when
            the handshake is done and every byte of it sent; bytes that came behind it may lie
            inside `tls`. There is no deadline: abort() it. REASON_RESET has side 1 and as code
            EBADMSG (TLS failed; our alert has been sent), ENODATA (the peer closed), or the
            errno of the socket.
        """

    def udp_serve(self, fd: int, *, waiting: int = 512, options: FlowOptions = PLAIN) -> int:
        """Open a gate: receive on a bound non-blocking UDP socket.

        Args:
            fd: descriptor; its buffer sizes are the caller's business.
            waiting: how many sources may wait for a link at once, 1..4096.
            options: `datagram` and `gso` count.

        Returns:
            A token, > 0. The descriptor is the engine's from now on.

        Raises:
            EngineError: refused; the caller still owns the descriptor.
            EngineClosed: after close(), or in a forked child.
            ValueError: an option is out of range.

        After: a Newcomer for each source not known yet comes out of poll(). abort() closes the
            gate with all its peers and relays; one UdpCompletion follows for each.
        """
    def udp_shut(self, gate: int) -> None:
        """Let no more sources in; those that a gate knows go on. Unknown tokens are left alone.

        Args:
            gate: what udp_serve() returned.

        Raises:
            EngineClosed: after close(), or in a forked child.
        """
    def udp_relieve(self, gate: int) -> None:
        """End some short exchanges that are over by all appearance, to make room for others.

        Args:
            gate: what udp_serve() returned; unknown tokens are left alone.

        Raises:
            EngineClosed: after close(), or in a forked child.

        After: some have been looked at, by turns, and end with REASON_IDLE: those that have
            been silent for 30 s; of those with one answer, or whose datagrams all came
            within 2 s, also those silent for 1 s since an answer, or for 5 s without one.
        """
    def udp_bind(
        self,
        peer: int,
        fd: int,
        *,
        tls: Connection | None = None,
        head: bytes = b"",
        options: FlowOptions = PLAIN,
    ) -> int:
        """Carry the datagrams of a waiting peer over a link, in frames of docs/protocol.md.

        Args:
            peer: token of its Newcomer.
            fd: descriptor of the link, a connected non-blocking stream socket.
            tls: see relay().
            head: plaintext already read from the link, at most 262144 bytes.
            options: `idle` and `raw` count. Raw: only the oldest waiting datagram goes over the
                link; what comes back until its end, or until `idle` is over, is the one answer.
                If more are waiting, the same Newcomer comes again.

        Returns:
            A token, > 0. The descriptor and the Connection are the engine's from now on.

        Raises:
            EngineError: refused; the caller still owns everything. ENOENT: nobody waits by
                that token.
            EngineClosed: after close(), or in a forked child.
            ValueError: an option is out of range.

        After: a UdpCompletion with this token comes out of poll(); another one with the peer's,
            as soon as it waits no more.
        """
    def udp_dial(
        self,
        fd: int,
        target: int,
        *,
        tls: Connection | None = None,
        head: bytes = b"",
        options: FlowOptions = PLAIN,
    ) -> int:
        """Carry the frames of a link as datagrams of a connected UDP socket, and back.

        Args:
            fd: descriptor of the link, a connected non-blocking stream socket.
            target: descriptor of a connected non-blocking UDP socket.
            tls: see relay().
            head: plaintext already read from the link, at most 262144 bytes.
            options: all but `timeout` count. Raw: what comes over the link is one datagram; the
                first answer of the target goes back, and the link is closed behind it.

        Returns:
            A token, > 0. Both descriptors and the Connection are the engine's from now on.

        Raises:
            EngineError: refused; the caller still owns everything.
            EngineClosed: after close(), or in a forked child.
            ValueError: an option is out of range.

        After: one UdpCompletion with this token comes out of poll(). A target that refuses
            everything for 2 s ends it with REASON_RESET, side 2, ECONNREFUSED.
        """
    def udp_limit(self, token: int, idle: float) -> None:
        """Change the idle limit of a UDP relay; unknown tokens are left alone.

        Args:
            token: what udp_bind() or udp_dial() returned.
            idle: seconds; 0 = never.

        Raises:
            EngineClosed: after close(), or in a forked child.
            ValueError: the idle limit is out of range.
        """
    def udp_retarget(self, token: int, target: int) -> bool:
        """Go on with another UDP socket towards the target of a dialled relay.

        Args:
            token: what udp_dial() returned.
            target: descriptor of a connected non-blocking UDP socket.

        Returns:
            True: the descriptor is the engine's from now on, and the one before is closed soon.
            False: the relay is over, raw or no dialled one; the caller still owns it.

        Raises:
            EngineError: refused; the caller still owns it.
            EngineClosed: after close(), or in a forked child.

        After: datagrams that wait leave by the new socket; answers that the old one has and
            nobody has read are lost.
        """
    def udp_counts(self, token: int) -> UdpCounts | None:
        """Return the running counts of a gate or a UDP relay.

        Args:
            token: what udp_serve(), udp_bind() or udp_dial() returned.

        Returns:
            None once its completion was polled.
        """
    def live(self, token: int) -> tuple[int, int] | None:
        """Return the running byte counts of a flow.

        Args:
            token: what relay() or handshake() returned.

        Returns:
            (up, down): bytes of plaintext delivered a to b and b to a; None once its
            completion was polled.
        """

    def abort(self, token: int) -> None:
        """Reset both sides of a flow, or end a handshake; unknown tokens are left alone.

        Args:
            token: what relay() or handshake() returned.

        After: its completion follows, with REASON_ABORTED unless the flow ended first.
        """

    def doubt(self, token: int, side: int, *, quiet: bool = False) -> None:
        """Take it that the far end of one side may be gone; unknown tokens are left alone.

        Args:
            token: what relay(), dial(), udp_bind() or udp_dial() returned.
            side: 1 = a, 2 = b; of a UDP relay the side of its link.
            quiet: ask it even if nothing that was sent to it waits for an answer.

        Raises:
            EngineClosed: after close(), or in a forked child.
            ValueError: there is no such side.

        After: nothing, if the end gives a sign of life. If instead it leaves what is sent or
            asked unanswered, for a tenth of the patience at least, the flow ends with
            REASON_RESET, ETIMEDOUT; also if something is sent only later.
        """

    def poll(self) -> list[Completion | UdpCompletion | Newcomer]:
        """Collect what has ended, and the sources that gates did not know.

        Returns:
            Every waiting Completion, possibly none; never blocks. Also works after
            close(), for the flows that close() aborted.

        Raises:
            EngineClosed: in a forked child.
        """

    def statistics(self) -> EngineStatistics:
        """Return a snapshot of all counters; also after close().

        Raises:
            EngineClosed: in a forked child.
        """

    def close(self, deadline: float = 5.0) -> bool:
        """Reset every flow and join the threads.

        Args:
            deadline: seconds to wait for the threads.

        Returns:
            True when every thread has been joined (at once if closed before), False when
            the deadline passed first; then close() may be called again.

        After: poll() once more for the completions of the flows that were open. Stop
            watching fileno() before; its number is free afterwards.
        """
