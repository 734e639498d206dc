"""A burst of visitors, as a program of its own: it also runs in another network namespace.

Usage: python burst.py serve PORT          echo for ever
       python burst.py visit PORT COUNT    print the seconds until the last answer
       python burst.py talk PORT           print "talking", talk for ever, print how it ended
"""

from __future__ import annotations

import asyncio
import sys
import time


async def visit(port: int, number: int) -> None:
    """Send one number and insist on having it back."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        message = b"%06d" % number
        writer.write(message)
        answer = await reader.readexactly(len(message))
        if answer != message:
            raise ValueError(f"{answer!r} instead of {message!r}")
    finally:
        writer.close()
        await writer.wait_closed()


async def burst(port: int, count: int) -> float:
    """Let count visitors come at once; return the seconds until the last one is served."""
    start = time.monotonic()
    async with asyncio.TaskGroup() as group:
        for number in range(count):
            group.create_task(visit(port, number))
    return time.monotonic() - start


async def talk(port: int) -> str:
    """Say something now and then until the connection ends; return how it did."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(b"hello")
    await reader.readexactly(5)
    print("talking", flush=True)
    try:
        while True:
            writer.write(b"x")
            try:
                async with asyncio.timeout(0.2):
                    while await reader.read(1024):
                        pass
                return "end"
            except TimeoutError:
                continue
    except ConnectionResetError:
        return "reset"
    finally:
        writer.close()


async def serve(port: int) -> None:
    """Echo."""

    async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(65536):
            writer.write(data)
            await writer.drain()
        writer.close()

    server = await asyncio.start_server(echo, "127.0.0.1", port, backlog=1024)
    print("serving", flush=True)
    await server.serve_forever()


if __name__ == "__main__":
    if sys.argv[1] == "serve":
        asyncio.run(serve(int(sys.argv[2])))
    elif sys.argv[1] == "talk":
        print(asyncio.run(talk(int(sys.argv[2]))))
    else:
        print(asyncio.run(burst(int(sys.argv[2]), int(sys.argv[3]))))
