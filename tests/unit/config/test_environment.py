"""environment: Go durations, every variable with its default, its range and its error."""

from __future__ import annotations

import math
import os
import re
from dataclasses import fields

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nodepass.config.environment import (
    LONGEST,
    SHORTEST_REPORT,
    VARIABLES,
    Remark,
    Settings,
    Variable,
    available_cores,
    default_threads,
    parse_duration,
    show_duration,
)
from nodepass.errors import ConfigError
from nodepass.protocol.session import TALK_RATE

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
    ("TCP_IDLE_TIMEOUT", 0.0, "2h", 7200.0),
    ("REPORT_INTERVAL", 5.0, "10ms", 0.01),
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
    assert {v.field for v in VARIABLES} | {"remarks"} == {f.name for f in fields(Settings)}


@pytest.mark.parametrize(("name", "default", "text", "value"), TABLE)
def test_each_variable(name: str, default: object, text: str, value: object) -> None:
    field = BY_NAME[name].field
    assert getattr(Settings.from_environment({}), field) == default
    settings = Settings.from_environment({name: text})
    assert getattr(settings, field) == value
    assert type(getattr(settings, field)) is type(default)
    own = BY_NAME[name].own_name
    assert Settings.from_environment({own: text}) == settings
    assert Settings.from_environment({name: "", own: text}) == settings
    assert Settings.from_environment({own: text}).remarks == ()


@pytest.mark.parametrize("text", ["9ms", "4ms", "1ms"])
def test_c22_a_report_period_that_passes_for_a_flood_is_refused(text: str) -> None:
    """Pings come once a period, and the answers to the other side's as often as it asks."""
    assert 1 / SHORTEST_REPORT < TALK_RATE / 2
    with pytest.raises(ConfigError, match=r"10ms\.\.") as caught:
        Settings.from_environment({"NODEPASS_REPORT_INTERVAL": text})
    assert "\n" not in str(caught.value)
    settings = Settings.from_environment({"REPORT_INTERVAL": text})
    assert settings.report_interval == Settings().report_interval
    (remark,) = settings.remarks
    assert "10ms.." in remark.why


BAD = ["-1", "-5s", "x", "1.5", "999999999h", "9" * 5000, " 5 ", "%(message)s", "\udcff"]


@pytest.mark.parametrize("name", list(BY_NAME))
@pytest.mark.parametrize("text", BAD)
def test_bad_values_name_the_variable_and_what_it_may_be(name: str, text: str) -> None:
    own = BY_NAME[name].own_name
    with pytest.raises(ConfigError) as caught:
        Settings.from_environment({own: text})
    assert caught.value.option == own
    assert BY_NAME[name].expects in caught.value.message


GENERAL = [name for name in BY_NAME if not name.startswith("NODEPASS_")]


def test_c02_some_names_are_general() -> None:
    assert {"LOG_FORMAT", "SHUTDOWN_TIMEOUT", "DIAL_TIMEOUT"} <= set(GENERAL)


@pytest.mark.parametrize("name", GENERAL)
@pytest.mark.parametrize("text", BAD)
def test_c02_general_names_may_hold_what_others_mean(name: str, text: str) -> None:
    """The start goes on with the default, and one remark says so."""
    settings = Settings.from_environment({name: text})
    assert settings == Settings()
    (remark,) = settings.remarks
    assert (remark.name, remark.meant) == (name, f"NODEPASS_{name}")
    assert BY_NAME[name].expects in remark.why
    assert remark.default == BY_NAME[name].default
    assert len(remark.why) < 200


@pytest.mark.parametrize("name", GENERAL)
def test_c02_the_unmistakable_name_goes_first(name: str) -> None:
    variable = BY_NAME[name]
    text = next(row[2] for row in TABLE if row[0] == name)
    value = variable.read(text)
    for general in ("x", variable.default, ""):
        settings = Settings.from_environment({name: general, variable.own_name: text})
        assert getattr(settings, variable.field) == value
        assert settings.remarks == ()
    with pytest.raises(ConfigError, match=f"^{variable.own_name}: 'x' is not"):
        Settings.from_environment({name: variable.default, variable.own_name: "x"})


@pytest.mark.parametrize("name", list(BY_NAME))
def test_c02_an_empty_value_is_as_good_as_none(name: str) -> None:
    own = BY_NAME[name].own_name
    settings = Settings.from_environment({name: "", own: ""})
    assert settings == Settings()
    assert settings.remarks == ()


@pytest.mark.parametrize(
    "name",
    [v.name for v in VARIABLES if "duration" in v.expects]
    + ["SEMAPHORE_LIMIT", "NODEPASS_THREADS", "MIN_POOL_CAPACITY", "UDP_DATA_BUF_SIZE"],
)
def test_zero_is_refused_where_it_is_senseless(name: str) -> None:
    own = BY_NAME[name].own_name
    if name in ("SHUTDOWN_TIMEOUT", "TCP_IDLE_TIMEOUT"):
        settings = Settings.from_environment({own: "0s"})
        assert getattr(settings, BY_NAME[name].field) == 0
        return
    with pytest.raises(ConfigError, match=name):
        Settings.from_environment({own: "0"})


LOW, HIGH = "NODEPASS_MIN_POOL_CAPACITY", "NODEPASS_MAX_POOL_CAPACITY"


@pytest.mark.parametrize(
    ("environ", "named"),
    [
        ({LOW: "2000"}, LOW),
        ({HIGH: "8"}, HIGH),
        ({LOW: "9", HIGH: "8"}, LOW),
        ({LOW: "2000", "MAX_POOL_CAPACITY": "1999"}, LOW),
    ],
)
def test_min_above_max(environ: dict[str, str], named: str) -> None:
    with pytest.raises(ConfigError, match="at most as large") as caught:
        Settings.from_environment(environ)
    assert caught.value.option == named


