"""resolver: names afresh, one thread a question, nobody has to wait for it."""

from __future__ import annotations

import asyncio
import errno
import socket
import subprocess
import sys
import threading

import pytest

from nodepass.net.resolver import resolve

LOCAL = (int(socket.AF_INET), ("127.0.0.1", 80))


class Names:
    """A resolver that answers when it is told to, and counts who asks."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, answer: list[object] | OSError) -> None:
        self.asked = 0
        self.may_answer = threading.Event()
        self._answer = answer
        monkeypatch.setattr(socket, "getaddrinfo", self._ask)

    def _ask(self, *_: object, **__: object) -> list[object]:
        self.asked += 1
        assert self.may_answer.wait(10)
        if isinstance(self._answer, OSError):
            raise self._answer
        return self._answer


def entry(address: str) -> tuple[object, ...]:
    return (socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, 80))


async def test_address_needs_no_name_server() -> None:
    assert await resolve("127.0.0.1", 80) == [LOCAL]


async def test_doubles_are_left_out_and_order_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    names = Names(monkeypatch, [entry("127.0.0.2"), entry("127.0.0.1"), entry("127.0.0.2")])
    names.may_answer.set()
    assert [a[1][0] for a in await resolve("x", 80)] == ["127.0.0.2", "127.0.0.1"]


@pytest.mark.parametrize(
    ("name", "asked"),
    [("straße.example", "xn--strae-oqa.example"), ("my_host.local.", "my_host.local.")],
)
async def test_c09_names_are_asked_for_by_idna_2008(
    name: str, asked: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def getaddrinfo(host: str, *_: object, **__: object) -> list[object]:
        assert host == asked
        return [entry("127.0.0.1")]

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    assert await resolve(name, 80) == [LOCAL]


@pytest.mark.parametrize("name", ["☃.example", "a" * 64 + ".example", "ü" * 64])
async def test_c09_what_is_no_name_does_not_resolve(name: str) -> None:
    with pytest.raises(socket.gaierror) as caught:
        await resolve(name, 80)
    assert caught.value.errno == socket.EAI_NONAME


async def test_one_question_under_way_serves_all_who_ask(monkeypatch: pytest.MonkeyPatch) -> None:
    names = Names(monkeypatch, [entry("127.0.0.1")])
    asking = [asyncio.create_task(resolve("x", 80)) for _ in range(50)]
    await asyncio.sleep(0.01)
    names.may_answer.set()
    assert await asyncio.gather(*asking) == [[LOCAL]] * 50
    assert names.asked == 1
    await resolve("x", 80)
    assert names.asked == 2, "every later question is asked afresh"


async def test_who_gives_up_does_not_end_the_question(monkeypatch: pytest.MonkeyPatch) -> None:
    names = Names(monkeypatch, [entry("127.0.0.1")])
    first, second = (asyncio.create_task(resolve("x", 80)) for _ in range(2))
    await asyncio.sleep(0.01)
    first.cancel()
    with pytest.raises(asyncio.CancelledError):
        await first
    names.may_answer.set()
    assert await second == [LOCAL]
    assert names.asked == 1


@pytest.mark.parametrize(
    "fault", [socket.gaierror(socket.EAI_NONAME, "unknown"), OSError(errno.EMFILE, "too many")]
)
async def test_failure_reaches_all_who_ask(
    monkeypatch: pytest.MonkeyPatch, fault: OSError
) -> None:
    names = Names(monkeypatch, fault)
    names.may_answer.set()
    asking = [asyncio.create_task(resolve("x", 80)) for _ in range(3)]
    assert await asyncio.gather(*asking, return_exceptions=True) == [fault] * 3


async def test_what_is_no_name_is_no_crash() -> None:
    with pytest.raises(socket.gaierror):
        await resolve("a" * 300 + ".invalid", 80)


SLOW = """
import asyncio, socket, time
from nodepass.net.resolver import resolve

def getaddrinfo(*_, **__):
    time.sleep(30)

socket.getaddrinfo = getaddrinfo

async def main():
    try:
        await asyncio.wait_for(resolve("x", 80), 0.05)
    except TimeoutError:
        print("gave up")

LOOP
"""


@pytest.mark.parametrize("loop", ["asyncio", "uvloop"])
def test_process_ends_while_a_lookup_hangs(loop: str) -> None:
    if loop == "uvloop":
        pytest.importorskip("uvloop")
    line = f"import {loop}; asyncio.Runner(loop_factory={loop}.new_event_loop).run(main())"
    done = subprocess.run(
        [sys.executable, "-c", SLOW.replace("LOOP", line)],
        capture_output=True,
        text=True,
        timeout=15,
        check=False,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "gave up\n", "")


async def test_limit_on_threads_is_an_answer_and_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    def start(_: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", start)
        with pytest.raises(socket.gaierror, match="too few threads"):
            await resolve("localhost", 80)
    assert await resolve("localhost", 80)


@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
async def test_c12_an_address_needs_no_thread(host: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(threading.Thread, "start", lambda _: pytest.fail("a thread"))
    ((_, address),) = await resolve(host, 80)
    assert address[:2] == (host, 80)
