"""config: every URL form, every parameter, every refusal, and that no secret shows."""

from __future__ import annotations

import traceback
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from nodepass.config import parameters
from nodepass.config import url as module
from nodepass.config.address import Address
from nodepass.config.parameters import PARAMETERS, Mode
from nodepass.config.url import (
    Config,
    Secret,
    Settings,
    check_together,
    label_together,
    parse_host,
)
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
        udp=True,
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
        *((f"{SERVER}?log={level}", "log", level) for level in parameters.LEVELS),
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
        (f"{SERVER}?tls=1", "tls", 1),
        (f"{SERVER}?tls=2&crt=a.pem&key=b.pem", "tls", 2),
        (f"{SERVER}?tls=2&crt=/a%20b@c.pem&key=b.pem", "crt", "/a b@c.pem"),
        (f"{SERVER}?key=b.pem&crt=a.pem&tls=2", "key", "b.pem"),
        (f"{CLIENT}?tls=1", "tls", 1),
        (f"{CLIENT}?tls=2", "tls", 2),
        (f"{CLIENT}?ca=a.pem", "ca", "a.pem"),
        (f"{CLIENT}?ca=a.pem", "tls", 2),
        (f"{CLIENT}?sni=example.org", "sni", "example.org"),
        (f"{CLIENT}?sni=example.org", "tls", 2),
        (f"{CLIENT}?tls=2&ca=a.pem&sni=::1", "tls", 2),
        (f"{CLIENT}?tls=2&ca=a.pem&sni=::1", "sni", "::1"),
        (f"{CLIENT}?sni=b%C3%BCcher.example.", "sni", "xn--bcher-kva.example"),
    ],
)
def test_parameters(url: str, field: str, value: object) -> None:
    assert getattr(parse(url), field) == value


def test_environment_and_settings_of_the_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SEMAPHORE_LIMIT", "7")
    assert Config.parse(SERVER).settings.semaphore_limit == 7
    given_settings = Settings(semaphore_limit=9)
    assert Config.parse(SERVER, settings=given_settings).settings is given_settings
    with pytest.raises(ConfigError, match="NODEPASS_SEMAPHORE_LIMIT"):
        Config.parse(SERVER, {"NODEPASS_SEMAPHORE_LIMIT": "x"})


