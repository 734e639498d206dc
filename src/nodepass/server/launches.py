"""Visitors that have got a link, from the launch to the end of their relay.

Owns: what has to be known of each while its relay lasts. Called by `visitors` and `udp_visitors`,
which have joined the visitor with its link.
"""

from __future__ import annotations

import asyncio
import functools

from nodepass.engine.relays import Relay, UdpRelay
from nodepass.protocol.messages import Kind
from nodepass.tunnel.context import Context
from nodepass.tunnel.open_relays import Result
from nodepass.tunnel.pool import announce
from nodepass.tunnel.slots import Slot

from .connected_client import ConnectedClient
from .eviction import Eviction
from .unanswered import UnansweredLaunches


class Launches:
    """Every visitor of one server that has a link.

    Args:
        eviction: knows the TCP visitors, and whom to cut where every place is taken.
    """

    def __init__(self, context: Context, eviction: Eviction) -> None:
        self._loop = asyncio.get_running_loop()
        self._open_relays = context.open_relays
        self._eviction = eviction
        self._unanswered = UnansweredLaunches(context.log, context.counters)

    def begin(
        self,
        relay: Relay | UdpRelay,
        client: ConnectedClient,
        link: int | str,
        visitor: str,
        slot: Slot,
    ) -> None:
        """Tell a client of the visitor that has been joined with a link of it.

        Args:
            link: its name.
            visitor: address, for the client's log.
            slot: the visitor's; given back when the relay has ended.
        """
        if isinstance(relay, Relay):
            self._eviction.join(relay, visitor)
        kind = Kind.UDP if isinstance(relay, UdpRelay) else Kind.TCP
        client.session.launch(kind, link, visitor)
        if isinstance(link, str):
            self._unanswered.begin(relay, client, kind, link)
        now = self._loop.time()
        client.join(link, relay, now)
        if client.demand.count_launch(now):
            announce(client)
        self._open_relays.hold(relay)
        relay.result.add_done_callback(
            functools.partial(self._end, relay, client, link, visitor, slot)
        )

    def close(self) -> None:
        """Doubt no launch any more; idempotent. Relays go on."""
        self._unanswered.close()

    def _end(
        self,
        relay: Relay | UdpRelay,
        client: ConnectedClient,
        link: int | str,
        visitor: str,
        slot: Slot,
        result: Result,
    ) -> None:
        if isinstance(relay, Relay):
            self._eviction.part(relay)
        slot.release()
        client.part(link)
        self._unanswered.end(relay)
        self._open_relays.end(relay, result, visitor=visitor, client=client.name, link=link)
