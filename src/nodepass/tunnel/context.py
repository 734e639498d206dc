"""What every part of one running tunnel is given instead of the tunnel itself.

A frozen value, made when the tunnel starts: no part holds its `Server` or `Client`.
"""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from dataclasses import dataclass

from nodepass.config.environment import Settings
from nodepass.config.url import Config
from nodepass.engine.relays import Relays
from nodepass.observe.log import Log
from nodepass.observe.stats import Counters

from .open_relays import OpenRelays

Spawn = Callable[[Coroutine[object, object, None], str], None]
"""Runs a task until the tunnel ends; the text says, in a log line, what it was doing."""


@dataclass(frozen=True, slots=True)
class Context:
    """What the parts of one tunnel share."""

    config: Config
    log: Log
    counters: Counters
    relays: Relays
    open_relays: OpenRelays
    spawn: Spawn

    @property
    def settings(self) -> Settings:
        """Those of the tunnel's URL and environment."""
        return self.config.settings
