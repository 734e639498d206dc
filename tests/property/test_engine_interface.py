"""No argument of any shape brings an engine down, makes it leak, or lets it take what is not its.

What is played here for seconds is played for minutes, under a sanitizer, by
`NODEPASS_TEST_EXAMPLES=9000 scripts/sanitize address -k any_call`.
"""

from __future__ import annotations

import os

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests.engine.conftest import kinds
from tests.fuzz.engine_calls import CALLS, FUNCTIONS, GOOD, METHODS, Call, parameters
from tests.fuzz.engine_stage import stage
from tests.kit.engine_rig import Kind


def test_every_parameter_of_the_stub_is_known() -> None:
    """A new method is called with anything at all once its parameters have a meaning here."""
    named = {name for method in METHODS for name in parameters(method)}
    assert named == GOOD.keys()
    for name, node in FUNCTIONS.items():
        assert not node.args.args, f"{name}() has arguments now: call it with anything, too"


EXAMPLES = 25
"""Histories for each engine: a few seconds."""


@pytest.mark.deadline(1000)
@pytest.mark.parametrize("kind", kinds(), ids=repr)
@settings(
    max_examples=int(os.environ.get("NODEPASS_TEST_EXAMPLES", EXAMPLES)),
    suppress_health_check=[HealthCheck.too_slow],
)
@given(history=st.lists(CALLS, min_size=1, max_size=12))
async def test_any_call(kind: Kind, history: list[Call]) -> None:
    with stage(kind) as here:
        for call in history:
            await here.play(call)
        await here.strike()
