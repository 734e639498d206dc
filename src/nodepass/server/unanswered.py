"""Launches of seed links that nobody has answered yet.

Owns: the doubt whether a launch was understood, until the link says something. The seed dialect
has no word for a launch that failed: a Go client that does not know the link forgets it, and the
visitor would wait on a link that nobody holds. Called by `launches`.

    launched ──a byte, an end──> no doubt
        └── none in REPEAT_AFTER ──> launched again ──none in GIVE_UP_AFTER──> reset, counted, told

To launch a link once more is harmless: a client takes a link out of its table as it joins it, and
passes over what is not there. A link that is joined may have good reason to be silent, for its
target waits for more or has nothing to say; so visitors are reset only where the client has not
replaced the link, as it does with every link that it takes out.
"""

from __future__ import annotations

from typing import Final

from nodepass.engine.relays import Relay, UdpRelay
from nodepass.net.deadlines import Deadlines
from nodepass.observe.log import Log
from nodepass.observe.stats import Counters
from nodepass.protocol.messages import Kind

from .connected_client import ConnectedClient

REPEAT_AFTER: Final = 3.0
"""Seconds: longer than most answers take, and short enough for somebody who waits."""
GIVE_UP_AFTER: Final = 7.0
"""Seconds more: twice what a client takes to dial a target that is there."""


class _Launch:
    """One launch that has had no answer."""

    __slots__ = ("brought", "client", "kind", "name", "relay")

    def __init__(
        self, relay: Relay | UdpRelay, client: ConnectedClient, kind: Kind, name: str
    ) -> None:
        self.relay = relay
        self.client = client
        self.kind = kind
        self.name = name
        self.brought = client.brought
        """Links that the client had brought by then."""

    @property
    def is_silent(self) -> bool:
        return not self.relay.result.done() and not self.relay.live()[1]


class UnansweredLaunches:
    """Every launch of the seed client that may not have been understood."""

    def __init__(self, log: Log, counters: Counters) -> None:
        self._log = log
        self._counters = counters
        self._launches: dict[Relay | UdpRelay, _Launch] = {}
        self._fresh = Deadlines[_Launch](REPEAT_AFTER, self._repeat)
        self._repeated = Deadlines[_Launch](GIVE_UP_AFTER, self._give_up)

    def __len__(self) -> int:
        return len(self._launches)

    def begin(
        self, relay: Relay | UdpRelay, client: ConnectedClient, kind: Kind, name: str
    ) -> None:
        """Take note that a link has been launched."""
        launch = self._launches[relay] = _Launch(relay, client, kind, name)
        self._fresh.add(launch)

    def end(self, relay: Relay | UdpRelay) -> None:
        """Forget a relay that has ended; idempotent."""
        launch = self._launches.pop(relay, None)
        if launch is not None:
            self._fresh.remove(launch)
            self._repeated.remove(launch)

    def close(self) -> None:
        """Forget all; idempotent."""
        self._launches.clear()
        self._fresh.close()
        self._repeated.close()

    def _repeat(self, launch: _Launch) -> None:
        if not launch.is_silent:
            self.end(launch.relay)
            return
        client = launch.client
        if not client.session.is_open:  # its relays go on, and nobody can be asked
            self.end(launch.relay)
            return
        self._log.debug("no sign of life on a link; it is launched again", link=launch.name)
        client.session.launch(launch.kind, launch.name, "")
        if launch.kind is Kind.TCP:  # datagrams have a limit of their own
            self._repeated.add(launch)
        else:
            self.end(launch.relay)

    def _give_up(self, launch: _Launch) -> None:
        client = launch.client
        if launch.is_silent and client.brought == launch.brought:
            self._counters.launches_failed += 1
            self._counters.visitors_refused += 1
            self._log.repeated(
                "warn",
                f"silence {client.name}",
                "a launch was not understood; its visitor is reset",
                client=client.name,
                link=launch.name,
            )
            launch.relay.abort()
        self.end(launch.relay)