@pytest.mark.parametrize(
    ("environ", "limits", "left"),
    [
        ({"MIN_POOL_CAPACITY": "2000"}, (16, 1024), ["MIN_POOL_CAPACITY"]),
        ({"MAX_POOL_CAPACITY": "8"}, (16, 1024), ["MAX_POOL_CAPACITY"]),
        (
            {"MIN_POOL_CAPACITY": "9", "MAX_POOL_CAPACITY": "8"},
            (16, 1024),
            ["MIN_POOL_CAPACITY", "MAX_POOL_CAPACITY"],
        ),
        ({"MIN_POOL_CAPACITY": "2000", HIGH: "1999"}, (16, 1999), ["MIN_POOL_CAPACITY"]),
        ({LOW: "9", "MAX_POOL_CAPACITY": "8"}, (9, 1024), ["MAX_POOL_CAPACITY"]),
    ],
)
def test_c02_general_limits_that_contradict_each_other(
    environ: dict[str, str], limits: tuple[int, int], left: list[str]
) -> None:
    settings = Settings.from_environment(environ)
    assert (settings.min_pool_capacity, settings.max_pool_capacity) == limits
    assert [remark.name for remark in settings.remarks] == left
    assert all("is more than" in remark.why for remark in settings.remarks)


def test_min_equal_to_max() -> None:
    settings = Settings.from_environment({"MIN_POOL_CAPACITY": "8", "MAX_POOL_CAPACITY": "8"})
    assert (settings.min_pool_capacity, settings.max_pool_capacity) == (8, 8)


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("NODEPASS_THREDS", "NODEPASS_THREADS"),
        ("NODEPASS_PASWORD", "NODEPASS_PASSWORD"),
        ("NODEPASS_PASSWD", "NODEPASS_PASSWORD"),
        ("NODEPASS_PASS", "NODEPASS_PASSWORD"),
        ("NODEPASS_PASSWORD_FIEL", "NODEPASS_PASSWORD_FILE"),
        ("nodepass_password", "NODEPASS_PASSWORD"),
        ("NODEPAS_PASSWORD", "NODEPASS_PASSWORD"),
        ("NODE_PASS_PASSWORD_FILE", "NODEPASS_PASSWORD_FILE"),
        ("NODEPASS_DAIL_TIMEOUT", "NODEPASS_DIAL_TIMEOUT"),
        ("NODEPASS_SEMAPHOR_LIMIT", "NODEPASS_SEMAPHORE_LIMIT"),
        ("SEMAPHOR_LIMIT", "SEMAPHORE_LIMIT"),
    ],
)
def test_c02_a_likely_misspelling_is_one_remark(name: str, meant: str) -> None:
    settings = Settings.from_environment({name: "1"})
    assert settings == Settings()
    assert settings.remarks == (Remark(name, meant),)


@pytest.mark.parametrize(
    "service",
    ["NODEPASS", "NODEPASS_SERVER", "NODEPASS_ENGINE", "NODEPASS_THREADS", "NODEPASS_PASSWORD",
     "NODEPASS_DIAL_TIMEOUT", "NODEPASS_LOG_FORMAT"],
)  # fmt: skip
def test_c02_links_of_services_are_none_of_our_business(service: str) -> None:
    """As Kubernetes sets them for every pod, and Docker for a linked container."""
    link = "tcp://10.0.0.1:443"
    environ = {
        f"{service}_SERVICE_HOST": "10.0.0.1",
        f"{service}_SERVICE_PORT": "443",
        f"{service}_SERVICE_PORT_HTTPS": "443",
        f"{service}_PORT": link,
        f"{service}_PORT_443_TCP": link,
        f"{service}_PORT_443_TCP_PROTO": "tcp",
        f"{service}_PORT_443_TCP_PORT": "443",
        f"{service}_PORT_443_TCP_ADDR": "10.0.0.1",
        f"{service}_PORT_53_UDP": "udp://10.0.0.1:53",
        f"{service}_NAME": "/web/nodepass",
        f"{service}_ENV_PYTHON_VERSION": "3.13",
    }
    settings = Settings.from_environment(environ)
    assert (settings, settings.remarks) == (Settings(), ())


@pytest.mark.parametrize("name", [v.own_name for v in VARIABLES])
@pytest.mark.parametrize("link", ["tcp://10.0.0.1:443", "udp://[fd00::1]:53", "sctp://a:1"])
def test_c02_a_link_under_a_name_of_ours_is_left_aside(name: str, link: str) -> None:
    settings = Settings.from_environment({name: link})
    assert settings == Settings()
    assert [remark.name for remark in settings.remarks] == [name]


@pytest.mark.parametrize(
    "name",
    [
        "NODEPASS_DEBUG",
        "NODEPASS_PURE",
        "NODEPASS_SANITIZE",
        "NODEPASS_WERROR",
        "NODEPASS_PASSWORD",
        "NODEPASS_PASSWORD_FILE",
        "NODEPASS_TEST_LOOP",
        "NODEPASS_PORT",
        "NODEPASS_VERSION",
        "NODEPASS_IMAGE",
        "NODEPASS_URL",
        "NODEPASS_HOME",
        "NODEPASS_NGINX",
        "NODEPASS_SERVICE",
        "NODEPASS_",
        "NODEPASS",
        "NODE_ENV",
        "NODENAME",
        "NODE_OPTIONS",
        "LOGFORMAT",
        "LOG_FORMATS",
        "PATH",
        "semaphore_limit",
    ],
)
def test_variables_that_are_not_settings(name: str) -> None:
    settings = Settings.from_environment({name: "whatever"})
    assert (settings, settings.remarks) == (Settings(), ())


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