# --- what is refused -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("url", "option", "says"),
    [
        ("", "url", "starts neither"),
        ("127.0.0.1:1/127.0.0.1:2", "url", "starts neither"),
        ("serve://a:1/b:2", "url", "mode 'serve' is unknown; it is server:// or client://"),
        ("server:pw@a://b:2", "url", "its mode is server:// or client://"),
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
        ("server://a:1/b:2/", "target", "ends in a '/'; leave it out"),
        ("server://a:1/b:2/?log=debug", "target", "ends in a '/'; leave it out"),
        ("server://a:1/b:2/x", "target", "has a path"),
        ("server://a:1/b:2//", "target", "has a path"),
        ("server://a:1//b:2", "target", "begins with a second '/'"),
        ("client://a:1/http://b:2", "target", "is an address, not a URL"),
        ("client://http://a:1/b:2", "tunnel", "is an address, not a URL"),
        ("server://a:1/b:2\r", "url", "ends in a carriage return"),
        ("server://a:1/b:2?log=debug\r", "url", "ends in a carriage return"),
        ("server://a:1/b:2\r\n", "url", "has a carriage return"),
        ("server://a:1/b:2\n", "url", "ends in a line end"),
        ("server://a:1/b:2 ", "url", "ends in a blank"),
        ("server://p w@a:1/b:2", "url", "write it as %20"),
        ("server://a:1/b:2\u200b", "url", "invisible"),
        ("server://a:1/b:2\u00a0", "url", "ends in a blank"),
        ("\ufeffserver://a:1/b:2", "url", "begins with a byte order mark"),
        ("'server://a:1/b:2'", "url", "begins with a quotation mark"),
        ('"server://a:1/b:2"', "url", "begins with a quotation mark"),
        ("\u201cserver://a:1/b:2\u201d", "url", "begins with a quotation mark"),
        ("sever://a:1/b:2", "url", "did you mean server://?"),
        ("cilent://a:1/b:2", "url", "did you mean client://?"),
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
        (f"{SERVER}?compat=0&data=7", "data", "is for seed peers, and compat=0 shuts them out"),
        (f"{SERVER}?compat=0&data=0", "data", "leave it out"),
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
        (f"{SERVER}?ca=a.pem", "ca", "is a parameter of the client, not of the server"),
        (f"{SERVER}?sni=x", "sni", "is a parameter of the client, not of the server"),
        (f"{CLIENT}?tls=2&key=x", "key", "is a parameter of the server, not of the client"),
        (f"{CLIENT}?tls=0&ca=a.pem", "ca", "needs tls=2, but tls=0 is given; leave one of"),
        (f"{CLIENT}?sni=x&tls=1", "sni", "needs tls=2, but tls=1 is given; leave one of"),
        (f"{CLIENT}?ca=", "ca", "it needs a value"),
        (f"{CLIENT}?sni=", "sni", "it needs a value"),
        (f"{CLIENT}?sni=x:443", "sni", "is no host name and no IP address"),
        (f"{CLIENT}?sni=*.example.org", "sni", "is no host name and no IP address"),
        (f"{CLIENT}?name=a@b", "url", "write the '@' as %40"),
        (f"{SERVER}?a@b", "url", "write the '@' as %40"),
        ("server://a%40b:1/c:2", "tunnel", "has a character that no host and no port has"),
        ("server://a=b:1/c:2", "tunnel", "has a character that no host and no port has"),
        ("server://a:1/[b:2", "target", "unfinished bracket"),
        ("server://a:b:1/c:2", "tunnel", "is not host:port; an IPv6 address needs brackets"),
        ("server://2001:db8::1:1/c:2", "tunnel", "an IPv6 address needs brackets"),
        ("server://1.2.3:1/c:2", "tunnel", "'1.2.3' is not an IPv4 address"),
        (f"{CLIENT}?tcp=0&udp=0", "tcp", "nothing is left to carry"),
    ],
)
def test_refusals(url: str, option: str, says: str) -> None:
    error = refusal(url)
    assert error.option == option
    assert says in error.message


@pytest.mark.parametrize(
    ("text", "host"),
    [
        ("example.org", "example.org"),
        ("Example.org.", "Example.org"),
        ("my_service", "my_service"),
        ("bücher.example", "xn--bcher-kva.example"),
        ("straße.example.", "xn--strae-oqa.example"),
        ("10.0.0.1", "10.0.0.1"),
        ("::1", "::1"),
        ("[2001:DB8::1]", "2001:db8::1"),
    ],
)
def test_hosts_without_a_port(text: str, host: str) -> None:
    assert parse_host("sni", text) == host


def test_c09_a_server_name_that_is_none() -> None:
    assert "'☃.net' is not a host name: codepoint U+2603" in refusal(f"{CLIENT}?sni=☃.net").message


@pytest.mark.parametrize(
    "text",
    ["", ".", "a:1", "[::1]:1", "[::1", "fe80::1%eth0", "1.2.3", "a b", "-a", "a/b", "*.a",
     "https://secret@h:1", "'", "$(id)", "a\0", "\ud800"],
)  # fmt: skip
def test_what_is_no_host(text: str) -> None:
    with pytest.raises(ConfigError, match="no host name and no IP address") as caught:
        parse_host("HOST", text)
    assert caught.value.option == "HOST"
    assert "secret" not in everything_about(caught.value)


