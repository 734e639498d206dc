"""How hard hypothesis tries: modest, and the same every time in CI."""

from __future__ import annotations

import os

from hypothesis import settings

EXAMPLES = 60
"""Per property: the whole folder stays within half a minute. NODEPASS_TEST_EXAMPLES raises it."""

settings.register_profile(
    "nodepass",
    deadline=None,  # a crowded machine is no failure
    max_examples=int(os.environ.get("NODEPASS_TEST_EXAMPLES", EXAMPLES)),
    derandomize="CI" in os.environ,
)
settings.load_profile("nodepass")
