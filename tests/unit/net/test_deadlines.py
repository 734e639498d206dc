"""patience: one timer for the deadlines of many."""

from __future__ import annotations

import asyncio

from tests.kit.engines import both
from tests.kit.timing import until

from nodepass.net.deadlines import Deadlines


@both
async def test_tells_of_those_that_are_late_in_their_order() -> None:
    late: list[str] = []
    patience = Deadlines[str](0.05, late.append)
    patience.add("first")
    await asyncio.sleep(0.02)
    patience.add("second")
    patience.add("third")
    assert (len(patience), late) == (3, [])
    await until(lambda: late, 5, "the first")
    assert late == ["first"]
    await until(lambda: len(late) == 3, 5, "the others")
    assert late == ["first", "second", "third"]
    assert len(patience) == 0
    patience.close()


@both
async def test_forgets_what_is_removed() -> None:
    late: list[str] = []
    patience = Deadlines[str](0.02, late.append)
    patience.add("gone")
    patience.add("here")
    patience.remove("gone")
    patience.remove("gone")
    await until(lambda: late, 5, "the other")
    assert late == ["here"]
    patience.add("again")
    await until(lambda: len(late) == 2, 5, "the timer runs anew")
    patience.close()


@both
async def test_may_be_changed_by_whom_it_calls() -> None:
    late: list[str] = []

    def on_late(thing: str) -> None:
        late.append(thing)
        patience.remove("b")
        if len(late) < 3:
            patience.add("d")

    patience = Deadlines[str](0.02, on_late)
    for thing in ("a", "b", "c"):
        patience.add(thing)
    patience.remove("c")
    await until(lambda: len(late) == 3, 5, "a, and d twice")
    assert late == ["a", "d", "d"]
    patience.close()


@both
async def test_goes_on_although_one_raises() -> None:
    told: list[object] = []
    loop = asyncio.get_running_loop()
    loop.set_exception_handler(lambda _, context: told.append(context["exception"]))
    late: list[str] = []

    def on_late(thing: str) -> None:
        late.append(thing)
        if thing == "a":
            raise RuntimeError("on purpose")

    patience = Deadlines[str](0.02, on_late)
    patience.add("a")
    patience.add("b")
    await until(lambda: len(late) == 2, 5, "both")
    patience.add("c")
    await until(lambda: len(late) == 3, 5, "the timer runs anew")
    patience.close()
    assert "on purpose" in str(told)


@both
async def test_close_forgets_all() -> None:
    late: list[str] = []
    patience = Deadlines[str](0.01, late.append)
    patience.add("a")
    patience.close()
    patience.close()
    await asyncio.sleep(0.05)
    assert (late, len(patience)) == ([], 0)


async def test_tells_nobody_before_his_time() -> None:
    loop = asyncio.get_running_loop()
    ends: list[float] = []
    patience = Deadlines[int](0.03, lambda _: ends.append(loop.time()))
    begins = []
    for number in range(5):
        begins.append(loop.time())
        patience.add(number)
        await asyncio.sleep(0.004)
    await until(lambda: len(ends) == 5, 5, "all")
    # The resolution of the loop's clock: it may call so much early.
    assert all(end - begin >= 0.029 for begin, end in zip(begins, ends, strict=True))
    patience.close()
