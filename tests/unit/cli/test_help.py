"""help: names everything there is, fits a terminal, and its examples are good."""

from __future__ import annotations

import re

import pytest

from nodepass.cli.help import FIRST_STEPS, text
from nodepass.cli.keygen import text as keygen_text
from nodepass.config.environment import VARIABLES
from nodepass.config.parameters import PARAMETERS
from nodepass.config.url import Config

WIDTH = 100


def test_fits_a_terminal() -> None:
    assert text().endswith("\n")
    assert [line for line in text().splitlines() if len(line) > WIDTH] == []
    assert [line for line in text().splitlines() if line != line.rstrip()] == []


def test_names_every_parameter_and_its_default() -> None:
    for parameter in PARAMETERS:
        where = "both" if len(parameter.modes) == 2 else str(parameter.modes[0])
        row = rf"^  {parameter.name} +{where} +{parameter.default or '-'} +\S"
        assert re.search(row, text(), re.MULTILINE), parameter.name


def test_names_every_variable_and_its_default() -> None:
    for variable in VARIABLES:
        row = rf"^  {variable.name} +{variable.default} +\S"
        assert re.search(row, text(), re.MULTILINE), variable.name
    assert "NODEPASS_PASSWORD[_FILE]" in text()


def test_examples_are_good_urls() -> None:
    urls = re.findall(r'"([^"]+)"', text())
    assert len(urls) >= 7
    for url in urls:
        Config.parse(url, {})


@pytest.mark.parametrize(
    "shown", [text(), FIRST_STEPS, keygen_text([])], ids=["help", "first steps", "keygen"]
)
def test_c17_every_example_is_a_safe_one(shown: str) -> None:
    """Encrypted, and with a password in a file; a line may go on after a backslash."""
    lines = re.sub(r"\\\n\s*", "", shown).splitlines()
    examples = [line for line in lines if re.search(r"nodepass [\"']?(server|client)://", line)]
    assert len(examples) >= 2
    for line in examples:
        assert "NODEPASS_PASSWORD_FILE=" in line
        urls = re.findall(r"(?:server|client)://[^\s\"']+", line)
        for url in urls:
            config = Config.parse(url, {"NODEPASS_PASSWORD": "x"})
            assert config.tls == 1, line
    assert "NODEPASS_PASSWORD=" not in shown


def test_names_every_command() -> None:
    for command in ("demo", "keygen"):
        assert re.search(rf"^ +nodepass {command}\b", text(), re.MULTILINE)


def test_nothing_comes_later() -> None:
    assert "later" not in text()
