"""config: every URL form, every parameter, every refusal, and that no secret shows."""

from __future__ import annotations

import copy
import json
import pickle
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nodepass import config as module
from nodepass.address import Address
from nodepass.config import PARAMETERS, Config, Mode, Secret, Settings, check_together
from nodepass.errors import ConfigError

SERVER = "server://127.0.0.1:10101/127.0.0.1:8080"
CLIENT = "client://127.0.0.1:10101/127.0.0.1:9000"


def parse(url: str, environ: dict[str, str] | None = None) -> Config:
    return Config.parse(url, environ or {})


def refusal(url: str, environ: dict[str, str] | None = None) -> ConfigError:
    with pytest.raises(ConfigError) as caught:
        parse(url, environ)
    assert str(caught.value) == f"{caught.value.option}: {caught.value.message}"
    assert "\n" not in str(caught.value)
    return caught.value


# --- what is accepted ----------------------------------------------------------------------------


def test_defaults_of_a_server() -> None:
    assert parse(SERVER) == Config(
        mode=Mode.SERVER,
        tunnel=Address("127.0.0.1", 10101),
        target=Address("127.0.0.1", 8080),
        password=None,
        log="info",
        tls=0,
        crt=None,
        key=None,
        ca=None,
        sni=None,
        compat=True,
        data=0,
        tcp=True,
        udp=False,
        name="",
        settings=Settings(),
    )


