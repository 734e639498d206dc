"""A proxy that stands between server and client and breaks things on request.

It forwards byte for byte, half-close and reset included, until told otherwise: delay, stall,
cut by FIN or RST, tamper, small pieces. Every connection keeps byte counters.
"""

from __future__ import annotations

import asyncio
import socket
from contextlib import suppress
from functools import partial
from typing import Final

from .stream import CHUNK, RESET, Stream, connect
from .target import BACKLOG
from .timing import free_port

QUEUE: Final = 256
"""Chunks under way per direction of a delayed connection; beyond it the proxy stops reading."""


class Channel:
    """One proxied connection: near = who dialled the proxy, far = where the proxy dialled."""

    def __init__(self, near: Stream, far: Stream, proxy: Proxy) -> None:
        self.near = near
        self.far = far
        self.up = 0
        """Bytes forwarded near → far."""
        self.down = 0
        """Bytes forwarded far → near."""
        self.is_open = True
        self._proxy = proxy
        self._moving = asyncio.Event()
        self._moving.set()
        self.is_to_tamper = False
        """Flip one bit of whatever is forwarded next."""

    def stall(self) -> None:
        """Forward nothing more, FIN included: a NAT mapping that has vanished."""
        self._moving.clear()

    def resume(self) -> None:
        self._moving.set()

    def cut(self, *, reset: bool = False) -> None:
        """End both sides, cleanly or with RST."""
        for stream in (self.near, self.far):
            # shutdown wakes our own pumps, close alone would leave them registered
            with suppress(OSError):
                if reset:
                    stream.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
                else:
                    stream.sock.shutdown(socket.SHUT_RDWR)
        self._proxy.drop(self)

    async def run(self) -> None:
        """Pump both directions until both have ended, or one is reset."""
        up = asyncio.create_task(self._pump(self.near, self.far, is_up=True))
        down = asyncio.create_task(self._pump(self.far, self.near, is_up=False))
        try:
            await asyncio.gather(up, down)
        except OSError:
            for stream in (self.near, self.far):
                stream.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
        finally:
            up.cancel()
            down.cancel()
            try:
                await asyncio.gather(up, down, return_exceptions=True)
            finally:
                self.is_open = False
                self.near.close()
                self.far.close()

    async def _pump(self, source: Stream, sink: Stream, *, is_up: bool) -> None:
        queue: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue(QUEUE)
        deliver = asyncio.create_task(self._deliver(queue, sink, is_up=is_up))
        loop = asyncio.get_running_loop()
        try:
            while True:
                await self._moving.wait()
                data = await source.read(self._proxy.piece)
                await self._moving.wait()
                await queue.put((loop.time() + self._proxy.delay, data))
                if not data or deliver.done():
                    break
            await deliver
        finally:
            deliver.cancel()
            await asyncio.gather(deliver, return_exceptions=True)

    async def _deliver(
        self, queue: asyncio.Queue[tuple[float, bytes]], sink: Stream, *, is_up: bool
    ) -> None:
        loop = asyncio.get_running_loop()
        while True:
            due, data = await queue.get()
            if due > loop.time():
                await asyncio.sleep(due - loop.time())
            await self._moving.wait()
            if not data:
                sink.finish()
                return
            if self.is_to_tamper:
                self.is_to_tamper = False
                middle = len(data) // 2
                data = data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :]
            await sink.write(data)
            if is_up:
                self.up += len(data)
            else:
                self.down += len(data)


class Proxy:
    """Listens on `port`, dials `upstream` for each connection."""

    def __init__(self, upstream: int, *, delay: float = 0.0, piece: int = CHUNK) -> None:
        self.upstream = upstream
        self.delay = delay
        """Seconds that everything takes one way; a dial pays three times as much, like TCP's."""
        self.piece = piece
        """Bytes forwarded at a time."""
        self.is_refusing = False
        """Reset new connections instead of proxying them."""
        self.channels: list[Channel] = []
        self._sock = socket.socket()
        self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self.port = free_port()
        self._sock.bind(("127.0.0.1", self.port))
        self._sock.listen(BACKLOG)
        self._sock.setblocking(False)
        self._tasks: dict[asyncio.Task[None], Channel | None] = {}
        self._accepting = asyncio.create_task(self._accept())

    @property
    def open_channels(self) -> list[Channel]:
        return [channel for channel in self.channels if channel.is_open]

    async def _accept(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            sock, _ = await loop.sock_accept(self._sock)
            near = Stream(sock)
            if self.is_refusing:
                near.reset()
                continue
            task = asyncio.create_task(self._serve(near))
            self._tasks[task] = None
            task.add_done_callback(partial(self._forget, near))

    def _forget(self, near: Stream, task: asyncio.Task[None]) -> None:
        near.close()  # a task that is cancelled before its first step closes nothing itself
        self._tasks.pop(task, None)

    async def _serve(self, near: Stream) -> None:
        try:
            # SYN, SYN+ACK and ACK each cross once before the far side can say a word.
            await asyncio.sleep(3 * self.delay)
            far = await connect(self.upstream)
        except OSError:
            near.reset()
            return
        channel = Channel(near, far, self)
        self.channels.append(channel)
        task = asyncio.current_task()
        if task is not None:
            self._tasks[task] = channel
        await channel.run()

    def drop(self, channel: Channel) -> None:
        """Stop pumping a channel; its sockets are closed by its task."""
        for task, owner in self._tasks.items():
            if owner is channel:
                task.cancel()

    async def close(self) -> None:
        tasks = [self._accepting, *self._tasks]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self._sock.close()
