"""The fuzzers' readers over their corpus and a second of mutations, the same in every run."""

from __future__ import annotations

import pytest
from tests.fuzz import fuzz_wire

from nodepass.protocol import lines


def test_corpus_reaches_every_reader() -> None:
    seeds = fuzz_wire.corpus()
    assert len(seeds) >= 20
    assert {seed[0] for seed in seeds} == set(range(len(fuzz_wire.READERS)))


def test_a_second_of_mutations() -> None:
    kept = len(fuzz_wire.corpus()) * len(fuzz_wire.READERS)
    assert fuzz_wire.run(1.0, seed=20261122) > kept


def test_a_broken_reader_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """The fuzzer itself: an error of the wrong kind comes out, with the input that made it."""

    def int_of(line: bytes) -> int:
        return int(line)

    monkeypatch.setattr(lines, "parse_answer", int_of)
    with pytest.raises(ValueError, match="invalid literal") as caught:
        fuzz_wire.run(1.0, seed=1)
    assert "input: b'" in caught.value.__notes__[0]