def test_defaults_of_a_client(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("socket.gethostname", lambda: "küche box.local")
    config = parse(CLIENT)
    assert config.mode is Mode.CLIENT
    assert config.name == "k-che-box.local"
    monkeypatch.setattr("socket.gethostname", lambda: "")
    assert parse(CLIENT).name == "client"
    monkeypatch.setattr("socket.gethostname", lambda: "x" * 99)
    assert parse(CLIENT).name == "x" * module.NAME_LIMIT


@pytest.mark.parametrize(
    ("url", "tunnel", "target"),
    [
        ("server://:10101/:8080", Address("", 10101), Address("", 8080)),
        ("server://[::]:1/[::1]:2", Address("::", 1), Address("::1", 2)),
        ("SERVER://a:1/b:2", Address("a", 1), Address("b", 2)),
        ("client://:10101/:80", Address("localhost", 10101), Address("localhost", 80)),
        ("client://[2001:db8::1]:1/db:5432", Address("2001:db8::1", 1), Address("db", 5432)),
    ],
)
def test_hosts(url: str, tunnel: Address, target: Address) -> None:
    config = parse(url)
    assert (config.tunnel, config.target) == (tunnel, target)


@pytest.mark.parametrize(
    ("url", "field", "value"),
    [
        *((f"{SERVER}?log={level}", "log", level) for level in module.LEVELS),
        (f"{SERVER}?log=DEBUG", "log", "debug"),
        (f"{SERVER}?l%6Fg=warn", "log", "warn"),
        (f"{SERVER}?tls=0", "tls", 0),
        (f"{CLIENT}?tls=0", "tls", 0),
        (f"{SERVER}?compat=0", "compat", False),
        (f"{CLIENT}?compat=1", "compat", True),
        (f"{SERVER}?data=10102", "data", 10102),
        (f"{SERVER}?tcp=1&udp=0", "udp", False),
        (f"{CLIENT}?tcp=1", "tcp", True),
        (f"{CLIENT}?name=box-1.local_2", "name", "box-1.local_2"),
        (f"{CLIENT}?", "log", "info"),
    ],
)
def test_parameters(url: str, field: str, value: object) -> None:
    assert getattr(parse(url), field) == value


def test_environment_and_settings_of_the_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SEMAPHORE_LIMIT", "7")
    assert Config.parse(SERVER).settings.semaphore_limit == 7
    given_settings = Settings(semaphore_limit=9)
    assert Config.parse(SERVER, settings=given_settings).settings is given_settings
    with pytest.raises(ConfigError, match="SEMAPHORE_LIMIT"):
        Config.parse(SERVER, {"SEMAPHORE_LIMIT": "x"})


# --- what is refused -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("url", "option", "says"),
    [
        ("", "url", "starts neither"),
        ("127.0.0.1:1/127.0.0.1:2", "url", "starts neither"),
        ("serve://a:1/b:2", "url", "mode 'serve' is unknown"),
        ("server://a:1/b :2", "url", "blank"),
        ("server://a:1/b\x1b:2", "url", "control character"),
        ("server://a:1/b:2#x", "url", "'#'"),
        ("server://", "tunnel", "is missing"),
        ("server://a:1", "target", "is missing"),
        ("server://a:1/", "target", "is missing"),
        ("server:///b:2", "tunnel", "is missing"),
        ("server://a/b:2", "tunnel", "port is missing; write tunnel_host:tunnel_port"),
        ("server://a:1/b", "target", "port is missing; write target_host:target_port"),
        ("server://a:99999/b:2", "tunnel", "port '99999' is not a number 1..65535"),
        ("server://a:1/b:2/", "target", "port '2/'"),
        (f"{SERVER}?lgo=debug", "lgo", "did you mean log?"),
        (f"{SERVER}?zzzzzz=1", "zzzzzz", "known are log, tls, crt, key, compat, data, tcp, udp"),
        (f"{SERVER}?name=x", "name", "is a parameter of the client, not of the server"),
        (f"{CLIENT}?crt=x", "crt", "is a parameter of the server, not of the client"),
        (f"{SERVER}?log=loud", "log", "'loud' is not a value; it may be debug info warn"),
        (f"{SERVER}?log", "log", "it may be"),
        (f"{SERVER}?log=", "log", "it may be"),
        (f"{SERVER}?log=info&log=info", "log", "given twice"),
        (f"{SERVER}?&log=info", "url", "empty parameter"),
        (f"{SERVER}?=x", "url", "empty parameter"),
        (f"{SERVER}?tls=3", "tls", "it may be 0 1 2"),
        (f"{SERVER}?compat=yes", "compat", "it may be 0 1"),
        (f"{SERVER}?%0Alog=x", "url", r"'\nlog' is not a parameter"),
        (f"{SERVER}?crt=%zz", "url", "'%'"),
        (f"{SERVER}?crt=%ff", "url", "UTF-8"),
        (f"{SERVER}?crt=", "crt", "it needs a value"),
        (f"{SERVER}?data=65536", "data", "0..65535"),
        (f"{SERVER}?data=x", "data", "0..65535"),
        (f"{SERVER}?data=10101", "data", "127.0.0.1:10101 is taken by tunnel"),
        (f"{SERVER}?data=8080", "data", "is taken by target"),
        ("server://a:1/a:1", "target", "a:1 is taken by tunnel a:1"),
        ("server://:1/127.0.0.1:1", "target", "127.0.0.1:1 is taken by tunnel :1"),
        (f"{CLIENT}?name=a%20b", "name", "letters"),
        (f"{CLIENT}?name={'x' * 65}", "name", "1..64"),
        (f"{SERVER}?tls=2", "crt", "put the URL in quotes"),
        (f"{SERVER}?tls=2&crt=a.pem", "key", "put the URL in quotes"),
        (f"{SERVER}?crt=a.pem&key=b.pem", "crt", "for tls=2 only"),
        (f"{SERVER}?tls=1&key=b.pem", "key", "for tls=2 only"),
        (f"{SERVER}?tcp=0", "tcp", "nothing is left to carry"),
        (f"{CLIENT}?tcp=0&udp=0", "tcp", "nothing is left to carry"),
    ],
)
def test_refusals(url: str, option: str, says: str) -> None:
    error = refusal(url)
    assert error.option == option
    assert says in error.message


@pytest.mark.parametrize(
    ("url", "environ", "option"),
    [
        (f"{SERVER}?tls=1", {}, "tls"),
        (f"{SERVER}?tls=2&crt=a.pem&key=b.pem", {}, "tls"),
        (f"{CLIENT}?tls=1", {}, "tls"),
        (f"{CLIENT}?tls=2&ca=a.pem&sni=x", {}, "tls"),
        (f"{CLIENT}?ca=a.pem", {}, "ca"),
        (f"{CLIENT}?sni=x", {}, "sni"),
        (f"{SERVER}?udp=1", {}, "udp"),
        (f"{CLIENT}?tcp=0&udp=1", {}, "udp"),
        (SERVER.replace("//", "//pw@"), {}, "password"),
        (SERVER, {"NODEPASS_PASSWORD": "pw"}, "password"),
    ],
)
def test_later_features_are_refused(url: str, environ: dict[str, str], option: str) -> None:
    error = refusal(url, environ)
    assert error.option == option
    assert error.message == "is not in this build yet; leave it out"


