"""A second interpreter in the process is refused: static state serves one only."""

import importlib
import sys

from tests.isolated.scripts.stage import KIND, play

CODE = """
try:
    import nodepass._fastcopy
except ImportError:
    pass
else:
    raise AssertionError("a second interpreter could import the engine")
"""


async def script() -> None:
    engine = KIND.module.Engine()
    if sys.version_info >= (3, 13):
        newer = importlib.import_module("_interpreters")
        other = newer.create()
        failed = newer.exec(other, CODE)
        newer.destroy(other)
        assert failed is None, failed
    else:
        older = importlib.import_module("_xxsubinterpreters")
        other = older.create()
        older.run_string(other, CODE)
        older.destroy(other)
    assert engine.close()


play(script())
