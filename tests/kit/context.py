"""A context for parts that are tested without their tunnel."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine

from nodepass.config.environment import Settings
from nodepass.config.url import Config
from nodepass.engine.relays import Relays
from nodepass.observe.log import Log
from nodepass.observe.stats import Counters
from nodepass.tunnel.context import Context
from nodepass.tunnel.open_relays import OpenRelays


def make_context(
    relays: Relays,
    url: str = "server://127.0.0.1:1/127.0.0.1:2",
    *,
    log: Log | None = None,
    settings: Settings | None = None,
) -> Context:
    """Make a context; what is spawned runs as a task of the loop."""
    config = Config.parse(url, {}, settings or Settings(threads=1))
    log = log or Log("part", "none")
    counters = Counters()
    tasks: set[asyncio.Task[None]] = set()

    def spawn(work: Coroutine[object, object, None], _what: str) -> None:
        task = asyncio.ensure_future(work)
        tasks.add(task)
        task.add_done_callback(tasks.discard)

    return Context(
        config, log, counters, relays, OpenRelays(config.settings, log, counters), spawn
    )
