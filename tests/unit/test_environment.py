"""environment: Go durations, every variable with its default, its range and its error."""

from __future__ import annotations

import math
import os
import re
from dataclasses import fields

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nodepass.environment import (
    LONGEST,
    VARIABLES,
    Settings,
    Variable,
    available_cores,
    default_threads,
    parse_duration,
    show_duration,
    suggest,
)
from nodepass.errors import ConfigError

BY_NAME = {variable.name: variable for variable in VARIABLES}


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("300ms", 0.3),
        ("5s", 5.0),
        ("1m30s", 90.0),
        ("2h45m", 9900.0),
        ("1.5s", 1.5),
        (".5s", 0.5),
        ("1.s", 1.0),
        ("+5s", 5.0),
        ("-5s", -5.0),
        ("0", 0.0),
        ("0s", 0.0),
        ("100us", 1e-4),
        ("100\u00b5s", 1e-4),
        ("100\u03bcs", 1e-4),
        ("7ns", 7e-9),
        ("1h1m1s1ms1us1ns", 3661.001001001),
        ("1s1s", 2.0),
    ],
)
def test_durations(text: str, seconds: float) -> None:
    assert parse_duration(text) == pytest.approx(seconds)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "5",
        "s",
        "5x",
        "5 s",
        "5s ",
        " 5s",
        "1m30",
        "--5s",
        "+-5s",
        ".s",
        "1.5.5s",
        "5S",
        "五s",
        "5ss",
        "x5s",
        "+",
        "-",
        "1e3s",
        "infs",
        "nan",
        "٣s",
    ],
)
def test_what_is_no_duration(text: str) -> None:
    with pytest.raises(ValueError, match="^" + re.escape(text) + "$"):
        parse_duration(text)


@given(st.integers(1, 10**9))
def test_shown_durations_read_back(milliseconds: int) -> None:
    seconds = milliseconds / 1000
    assert parse_duration(show_duration(seconds)) == pytest.approx(seconds, rel=1e-5)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(3600.0, "1h"), (5400.0, "5400s"), (120.0, "120s"), (5.0, "5s"), (0.0, "0s"), (0.3, "300ms")],
)
def test_shows_durations_briefly(seconds: float, text: str) -> None:
    assert show_duration(seconds) == text


# The table of product.md, plus what this build adds: name, default, a value, what it becomes.
TABLE: list[tuple[str, object, str, object]] = [
    ("SEMAPHORE_LIMIT", 1024, "7", 7),
    ("MIN_POOL_CAPACITY", 16, "1", 1),
    ("MAX_POOL_CAPACITY", 1024, "65536", 65536),
    ("UDP_DATA_BUF_SIZE", 8192, "65535", 65535),
    ("UDP_READ_TIMEOUT", 5.0, "300ms", 0.3),
    ("UDP_IDLE_TIMEOUT", 120.0, "2m", 120.0),
    ("REPORT_INTERVAL", 5.0, "1ms", 0.001),
    ("SERVICE_COOLDOWN", 5.0, "1m30s", 90.0),
    ("SHUTDOWN_TIMEOUT", 5.0, "0", 0.0),
    ("RELOAD_INTERVAL", 3600.0, "8760h", LONGEST),
    ("HANDSHAKE_TIMEOUT", 5.0, "1.5s", 1.5),
    ("DIAL_TIMEOUT", 5.0, "10s", 10.0),
    ("NODEPASS_THREADS", default_threads(), "3", 3),
    ("NODEPASS_ENGINE", "native", "Python", "python"),
    ("NODEPASS_SPLICE", True, "0", False),
    ("NODEPASS_UDP_GSO", False, "1", True),
    ("LOG_FORMAT", "text", "json", "json"),
]


def test_the_table_is_complete() -> None:
    assert [row[0] for row in TABLE] == list(BY_NAME)
    assert {v.field for v in VARIABLES} == {f.name for f in fields(Settings)}


@pytest.mark.parametrize(("name", "default", "text", "value"), TABLE)
def test_each_variable(name: str, default: object, text: str, value: object) -> None:
    field = BY_NAME[name].field
    assert getattr(Settings.from_environment({}), field) == default
    settings = Settings.from_environment({name: text})
    assert getattr(settings, field) == value
    assert type(getattr(settings, field)) is type(default)