# --- passwords -----------------------------------------------------------------------------------


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
def test_passwords_in_the_url(written: str, password: str) -> None:
    config = parse(f"client://{written}@h:1/t:2")
    assert config.password == Secret(password)
    assert config.tunnel == Address("h", 1)
    assert config.compat is False


@pytest.mark.parametrize(
    ("url", "option", "says"),
    [
        ("client://@h:1/t:2", "password", "is empty"),
        (f"client://topsecret{'x' * 1025}@h:1/t:2", "password", "is too long"),
        ("client://topsecret%@h:1/t:2", "password", "write it as %25"),
        ("client://topsecret%ff@h:1/t:2", "password", "UTF-8"),
        ("client://top\udcffsecret@h:1/t:2", "url", "control character"),
        ("client://top secret@h:1/t:2", "url", "blank"),
        ("client://top#secret@h:1/t:2", "url", "%23"),
        ("client://top/secret@h:1/t:2", "url", "%2F"),
        ("client://top?secret@h:1/t:2", "url", "%3F"),
        ("client://to/p?secret@h:1/t:2", "url", "%3F"),
        ("client://to/p?sec=ret@h:1/t:2", "url", "%3F"),
        ("client://to?crt=secret@h:1/t:2", "url", "%3F"),
        ("client://top:1/secret:2?log=x@h:1/t:2", "url", "%3F"),
        ("client://topsecret:h:1/t:2", "tunnel", "a password before it ends in '@'"),
        ("client://topsecret%40h:1/t:2", "tunnel", "a password before it ends in '@'"),
        ("topsecret@client://h:1/t:2", "url", "its mode is server:// or client://"),
        ("topsecret@h:1/t:2", "url", "starts neither"),
        ("client://topsecret@", "tunnel", "is missing"),
        ("client://topsecret@h:1", "target", "is missing"),
        ("client://topsecret@h:x/t:2", "tunnel", "port 'x'"),
        ("client://topsecret@h:1/t:2?lgo=x", "lgo", "did you mean log?"),
        ("client://h:1/t:2?password=topsecret", "password", "is not a parameter"),
        ("client://topsecret@h:1/t:2?log=x", "log", "is not a value"),
        ("client://topsecret@h:1/t:2?compat=1", "compat", "a password shuts seed peers out"),
        ("server://topsecret@h:1/t:2?data=7", "data", "and a password shuts them out"),
        ("server://topsecret@h:1/h:1", "target", "is taken"),
        ("client://topsecret@h:1/t:2?udp=2", "udp", "it may be 0 1"),
    ],
)
def test_bad_passwords_are_not_repeated(url: str, option: str, says: str) -> None:
    error = refusal(url)
    assert error.option == option
    assert says in error.message
    assert "secret" not in everything_about(error)
    assert "top" not in str(error)


def everything_about(error: BaseException | None) -> str:
    """Return whatever a careless log could show of an error and of those behind it."""
    said = ""
    while error is not None:
        shown = traceback.TracebackException.from_exception(error).format_exception_only()
        said += "".join(shown) + repr(error) + repr(error.args) + repr(vars(error))
        error = error.__context__
    return said


def test_the_url_goes_before_the_environment() -> None:
    config = parse("client://mine@h:1/t:2", {"NODEPASS_PASSWORD": "theirs"})
    assert config.password == Secret("mine")


def test_the_environment_is_not_even_read_where_the_url_has_a_password() -> None:
    assert parse("client://mine@h:1/t:2", {"NODEPASS_PASSWORD_FILE": "/no/such/file"}).password


@pytest.mark.parametrize("side", [SERVER, CLIENT])
def test_passwords_in_the_environment(side: str, tmp_path: Path) -> None:
    path = tmp_path / "password"
    path.write_text("theirs\n")
    for environ in ({"NODEPASS_PASSWORD": "theirs"}, {"NODEPASS_PASSWORD_FILE": str(path)}):
        config = parse(side, environ)
        assert config.password == Secret("theirs")
        assert config.compat is False


