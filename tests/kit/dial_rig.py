"""Targets and visitors for the tests of dial()."""

from __future__ import annotations

import asyncio
import hashlib
import random
import socket
from collections.abc import Callable

import pytest
from tests.kit.engine_rig import (
    Rig,
)

Engine = Callable[..., Rig]


every_kind = pytest.mark.parametrize(
    "kind", ["native", "native-copy", "native-2", "twin"], indirect=True
)


both_loops = pytest.mark.loops("asyncio", "uvloop")


def digest(data: bytes) -> bytes:
    return hashlib.sha256(data).digest()


def answer(index: int) -> bytes:
    """Return what the visitor of this number is told."""
    return words(f"answer {index}")


def words(seed: str) -> bytes:
    dice = random.Random(seed)
    return dice.randbytes(dice.choice([0, 1, 1000, 50_000, 300_000]))


async def serve(rig: Rig, listener: socket.socket, count: int, heard: dict[int, bytes]) -> None:
    """Take so many visitors, note what each says under its number, and answer behind its end."""

    async def tell(sock: socket.socket) -> None:
        index = int.from_bytes(await rig.receive(sock, 4), "big")
        heard[index] = digest(await rig.drain(sock))
        await rig.send(sock, answer(index))
        sock.close()

    async with asyncio.TaskGroup() as group:
        for _ in range(count):
            group.create_task(tell(await rig.accept(listener)))