@pytest.mark.parametrize("name", list(BY_NAME))
@pytest.mark.parametrize("text", ["", "-1", "-5s", "x", "1.5", "999999999h", "9" * 5000, " 5 "])
def test_bad_values_name_the_variable_and_what_it_may_be(name: str, text: str) -> None:
    with pytest.raises(ConfigError) as caught:
        Settings.from_environment({name: text})
    assert caught.value.option == name
    assert BY_NAME[name].expects in caught.value.message
    assert ("empty" in caught.value.message) is (text == "")


@pytest.mark.parametrize(
    "name",
    [v.name for v in VARIABLES if v.default != "cores" and "duration" in v.expects]
    + ["SEMAPHORE_LIMIT", "NODEPASS_THREADS", "MIN_POOL_CAPACITY", "UDP_DATA_BUF_SIZE"],
)
def test_zero_is_refused_where_it_is_senseless(name: str) -> None:
    if name == "SHUTDOWN_TIMEOUT":
        assert Settings.from_environment({name: "0s"}).shutdown_timeout == 0
        return
    with pytest.raises(ConfigError, match=name):
        Settings.from_environment({name: "0"})


@pytest.mark.parametrize(
    ("environ", "named"),
    [
        ({"MIN_POOL_CAPACITY": "2000"}, "MIN_POOL_CAPACITY"),
        ({"MAX_POOL_CAPACITY": "8"}, "MAX_POOL_CAPACITY"),
        ({"MIN_POOL_CAPACITY": "9", "MAX_POOL_CAPACITY": "8"}, "MIN_POOL_CAPACITY"),
    ],
)
def test_min_above_max(environ: dict[str, str], named: str) -> None:
    with pytest.raises(ConfigError, match="at most as large") as caught:
        Settings.from_environment(environ)
    assert caught.value.option == named


def test_min_equal_to_max() -> None:
    settings = Settings.from_environment({"MIN_POOL_CAPACITY": "8", "MAX_POOL_CAPACITY": "8"})
    assert (settings.min_pool_capacity, settings.max_pool_capacity) == (8, 8)


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("NODEPASS_THREDS", "did you mean NODEPASS_THREADS?"),
        ("NODEPASS_PASWORD", "did you mean NODEPASS_PASSWORD?"),
        ("NODEPASS_QQQQQQQQQQQQQQQQQQQ", "known are NODEPASS_PASSWORD,"),
    ],
)
def test_unknown_variables_of_ours(name: str, says: str) -> None:
    with pytest.raises(ConfigError) as caught:
        Settings.from_environment({name: "1"})
    assert caught.value.option == name
    assert says in caught.value.message
    assert "SEMAPHORE_LIMIT" not in caught.value.message


@pytest.mark.parametrize(
    "name",
    [
        "NODEPASS_DEBUG",
        "NODEPASS_PURE",
        "NODEPASS_SANITIZE",
        "NODEPASS_PASSWORD",
        "NODEPASS_PASSWORD_FILE",
        "NODEPASS_TEST_LOOP",
        "NODEPASS_SERVICE_HOST",
        "NODEPASS_SERVICE_PORT_TUNNEL",
        "NODEPASS_PORT",
        "NODEPASS_PORT_10101_TCP_ADDR",
        "PATH",
        "semaphore_limit",
    ],
)
def test_variables_that_are_not_settings(name: str) -> None:
    assert Settings.from_environment({name: "whatever"}) == Settings()


def test_defaults_as_the_help_shows_them() -> None:
    shown = {v.name: v.default for v in VARIABLES}
    assert shown["NODEPASS_THREADS"] == "half the cores"
    assert shown["RELOAD_INTERVAL"] == "1h"
    assert shown["UDP_IDLE_TIMEOUT"] == "120s"
    assert shown["NODEPASS_SPLICE"] == "1"
    assert shown["SEMAPHORE_LIMIT"] == "1024"
    assert shown["LOG_FORMAT"] == "text"


def test_every_shown_default_reads_back_as_the_default() -> None:
    for variable in VARIABLES:
        if variable.field != "threads":
            assert variable.read(variable.default) == getattr(Settings(), variable.field)


def test_variables_are_values() -> None:
    assert isinstance(BY_NAME["LOG_FORMAT"], Variable)
    assert math.isfinite(LONGEST)


def test_cores_without_affinity(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 6)
    assert (available_cores(), default_threads()) == (6, 3)
    monkeypatch.setattr(os, "cpu_count", lambda: None)
    assert (available_cores(), default_threads()) == (1, 1)


def test_suggest() -> None:
    assert suggest("lgo", ["log", "tls"]) == "did you mean log?"
    assert suggest("zzz", ["log", "tls"]) == "known are log, tls"