@pytest.mark.parametrize(
    ("query", "option", "says"),
    [
        ("compat=1", "compat", "is 1, but the password in NODEPASS_PASSWORD shuts seed peers out"),
        ("data=7", "data", "is for seed peers, and the password in NODEPASS_PASSWORD shuts them"),
    ],
)
def test_contradictions_name_the_variable(query: str, option: str, says: str) -> None:
    error = refusal(f"{SERVER}?{query}", {"NODEPASS_PASSWORD": "topsecret"})
    assert error.option == option
    assert says in error.message
    assert "topsecret" not in everything_about(error)


@pytest.mark.parametrize("text", ["", "topsecret" * 200, "topsecret\udcff"])
def test_bad_passwords_in_the_environment(text: str) -> None:
    error = refusal(SERVER, {"NODEPASS_PASSWORD": text})
    assert error.option == "NODEPASS_PASSWORD"
    assert "topsecret" not in everything_about(error)


def test_compat_against_a_password() -> None:
    error = refusal("server://pw@h:1/t:2?compat=1")
    assert error.option == "compat"


def test_a_config_shows_no_password() -> None:
    config = parse("client://hunter2@h:1/t:2?log=debug&tls=1")
    assert config.url == "client://***@h:1/t:2?log=debug&tls=1&compat=0"
    shown = [repr(config), str(config), f"{config}", repr([config]), config.url]
    assert "hunter2" not in "".join(shown)


# --- the URL for display -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        (SERVER, SERVER),
        (f"{SERVER}?log=info&compat=1", SERVER),
        (f"{SERVER}?compat=0&log=warn", f"{SERVER}?log=warn&compat=0"),
        (f"{SERVER}?data=7&log=warn", f"{SERVER}?log=warn&data=7"),
        (f"{CLIENT}?sni=x", f"{CLIENT}?tls=2&sni=x"),
        (f"{CLIENT}?ca=%C3%A4%26%25%40/b", f"{CLIENT}?tls=2&ca=ä%26%25%40/b"),
        (f"{SERVER}?tls=2&key=%E2%80%AE%20&crt=+", f"{SERVER}?tls=2&crt=+&key=%E2%80%AE%20"),
        (f"{CLIENT}?name=x&log=none", f"{CLIENT}?log=none"),
        ("client://:1/[::1]:2", "client://localhost:1/[::1]:2"),
        ("client://Straße.example:1/faß.de:2", "client://straße.example:1/faß.de:2"),
        ("client://xn--strae-oqa.example:1/t:2", "client://straße.example:1/t:2"),
        (f"{CLIENT}?sni=stra%C3%9Fe.example", f"{CLIENT}?tls=2&sni=straße.example"),
    ],
)
def test_url(url: str, shown: str) -> None:
    assert parse(url).url == shown


def test_url_of_every_parameter() -> None:
    url = f"{SERVER}?tls=2&crt=a.pem&key=b.pem&udp=0"
    assert parse(url).url == url
    assert parse(f"{CLIENT}?tls=2&ca=x&sni=y&tcp=0&udp=1").url.endswith("?tls=2&ca=x&sni=y&tcp=0")


@pytest.mark.parametrize(
    ("query", "carries"), [("", "tcp,udp"), ("?udp=0", "tcp"), ("?tcp=0", "udp")]
)
def test_carries(query: str, carries: str) -> None:
    assert parse(SERVER + query).carries == carries


AROUND = (
    "server://{}@h:1/t:2",
    "client://{}@h:1/t:2?log=x",
    "server://{}@h:1/t:2?crt=a&key=b",
    "client://{}@/t:2",
    "client://{}@h",
    "client://{}@",
    "{}@h:1/t:2",
    "{}@client://h:1/t:2",
    "client://h:1/t:2?password={}",
)


