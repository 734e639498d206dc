"""What goes into an engine and comes out of it: values that both twins take and make.

Imports nothing: the native engine loads this module when it is loaded itself.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, NamedTuple


class FlowOptions(NamedTuple):
    """What a flow is asked for beside its sockets. Who has no use for an option passes over it."""

    idle: float = 0.0
    """Seconds without a byte, or a datagram, in either direction that end it; 0 = never."""
    timeout: float = 0.0
    """Of dial(): seconds that the connect may take; 0 = as long as the kernel tries."""
    datagram: int = 8192
    """Of gates and dialled UDP relays: longest datagram, 1..65535 bytes; longer ones are
    dropped."""
    raw: bool = False
    """Of UDP relays: the seed dialect. One datagram goes over the link without a frame, and one
    answer comes back."""
    gso: bool = False
    """Of gates and dialled UDP relays: let the kernel cut runs of equal datagrams, if it can."""


PLAIN: Final = FlowOptions()
"""Nothing is asked for."""


class Completion(NamedTuple):
    """How a flow ended."""

    token: int
    """What relay() or handshake() returned."""
    up: int
    """Bytes delivered from a to b; plaintext, also where a side speaks TLS."""
    down: int
    """Bytes delivered from b to a."""
    reason: int
    """One of REASON_*."""
    side: int
    """Who caused it: 0 nobody, 1 a, 2 b."""
    code: int
    """The errno behind a reset; 0 otherwise. EBADMSG: TLS failed. ENODATA: the stream was cut, a
    FIN came without the close_notify that must precede it."""
    detail: int
    """OpenSSL's packed error code behind EBADMSG, 0 if there is none."""


class UdpCounts(NamedTuple):
    """What became of datagrams; "up" is from the visitor towards the target."""

    datagrams_up: int
    """Carried: handed to the kernel, or to a link that takes them."""
    datagrams_down: int
    bytes_up: int
    """Bytes of those datagrams, without frames."""
    bytes_down: int
    too_large: int
    """Dropped: longer than the limit."""
    slow_link: int
    """Dropped: so many waited for room in the link already; or it broke before they were sent."""
    no_link: int
    """Dropped at a gate: no link came in time, too many peers wait, or one was just lost."""
    overrun: int
    """Dropped by the kernel, whose receive buffer was full."""
    unsent: int
    """Dropped: the kernel would not send it (a firewall, no route, no buffers, too long)."""
    refused: int
    """Answers by ICMP that nobody listens at the target; no datagram is counted twice for it."""


class UdpCompletion(NamedTuple):
    """How a gate, a waiting peer or a UDP relay ended."""

    token: int
    """What udp_serve(), udp_bind() or udp_dial() returned, or a Newcomer's."""
    counts: UdpCounts
    """Of a gate: what was dropped before it reached a relay. Of a waiting peer: zeros."""
    reason: int
    """One of REASON_*. FINISHED: the link was closed by the far side, or all is done."""
    side: int
    """Who caused it, as in Completion: 1 visitor or link, 2 link or target."""
    code: int
    """The errno behind a reset; ECONNREFUSED: nobody listens at the target."""
    detail: int
    """OpenSSL's packed error code behind EBADMSG, 0 if there is none."""


class Newcomer(NamedTuple):
    """A source that its gate did not know: it waits for udp_bind(), its datagrams with it."""

    token: int
    gate: int
    """Token of its gate."""
    host: str
    """Numeric address of the source; IPv4 is plain also on a dual-stack socket."""
    port: int


@dataclass(frozen=True, slots=True)
class EngineStatistics:
    """A snapshot of an engine's counters and balances."""

    threads: int
    """Worker threads; 0 in the twin."""
    flows_open: int
    """Admitted and not yet polled."""
    flows_total: int
    """relay() calls that were followed."""
    flows_refused: int
    """Calls that found every flow in use."""
    bytes_up: int
    bytes_down: int
    parked_bytes: int
    """Read and not yet delivered: in buffers, heads and pipes."""
    buffers_in_use: int
    """Buffers and heads that flows hold."""
    pipes_in_use: int
    pipes_pooled: int
    splice_promotions: int
    turns: int
    """How often a flow was looked at."""
    wakeups: int
    """How often a worker came out of its wait."""
    stale_events: int
    """Events and orders that came too late and were dropped."""
    bugs: int
    """Broken invariants; a debug build aborts instead."""
    fds_open: int
    """Sockets and pipe ends the workers hold; their own event descriptors and
    sockets lent for a handshake not counted."""
    tls_in_use: int
    """Connections held by flows and handshakes; until the completion is polled."""
    handshakes: int
    """Handshakes begun."""
    handshakes_failed: int
    """Those that ended with REASON_RESET."""
    gates_open: int
    """Of udp_serve(), and not yet polled."""
    peers_waiting: int
    """UDP peers without a link, or that have lost it a moment ago; and not yet polled."""
    datagrams_up: int
    """Datagrams carried from visitors towards the target."""
    datagrams_down: int
    datagrams_dropped: int
    """Datagrams lost on the way, whatever the cause."""
    datagram_bytes_held: int
    """Bytes of datagrams that wait: for a link, for room in it, or for their second half."""
