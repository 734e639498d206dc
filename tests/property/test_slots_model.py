"""Slots against a model: none is given twice or lost, and TCP and UDP take turns."""

from __future__ import annotations

import asyncio
from collections import deque

from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
)

from nodepass.tunnel.slots import TCP_SHARE, Slot, SlotQueue, Slots


class SlotsMachine(RuleBasedStateMachine):
    """A server's visitors: TCP ones wait in the kernel, behind a listener that may be paused."""

    @initialize(limit=st.integers(1, 20), keeps=st.booleans())
    def begin(self, limit: int, keeps: bool) -> None:
        self.limit = limit
        self.udp_limit = limit - limit // TCP_SHARE if keeps else limit
        self.kernel = self.sources = 0
        """Who waits."""
        self.is_paused = False
        self.open: list[tuple[Slot, bool]] = []
        self.last: str | None = None
        """Who was let in by the last slot that was given back, if both kinds wanted it."""
        self.let_in: list[str] = []
        self.slots = Slots(
            limit,
            keeps_for_tcp=keeps,
            on_full=self._on_full,
            resume_tcp=self._resume_tcp,
            admit_udp=self._admit_udp,
        )

    # ------------------------------------------------- what the server does with slots

    def _on_full(self) -> None:
        if not self.slots.has_room:
            self.is_paused = True

    def _resume_tcp(self) -> bool:
        was_paused, self.is_paused = self.is_paused, False
        self._accept()
        return was_paused

    def _accept(self) -> None:
        while self.kernel and not self.is_paused:
            self.kernel -= 1
            self.let_in.append("tcp")
            self._take(is_udp=False)

    def _admit_udp(self) -> bool:
        if not self.sources:
            return False
        self.sources -= 1
        self.let_in.append("udp")
        self._take(is_udp=True)
        return True

    def _take(self, *, is_udp: bool) -> None:
        self.open.append((Slot(self.slots, is_udp=is_udp), is_udp))

    # ------------------------------------------------------------------------- rules

    @rule(count=st.integers(1, 30))
    def tcp_visitors_come(self, count: int) -> None:
        self.kernel += count
        self._accept()

    @rule(count=st.integers(1, 30))
    def udp_visitors_come(self, count: int) -> None:
        for _ in range(count):
            if self.slots.has_udp_room and not self.sources:
                self._take(is_udp=True)
            else:
                self.sources += 1

    @precondition(lambda self: self.open)
    @rule(data=st.data(), again=st.booleans())
    def leave(self, data: st.DataObject, again: bool) -> None:
        slot, is_udp = self.open.pop(data.draw(st.integers(0, len(self.open) - 1)))
        both = bool(self.kernel and self.sources) and self.slots.udp - is_udp < self.udp_limit
        self.let_in = []
        slot.release()
        if again:
            slot.release()
        if both and self.is_paused:
            assert len(self.let_in) == 1, "a slot is given to one"
            assert self.let_in[0] != self.last, "TCP and UDP by turns"
            (self.last,) = self.let_in
        else:
            self.last = None

    @rule()
    def look_again(self) -> None:
        """As the server does now and then: it was a TCP visitor's turn, and none came."""
        while self.slots.has_udp_room and self._admit_udp():
            pass
        assert not (self.sources and self.slots.has_udp_room)
        self.last = None

    @invariant()
    def books_agree(self) -> None:
        if not hasattr(self, "slots"):
            return
        assert self.slots.taken == len(self.open) <= self.limit
        assert self.slots.udp == sum(is_udp for _, is_udp in self.open) <= self.udp_limit
        assert not (self.kernel and self.slots.has_room), "nobody waits beside a free slot"


TestSlots = SlotsMachine.TestCase


class SlotQueueMachine(RuleBasedStateMachine):
    """A client's launches: first come first served, and who gives up leaves nothing behind."""

    @initialize(limit=st.integers(1, 6))
    def begin(self, limit: int) -> None:
        self.runner = asyncio.Runner()
        self.loop = self.runner.get_loop()
        self.free, self.held = limit, 0
        self.queue = SlotQueue(limit)
        self.waiting: deque[asyncio.Task[None]] = deque()

    def teardown(self) -> None:
        if hasattr(self, "runner"):
            for task in self.waiting:
                task.cancel()
            self._turn()
            self.runner.close()

    def _turn(self) -> None:
        for _ in range(4):
            self.loop.run_until_complete(asyncio.sleep(0))

    def _serve(self) -> None:
        """Let the model give what is free to who waits longest."""
        while self.free and self.waiting:
            task = self.waiting.popleft()
            assert task.done(), "who waits longest is served"
            task.result()
            self.free -= 1
            self.held += 1

    @rule()
    def take_nowait(self) -> None:
        assert self.queue.take_nowait() is (self.free > 0)
        if self.free:
            self.free -= 1
            self.held += 1

    @rule(count=st.integers(1, 4))
    def take(self, count: int) -> None:
        self.waiting += [self.loop.create_task(self.queue.take()) for _ in range(count)]
        self._turn()
        self._serve()

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def give(self, data: st.DataObject) -> None:
        count = data.draw(st.integers(1, self.held))
        for _ in range(count):
            self.queue.give()
        self.held -= count
        self.free += count
        self._turn()
        self._serve()

    @precondition(lambda self: self.waiting)
    @rule(data=st.data(), is_given=st.booleans())
    def give_up(self, data: st.DataObject, is_given: bool) -> None:
        """Cancel one that waits, maybe in the very turn in which a slot comes free."""
        place = data.draw(st.integers(0, len(self.waiting) - 1))
        task = self.waiting[place]
        del self.waiting[place]
        if is_given and self.held:
            self.queue.give()
            self.held -= 1
            self.free += 1
        task.cancel()
        self._turn()
        assert task.cancelled()
        self._serve()

    @invariant()
    def nobody_waits_beside_a_free_slot(self) -> None:
        if hasattr(self, "queue"):
            assert self.queue.is_full is (self.free == 0)
            assert not (self.free and self.waiting)
            assert not any(task.done() for task in self.waiting)


TestSlotQueue = SlotQueueMachine.TestCase