@given(st.text("ab0/?@#:%&=. [", max_size=12).map("Zq".__add__), st.sampled_from(AROUND))
@example("Zq://a", "{}@h:1/t:2")
def test_what_starts_like_a_password_is_in_no_error(password: str, url: str) -> None:
    try:
        parse(url.format(password))
    except ConfigError as exc:
        assert "Zq" not in str(exc)


@given(
    st.builds(
        "{}://{}{}:{}/{}:{}{}".format,
        st.sampled_from(["server", "client", "x"]),
        st.sampled_from(["", "p@", "%", "@"]),
        st.text(max_size=9),
        st.integers(-1, 70000),
        st.text(max_size=9),
        st.integers(-1, 70000),
        st.text(max_size=20).map("?".__add__)
        | st.text(max_size=9).map("?ca=".__add__)
        | st.text(max_size=9).map("?tls=2&key=k&crt=".__add__)
        | st.text(max_size=9).map("?sni=".__add__),
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
        ("tunnel", "tcp", Address("127.0.0.1", 10101)),
        ("target", "tcp", Address("127.0.0.1", 8080)),
        ("target", "udp", Address("127.0.0.1", 8080)),
        ("data", "tcp", Address("127.0.0.1", 7)),
    )


def test_protocols_share_a_port() -> None:
    check_together([parse("server://:1/:5?tcp=0"), parse("server://:2/:5?udp=0")])
    assert len(parse("server://:5/:5?tcp=0").listeners) == 2


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
        check_together([parse(url) for url in urls])
    assert caught.value.option == option
    assert "use another port" in caught.value.message


def test_tunnels_that_get_along() -> None:
    check_together([parse(url) for url in (SERVER, CLIENT, CLIENT, "server://127.0.0.1:1/h:2")])


@pytest.mark.parametrize(
    ("tunnel", "target"),
    [("127.0.0.1:1", "127.0.0.1:5"), ("localhost:1", ":5"), ("127.0.0.1:1", "localhost:5")],
)
def test_c10_a_client_that_leads_back_to_its_server(tunnel: str, target: str) -> None:
    urls = ("server://127.0.0.1:1/127.0.0.1:5", f"client://{tunnel}/{target}")
    for order in (urls, urls[::-1]):
        with pytest.raises(ConfigError, match=r"target: .*visitors of its server arrive"):
            check_together([parse(url) for url in order])


def test_c10_what_may_be_another_machine_is_let_pass() -> None:
    for client in ("client://other:1/other:5", "client://127.0.0.1:1/127.0.0.1:6"):
        check_together([parse("server://:1/:5"), parse(client)])


def test_the_table_names_every_parameter_of_a_config() -> None:
    assert {p.name for p in PARAMETERS} <= set(Config.__slots__)


def test_one_table_for_the_log_levels() -> None:
    from nodepass.observe.log import LEVELS

    assert tuple(LEVELS) == parameters.LEVELS


@pytest.mark.parametrize(
    ("urls", "labels"),
    [
        (["client://pw@a:1/b:2"], [None]),
        (
            ["client://pw@a:1/b:2", "client://a2:1/b:2", "server://:1/:2"],
            ["client://a:1", "client://a2:1", "server://:1"],
        ),
        (
            ["client://a:1/b:2", "client://a:1/b:3?log=debug", "client://[::1]:1/b:2"],
            ["client://a:1/b:2", "client://a:1/b:3", "client://[::1]:1"],
        ),
        (
            ["client://a:1/b:2?name=x", "client://a:1/b:2?name=y"],
            ["client://a:1/b:2#1", "client://a:1/b:2#2"],
        ),
        (["server://a:1/b:2", "client://a:1/b:2"], ["server://a:1", "client://a:1"]),
    ],
)
def test_c18_labels_tell_tunnels_apart(urls: list[str], labels: list[str | None]) -> None:
    configs = [parse(url) for url in urls]
    labelled = label_together(configs)
    assert [config.label for config in labelled] == labels
    assert [config.url for config in labelled] == [config.url for config in configs]
