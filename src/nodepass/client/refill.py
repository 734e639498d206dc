"""The client's side of the pool: dial links in parallel until enough lie ready.

Owns: how many dials are under way, the pause after failures, and the launches that came
before their link. The dial itself is the caller's function. Called by `session`.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from typing import Final

from nodepass.errors import PoolError, PoolTimeout
from nodepass.net import tcp
from nodepass.observe.log import Log
from nodepass.protocol.backoff import Backoff
from nodepass.tunnel.idle_links import IdleLinks, Link
from nodepass.tunnel.pool import has_result

MAX_DIALS: Final = 60
"""Dials under way at once, handshakes included: a server bears 64 from one address. Fills 200
links in half a second at 50 ms."""
MAX_CLAIMS: Final = 2 * MAX_DIALS
"""Launches that wait for their link: it is being dialled, or it will never come."""
QUIET_FAILURES: Final = 3
"""Failed dials in a row that stay at debug level: a server that stops refuses a few."""

TOO_LATE: Final = 256
"""Links remembered whose launch came much too early: more than there are dials under way."""

YOUNG: Final = 1.0
"""Seconds that a link must live idle to count as made: several round trips of any path."""

OnEnd = Callable[[Link | Exception], None]
"""Called once with a link that has been made, or with what was in its way."""
Begin = Callable[[OnEnd], None]


class Refill:
    """Keep as many links idle as are wanted.

    Args:
        idle_links: where fresh links go.
        begin: begins to make one link; calls what it is given with the link, or with what was
            wrong, now or later.
        random: gives a fraction, 0 <= f < 1, for the pauses.
        pause: seconds, ceiling of the pause between failing dials.
    """

    def __init__(
        self,
        idle_links: IdleLinks,
        begin: Begin,
        random: Callable[[], float],
        pause: float,
        log: Log,
    ) -> None:
        self._loop = asyncio.get_running_loop()
        self._idle_links = idle_links
        self._begin = begin
        self._random = random
        self._backoff = Backoff(pause)
        self._log = log
        self._failures = 0
        self._retry: asyncio.TimerHandle | None = None
        self._claims: dict[int | str, asyncio.Future[Link]] = {}
        self._too_late: deque[int | str] = deque(maxlen=TOO_LATE)
        """Links whose launch has been given up: their visitors must not wait on them for ever."""
        self._is_closed = False
        self.dialling = 0
        """Dials under way."""
        self.made = 0
        """Links made since the start."""
        self.wanted = 0
        """How many links should lie ready; set it, then `fill`."""

    def fill(self) -> None:
        """Begin as many dials as links are missing; harmless to call at any time."""
        missing = self.wanted - len(self._idle_links) - self.dialling
        if missing <= 0:
            return
        for _ in range(min(missing, MAX_DIALS - self.dialling)):
            if self._is_closed or self._retry is not None:
                return
            self.dialling += 1
            try:
                self._begin(self._end)
            except Exception as exc:  # noqa: BLE001 - whoever asks for links is not at fault
                self._log.error(
                    "an internal error in dialling a link; please report it", error=exc
                )
                self._end(exc)

    async def claim(self, name: int | str, timeout: float) -> Link:  # noqa: ASYNC109
        """Return the link of this name, waiting for one whose launch came first.

        Raises:
            PoolTimeout: it did not come within `timeout` seconds, or too many wait behind it.
        """
        link = self._idle_links.claim(name)
        if link is not None:
            return link
        if name in self._claims:
            raise PoolTimeout(f"link {name} is asked for twice")
        if len(self._claims) >= MAX_CLAIMS:
            self._give_up(next(iter(self._claims)))
        place: asyncio.Future[Link] = self._loop.create_future()
        self._claims[name] = place
        try:
            async with asyncio.timeout(timeout):
                return await place
        except PoolTimeout:
            raise
        except TimeoutError as exc:
            if has_result(place):
                return place.result()  # it came in the very turn in which the time ran out
            self._too_late.append(name)
            raise PoolTimeout(f"link {name} never came") from exc
        except asyncio.CancelledError:
            if has_result(place):
                tcp.reset(place.result().sock)
            raise
        finally:
            if self._claims.get(name) is place:
                del self._claims[name]

    def _give_up(self, name: int | str) -> None:
        place = self._claims.pop(name)
        self._too_late.append(name)
        if not place.done():
            place.set_exception(PoolTimeout(f"link {name} never came, and too many others wait"))
            place.exception()  # whoever waited may be gone in this very turn

    def close(self) -> None:
        """Dial no more; a link that is made nevertheless is reset."""
        self._is_closed = True
        if self._retry is not None:
            self._retry.cancel()
            self._retry = None
        for place in self._claims.values():
            place.cancel()

    def _end(self, made: Link | Exception) -> None:
        self.dialling -= 1
        if isinstance(made, Link):
            self._give(made)
            self.fill()
        else:
            self._fail(made)

    def note_success(self) -> None:
        """Take it that links work: one was launched, or lived long enough."""
        self._failures = 0
        self._backoff.reset()

    def lose(self, link: Link) -> None:
        """Replace a link that died idle; one that never lived counts as a failed dial.

        Otherwise a far side that drops links as soon as they are made would have us dial
        thousands a second.
        """
        if self._loop.time() - link.since < YOUNG:
            self._fail(PoolError("links die as soon as they are made"))
        else:
            self.note_success()
            self.fill()

    def _give(self, link: Link) -> None:
        if self._is_closed:
            tcp.reset(link.sock)  # a visitor may be on it already: it must see no clean end
            return
        if link.name in self._too_late:
            self._too_late.remove(link.name)
            tcp.reset(link.sock)  # here as well
            return
        self.made += 1
        place = self._claims.pop(link.name, None)
        if place is None:
            self._idle_links.put(link)
        elif not place.done():
            place.set_result(link)
        else:
            tcp.reset(link.sock)  # its launch is given up in this very turn

    def _fail(self, exc: Exception) -> None:
        if self._is_closed:
            return
        self._failures += 1
        if self._failures > QUIET_FAILURES:
            self._log.repeated("warn", "link", "cannot make a link", why=str(exc))
        else:
            self._log.debug("cannot make a link", why=str(exc))
        if self._retry is None:
            pause = self._backoff.next_pause(self._random())
            self._retry = self._loop.call_later(pause, self._try_again)

    def _try_again(self) -> None:
        self._retry = None
        self.fill()