def test_a_later_feature_is_validated_first() -> None:
    assert refusal(f"{SERVER}?tls=1&data=x").option == "data"


# --- passwords -----------------------------------------------------------------------------------


@pytest.fixture
def later_features(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let what this build refuses pass, to see how it was read."""
    monkeypatch.setattr(module, "_refuse_later_features", lambda config: None)


@pytest.mark.parametrize(
    ("written", "password"),
    [
        ("pw", "pw"),
        ("p@ss", "p@ss"),
        ("user:pw", "user:pw"),
        ("%70%20%2F%3f%23%40%25", "p /?#@%"),
        ("a+b", "a+b"),
        ("密码", "密码"),
        ("%E5%AF%86", "密"),
    ],
)
def test_passwords_in_the_url(written: str, password: str, later_features: None) -> None:
    config = parse(f"client://{written}@h:1/t:2")
    assert config.password == Secret(password)
    assert config.tunnel == Address("h", 1)
    assert config.compat is False


@pytest.mark.parametrize(
    ("url", "says"),
    [
        ("client://@h:1/t:2", "is empty or too long"),
        (f"client://{'x' * 1025}@h:1/t:2", "is empty or too long"),
        ("client://topsecret%@h:1/t:2", "write it as %25"),
        ("client://topsecret%ff@h:1/t:2", "UTF-8"),
        ("client://top/secret@h:1/t:2", "%2F"),
        ("client://top?secret@h:1/t:2", "%3F"),
    ],
)
def test_bad_passwords_are_not_repeated(url: str, says: str) -> None:
    error = refusal(url)
    assert error.option == "password"
    assert says in error.message
    assert "secret" not in str(error)
    assert "top" not in str(error)


def test_the_url_goes_before_the_environment(later_features: None) -> None:
    config = parse("client://mine@h:1/t:2", {"NODEPASS_PASSWORD": "theirs"})
    assert config.password == Secret("mine")


@pytest.mark.parametrize(
    ("content", "password"),
    [
        (b"pw", "pw"),
        (b"pw\n", "pw"),
        (b"pw\r\n", "pw"),
        (b" p w \n\n", " p w \n"),
        ("密码\n".encode(), "密码"),
        (b"x" * 1024 + b"\r\n", "x" * 1024),
    ],
)
def test_password_files(
    content: bytes, password: str, tmp_path: Path, later_features: None
) -> None:
    path = tmp_path / "password"
    path.write_bytes(content)
    config = parse(SERVER, {"NODEPASS_PASSWORD_FILE": str(path)})
    assert config.password is not None
    assert config.password.reveal() == password


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "is empty or too long"),
        (b"\n", "is empty or too long"),
        (b"x" * 1027, "is empty or too long"),
        (b"\xff\n", "not UTF-8"),
    ],
)
def test_bad_password_files(content: bytes, says: str, tmp_path: Path) -> None:
    path = tmp_path / "password"
    path.write_bytes(content)
    error = refusal(SERVER, {"NODEPASS_PASSWORD_FILE": str(path)})
    assert error.option == "NODEPASS_PASSWORD_FILE"
    assert says in error.message


@pytest.mark.parametrize("path", ["/no/such/file", "/", "", "\0"])
def test_unreadable_password_files_are_named(path: str) -> None:
    error = refusal(SERVER, {"NODEPASS_PASSWORD_FILE": path})
    assert error.option == "NODEPASS_PASSWORD_FILE"
    assert f"cannot read {path!r}: " in error.message


def test_two_passwords_in_the_environment() -> None:
    error = refusal(SERVER, {"NODEPASS_PASSWORD": "a", "NODEPASS_PASSWORD_FILE": "b"})
    assert error.option == "NODEPASS_PASSWORD"
    assert "keep one" in error.message


def test_an_empty_password_in_the_environment() -> None:
    assert refusal(SERVER, {"NODEPASS_PASSWORD": ""}).option == "NODEPASS_PASSWORD"


def test_compat_against_a_password() -> None:
    error = refusal("server://pw@h:1/t:2?compat=1")
    assert error.option == "compat"


def test_secrets_do_not_show() -> None:
    secret = Secret("hunter2")
    shown = [repr(secret), str(secret), f"{secret}", f"{secret:>9}", "%s" % secret]  # noqa: UP031
    assert set(shown) == {"***"}
    assert secret.reveal() == "hunter2"
    assert secret == Secret("hunter2")
    assert hash(secret) == hash(Secret("hunter2"))
    assert secret != Secret("other")
    assert secret != "hunter2"
    for write in (pickle.dumps, copy.copy, json.dumps):
        with pytest.raises(TypeError):
            write(secret)


def test_a_config_shows_no_password(later_features: None) -> None:
    config = parse("client://hunter2@h:1/t:2?log=debug")
    assert config.url == "client://***@h:1/t:2?log=debug&compat=0"
    assert "hunter2" not in repr(config) + str(config)


# --- the URL for display -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        (SERVER, SERVER),
        (f"{SERVER}?log=info&compat=1", SERVER),
        (f"{SERVER}?compat=0&log=warn&data=7", f"{SERVER}?log=warn&compat=0&data=7"),
        (f"{CLIENT}?name=x&log=none", f"{CLIENT}?log=none"),
        ("client://:1/[::1]:2", "client://localhost:1/[::1]:2"),
    ],
)
def test_url(url: str, shown: str) -> None:
    assert parse(url).url == shown


def test_url_of_later_features(later_features: None) -> None:
    url = f"{SERVER}?tls=2&crt=a.pem&key=b.pem&udp=1"
    assert parse(url).url == url
    assert parse(f"{CLIENT}?tls=1&ca=x&sni=y&tcp=0&udp=1").url.endswith(
        "?tls=1&ca=x&sni=y&tcp=0&udp=1"
    )


@given(
    st.builds(
        "{}://{}{}:{}/{}:{}{}".format,
        st.sampled_from(["server", "client", "x"]),
        st.sampled_from(["", "p@", "%", "@"]),
        st.text(max_size=9),
        st.integers(-1, 70000),
        st.text(max_size=9),
        st.integers(-1, 70000),
        st.text(max_size=20).map("?".__add__),
    )
)
def test_no_url_raises_anything_else(url: str) -> None:
    try:
        config = parse(url)
    except ConfigError as exc:
        assert "\n" not in str(exc)
    else:
        assert parse(config.url).url == config.url


# --- several tunnels -----------------------------------------------------------------------------


def test_listeners() -> None:
    assert parse(CLIENT).listeners == ()
    assert parse(f"{SERVER}?data=7").listeners == (
        ("tunnel", Address("127.0.0.1", 10101)),
        ("target", Address("127.0.0.1", 8080)),
        ("data", Address("127.0.0.1", 7)),
    )


@pytest.mark.parametrize(
    ("urls", "option"),
    [
        ((SERVER, SERVER), "tunnel"),
        (("server://:1/:2", "server://:3/:2"), "target"),
        (("server://:1/:2", "server://a:4/b:5?data=1"), "data"),
    ],
)
def test_tunnels_that_meet(urls: tuple[str, ...], option: str) -> None:
    with pytest.raises(ConfigError) as caught:
        check_together(parse(url) for url in urls)
    assert caught.value.option == option
    assert "use another port" in caught.value.message


def test_tunnels_that_get_along() -> None:
    check_together(parse(url) for url in (SERVER, CLIENT, CLIENT, "server://127.0.0.1:1/h:2"))


def test_the_table_names_every_parameter_of_a_config() -> None:
    assert {p.name for p in PARAMETERS} <= set(Config.__slots__)


def test_one_table_for_the_log_levels() -> None:
    from nodepass.log import LEVELS

    assert tuple(LEVELS) == module.LEVELS
