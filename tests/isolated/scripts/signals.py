"""Signals go to Python's threads; SIGPIPE at its default kills nobody."""

import asyncio
import os
import signal
import threading
from pathlib import Path

from tests.isolated.scripts.stage import KIND, play, pour
from tests.kit.engine_rig import Rig, reset_on_close

FAULT = 1 << (signal.SIGSEGV - 1)


def blocked(task: Path) -> int:
    lines = (task / "status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("SigBlk")).split()[1], 16)


async def script() -> None:
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    seen: list[int] = []
    asyncio.get_running_loop().add_signal_handler(signal.SIGUSR1, seen.append, 1)
    async with Rig(KIND) as rig:
        tasks = Path("/proc/self/task")
        if KIND.is_native and tasks.exists():
            own = [t for t in tasks.iterdir() if "nodepass" in (t / "comm").read_text()]
            assert len(own) == 2
            for task in own:
                # The C library blocks everything while a thread is being born.
                await rig.until(lambda task=task: not blocked(task) & FAULT, "mask settled")
                for number in (signal.SIGUSR1, signal.SIGPIPE, signal.SIGTERM, signal.SIGINT):
                    assert blocked(task) >> (number - 1) & 1
            main = tasks / str(os.getpid())
            assert not blocked(main) >> (signal.SIGUSR1 - 1) & 1
        for _ in range(6):
            flow = rig.join()
            if not KIND.is_native:  # the twin runs where Python runs: CPython's own rule holds
                signal.signal(signal.SIGPIPE, signal.SIG_IGN)
            stop = threading.Thread(target=signal.raise_signal, args=(signal.SIGUSR1,))
            stop.start()
            signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGPIPE})
            threads = pour(flow)
            await asyncio.sleep(0.1)
            # The receiver goes away under a splice in full swing.
            reset_on_close(flow.target)
            flow.target.shutdown(2)
            threads[1].join()
            flow.target.close()
            ended = await rig.ended(flow.token)
            assert ended.reason == KIND.module.REASON_RESET
            threads[0].join()
            stop.join()
            signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGPIPE})
        await rig.until(lambda: len(seen) >= 1, "signals seen")


play(script())
