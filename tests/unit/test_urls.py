"""Database URLs as users write them."""

from __future__ import annotations

import ssl
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy.engine import make_url

from agent_gateway_store.errors import InvalidUrlError
from agent_gateway_store.storage.cache import create_redis
from agent_gateway_store.storage.database import create_engine
from agent_gateway_store.storage.urls import can_listen, is_memory, parse_database_url, sqlite_file

pytestmark = pytest.mark.unit

PASSWORD = "s3cr3t-word"
CERTIFICATE = """\
-----BEGIN CERTIFICATE-----
MIIBdDCCARugAwIBAgIUVPSwDuw2fJUzxjf2ITKZ8sKDcB4wCgYIKoZIzj0EAwIw
DzENMAsGA1UEAwwEdGVzdDAgFw0yNjExMjMwNTM1NDVaGA8yMTI2MTAzMDA1MzU0
NVowDzENMAsGA1UEAwwEdGVzdDBZMBMGByqGSM49AgEGCCqGSM49AwEHA0IABGut
HuTHoxgJTd5cvYwyOZr6GfQfYxoLUdiC1aQNfhtDhXgN3+E0p/KyBwymrfPBlPLQ
VLDBy/3TA+ZpRz0zmDqjUzBRMB0GA1UdDgQWBBRA6w6Anr1Bn3qBLdq4VFtILbXs
yDAfBgNVHSMEGDAWgBRA6w6Anr1Bn3qBLdq4VFtILbXsyDAPBgNVHRMBAf8EBTAD
AQH/MAoGCCqGSM49BAMCA0cAMEQCIFWKbtuDg78pbaU0YYWZkPlWccSUgAamAHFk
f6MBhiinAiAvLzqtYn5DEsP2LhLDRdgJtJNaN7oItu1bpq7CmpH4FA==
-----END CERTIFICATE-----
"""
ENCRYPTED_KEY = """\
-----BEGIN ENCRYPTED PRIVATE KEY-----
MIHsMFcGCSqGSIb3DQEFDTBKMCkGCSqGSIb3DQEFDDAcBAg27u0ij5eNmAICCAAw
DAYIKoZIhvcNAgkFADAdBglghkgBZQMEASoEEEfLv/x1KWMqodjrAtuR+iMEgZDJ
XlXh91GuZ/hu/73mnM8C3eNvllE4DodDA5VMQWMEzZwPSiTduzw5SaEzbOITulhR
KiykoHJKkdlftMuM9K4PdIkOt3DO76hppdGpkOrs7JrZQKQp+mI9kmv8OSjOb2HM
dbTWjwBhA6LCnozbNFoTwHSUunCJTmhdSdy75T7xoOFlba1AQj4IvK/nzWJw8Hc=
-----END ENCRYPTED PRIVATE KEY-----
"""


@pytest.mark.parametrize(
    ("text", "driver"),
    [
        ("postgres://u:p@host/db", "postgresql+asyncpg"),
        ("postgresql://u:p@host/db", "postgresql+asyncpg"),
        ("postgresql+asyncpg://u:p@host/db", "postgresql+asyncpg"),
        ("sqlite:///gateway.db", "sqlite+aiosqlite"),
        ("sqlite+aiosqlite:///gateway.db", "sqlite+aiosqlite"),
    ],
)
def test_every_usual_spelling_gets_our_driver(text: str, driver: str) -> None:
    url, arguments = parse_database_url(text)

    assert url.drivername == driver
    assert url.database == make_url(text).database
    assert arguments == {}


@pytest.mark.parametrize(
    "text", ["sqlite://", "sqlite:///:memory:", "sqlite:///file:x?mode=memory&cache=shared&uri=true"]
)
def test_databases_in_memory_are_recognised(text: str) -> None:
    assert is_memory(parse_database_url(text)[0])
    assert not is_memory(parse_database_url("sqlite:///gateway.db")[0])
    assert not is_memory(parse_database_url("postgresql://host/db")[0])


def test_sslmode_reaches_the_driver() -> None:
    """libpq's word, under its name or asyncpg's, becomes the driver's argument and leaves the URL."""
    for name, mode in (("sslmode", "disable"), ("sslmode", "verify-full"), ("ssl", "require")):
        url, arguments = parse_database_url(f"postgresql://u:p@host/db?{name}={mode}")
        assert (arguments, url.query) == ({"ssl": mode}, {})


@pytest.mark.parametrize(("mode", "checks_name"), [("require", False), ("verify-ca", False), ("verify-full", True)])
def test_a_root_certificate_is_what_the_server_is_verified_with(tmp_path: Path, mode: str, checks_name: bool) -> None:
    """With `sslrootcert`, `require` verifies as in libpq, and only verify-full checks the host name."""
    root = tmp_path / "root.crt"
    root.write_text(CERTIFICATE)
    for name in ("sslmode", "ssl"):
        _, arguments = parse_database_url(f"postgresql://u:p@host/db?{name}={mode}&sslrootcert={root}")
        context = arguments["ssl"]
        assert isinstance(context, ssl.SSLContext)
        assert (context.verify_mode is ssl.CERT_REQUIRED, context.check_hostname) == (True, checks_name)
        assert len(context.get_ca_certs()) == 1


@pytest.mark.parametrize(
    ("query", "sentence"),
    [
        ("ssl=require&sslmode=disable", "ssl and sslmode in the database URL are the same"),
        ("sslkey={0}", "sslkey in the database URL has no effect without sslcert"),
        ("sslrootcert={0}", "not required: add sslmode=verify-full, or remove sslrootcert"),
        ("ssl=prefer&sslrootcert={0}", "not required: set ssl=verify-full, or remove sslrootcert"),
        ("sslmode=disable&sslrootcert={0}", "sslrootcert in the database URL has no effect where TLS is not .*: set"),
        ("sslmode=prefer&sslcert={0}", "sslcert in the database URL has no effect .* or remove sslcert"),
    ],
)
def test_what_would_verify_nothing_is_refused(tmp_path: Path, query: str, sentence: str) -> None:
    """Two words for TLS, of which one would win, and certificates that nobody would look at."""
    root = tmp_path / "root.crt"
    root.write_text(CERTIFICATE)
    with pytest.raises(InvalidUrlError, match=sentence):
        parse_database_url(f"postgresql://u:p@host/db?{query.format(root)}")


def test_other_parameters_of_libpq_are_taken() -> None:
    """`connect_timeout` and `application_name` become the driver's; 0 seconds wait for ever."""
    _, arguments = parse_database_url("postgresql://host/db?connect_timeout=3&application_name=my%20gateway")
    _, forever = parse_database_url("postgresql://host/db?connect_timeout=0")

    assert arguments == {"timeout": 3.0, "server_settings": {"application_name": "my gateway"}}
    assert forever == {"timeout": None}


@pytest.mark.parametrize("word", ["1", "TRUE"])
def test_pgbouncer_switches_prepared_statements_off(word: str) -> None:
    """No cache, and no names, which the next client of the server connection would meet."""
    url, arguments = parse_database_url(f"postgresql://host/db?pgbouncer={word}")
    name: Any = arguments.pop("prepared_statement_name_func")

    assert arguments == {"statement_cache_size": 0, "prepared_statement_cache_size": 0}
    assert name() == ""
    assert url.query == {"target_session_attrs": "any"}


@pytest.mark.parametrize(
    ("hosts", "wanted", "asked"),
    [("a", "", None), ("a", "primary", "primary"), ("a,b", "", "read-write"), ("a,b", "standby", None)],
)
def test_what_pgbouncer_reports_of_its_server_is_not_believed(hosts: str, wanted: str, asked: str | None) -> None:
    """It reports for ever what the server was at first, so for writes the server is asked."""
    text = f"postgresql://{hosts}/db?pgbouncer=true" + (f"&target_session_attrs={wanted}" if wanted else "")
    url, arguments = parse_database_url(text)

    assert arguments.get("ask_for") == asked
    assert url.query == {"target_session_attrs": "standby" if wanted == "standby" else "any"}


def test_special_characters_in_a_password_survive() -> None:
    url, _ = parse_database_url("postgresql://us%40er:p%40ss%2Fw%3Ard%25@host:6543/db")

    assert (url.username, url.password, url.host, url.port) == ("us@er", "p@ss/w:rd%", "host", 6543)


@pytest.mark.parametrize(
    ("text", "hosts", "ports"),
    [
        ("postgresql://u:p%2C@h1:5433,h2/db", ["h1", "h2"], [5433, 5432]),
        ("postgresql://u@[::1]:1,[fe80::2]/db?sslmode=disable", ["::1", "fe80::2"], [1, 5432]),
        ("postgresql:///db?host=a,b&port=1,2", ["a", "b"], [1, 2]),
        ("postgresql:///db?host=a,b&port=9", ["a", "b"], [9, 9]),
        ("postgresql:///db?host=a:1&host=b:2", ["a", "b"], [1, 2]),
        ("postgresql:///db?host=/run/one,/run/two", ["/run/one", "/run/two"], [5432, 5432]),
    ],
)
@pytest.mark.parametrize("wanted", [None, "any"])
def test_several_hosts_are_taken_as_libpq_takes_them(
    text: str, hosts: list[str], ports: list[int], wanted: str | None
) -> None:
    """In the place of the host or as a parameter; the one that takes writes is looked for, unless the URL says else."""
    if wanted:
        text += f"{'&' if '?' in text else '?'}target_session_attrs={wanted}"
    url, arguments = parse_database_url(text)

    assert (arguments["host"], arguments["port"]) == (hosts, ports)
    assert url.query == {"target_session_attrs": wanted or "read-write"}
    assert url.database == "db"


def test_one_host_with_a_comma_elsewhere_stays_one() -> None:
    url, arguments = parse_database_url("postgresql://u:a,b@host:6543/db?application_name=x,y")

    assert (url.password, url.host, url.port) == ("a,b", "host", 6543)
    assert "host" not in arguments


@pytest.mark.parametrize(
    ("text", "listens"),
    [
        ("postgresql://h/db", True),
        ("postgresql://h/db?listen=true&pgbouncer=false", True),
        ("postgresql://h/db?sslmode=disable&listen=FALSE", False),
        ("postgresql://h/db?pgbouncer=true", False),
    ],
)
def test_a_url_says_where_there_is_no_listen(text: str, listens: bool) -> None:
    parse_database_url(text)

    assert can_listen(text) is listens


REDIS_URLS = [
    *(f"http://user:{PASSWORD}@host", f"redis://:{PASSWORD}@host:port/0", "host:6379", ""),
    *(f"redis://:{PASSWORD}@host/0?no_such_parameter=1", f"redis://:{PASSWORD}@host/0?socket_timeout=soon"),
    *(f"rediss://:{PASSWORD}@host/0?ssl_cert_reqs=", f"redis://:{PASSWORD}@host/0?no_such_parameter"),
    *(f"rediss://:{PASSWORD}@host/0?ssl_cert_reqs=bogus", f"redis://:{PASSWORD}@host/0?protocol=9"),
    f"rediss://:{PASSWORD}@host/0?ssl_ca_certs=/no/such/file",
    f"redis+sentinel://:{PASSWORD}@host:26379/name/0?sentinel_password=",
    f"redis://user:12?{PASSWORD}@host/0",
    *(f"redis://:{PASSWORD}@host/production", f"rediss://:{PASSWORD}@host/1/2"),
]
DATABASE_URLS = [
    "",
    "gateway.db",
    f"user:{PASSWORD}@host/db",
    f"postgresql:/user:{PASSWORD}@host/db",
    f"postgresql://user:{PASSWORD}@host:port/db",
    f"mysql://user:{PASSWORD}@host/db",
    f"postgresql://user:{PASSWORD}@host/db?sslmode=maybe",
    f"postgresql://user:{PASSWORD}@host/db?connect_timeout=soon",
    f"postgresql://user:{PASSWORD}@host/db?sslmode=verify-full&sslrootcert=/no/such/file",
    f"postgresql://user:{PASSWORD}@host/db?foo={PASSWORD}",
    f"postgresql://user:{PASSWORD}@host/db?pgbouncer=maybe",
    f"postgresql://user:{PASSWORD}@host/db?port=soon",
    f"postgresql://user:{PASSWORD}@host/db?sslmode=disable&sslmode=require",
    f"postgresql://user:{PASSWORD}@host/db?target_session_attrs=best",
    f"postgresql://user:{PASSWORD}@host,/db",
    f"postgresql://user:{PASSWORD}@host:one,other/db",
    f"postgresql://user:{PASSWORD}@host:65536,other/db",
    f"postgresql://user:{PASSWORD}@host,other/db?host=third",
    f"postgresql://user:{PASSWORD}@host:1,other:2/db?port=3",
    f"postgresql://user:{PASSWORD}@/db?host=a,b&port=1,2,3",
    f"postgresql://user:{PASSWORD}@/db?host=a&port=1,2",
    f"postgresql://user:{PASSWORD}@host/db?sslmode=",
    f"postgresql://user:{PASSWORD}@host/db?bogus",
    f"postgresql://user:a@b?{PASSWORD}@host/db",
    f"postgresql://user:a@b?{PASSWORD}&c=d@host/db",
    "sqlite://host,other/gateway.db",
    "sqlite://gateway.db",
    f"sqlite://user:{PASSWORD}@host/gateway.db",
    "sqlite:///gateway.db?mode=ro",
    "sqlite:///gateway.db?uri=true",
    "sqlite:///gateway.db?timeout=1",
    "sqlite:///a?b.db",
    "sqlite:///file:gateway.db?mode=&uri=true",
    "sqlite:///file:gateway.db",
    "sqlite:///file:gateway.db?mode=ro",
    "sqlite:///file:gateway.db?mode=ro&mode=rw&uri=true",
    "sqlite:///file:gateway.db?nolock=1&uri=true",
    "sqlite:///file:gateway.db?cache=shared&uri=true",
]


@pytest.mark.parametrize(
    ("create", "text"), [(create_engine, url) for url in DATABASE_URLS] + [(create_redis, url) for url in REDIS_URLS]
)
def test_what_cannot_be_used_is_refused_in_one_sentence(create: Callable[[str], object], text: str) -> None:
    """At once: InvalidUrlError, which is a ValueError too, says what to write and never repeats a password."""
    with pytest.raises(InvalidUrlError) as caught:
        create(text)

    assert isinstance(caught.value, ValueError)
    assert PASSWORD not in f"{caught.value}{caught.value!r}{caught.value.__cause__!r}"
    assert caught.value.__suppress_context__ or caught.value.__context__ is None
    assert str(caught.value).endswith(".")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("create", "text", "sentence"),
    [
        (create_engine, "postgresql://h/d?sslmode=", "sslmode in the database URL has no value: give it one, or leave"),
        (create_engine, "postgresql://h/d?bogus", "The parameter 'bogus' in the database URL is not supported: remove"),
        (create_engine, "sqlite:///a?b.db", r"'b\.db' in the database URL is not .*a question mark .* is written %3F"),
        (create_redis, "redis://h/0?ssl_cert_reqs=", r"ssl_cert_reqs=' has a parameter without a value: give it one"),
    ],
)
def test_a_parameter_without_a_value_is_named(create: Callable[[str], object], text: str, sentence: str) -> None:
    """As of a variable that is empty: what it was to say, such as that TLS is a must, would not hold."""
    with pytest.raises(InvalidUrlError, match=sentence):
        create(text)


@pytest.mark.parametrize(
    ("create", "text", "sentence"),
    [
        (create_engine, "postgresql://h/d?sslmode=require&sslcert={0}&sslkey={1}", "a key must not be encrypted"),
        (create_redis, "rediss://h/0?ssl_certfile={0}&ssl_keyfile={1}", "give ssl_password for a key that is encrypt"),
    ],
)
def test_nobody_is_asked_for_the_password_of_a_key(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, create: Callable[[str], object], text: str, sentence: str
) -> None:
    """OpenSSL would ask on the terminal, with the gateway standing still, unless it is given one."""
    given: list[Any] = []
    real = ssl.SSLContext.load_cert_chain

    def load(context: ssl.SSLContext, certfile: Any, keyfile: Any = None, password: Any = None) -> None:
        given.append(password)
        real(context, certfile, keyfile, "" if password is None else password)

    monkeypatch.setattr(ssl.SSLContext, "load_cert_chain", load)
    for name, content in (("cert", CERTIFICATE), ("key", ENCRYPTED_KEY)):
        (tmp_path / name).write_text(content)

    with pytest.raises(InvalidUrlError, match=sentence):
        create(text.format(tmp_path / "cert", tmp_path / "key"))
    assert given
    assert None not in given


def test_a_question_mark_in_the_path_of_a_file_is_written_encoded() -> None:
    url, _ = parse_database_url("sqlite:///a%3Fb.db")

    assert url.database == "a?b.db"
    assert sqlite_file(url) == Path("a?b.db")
    assert sqlite_file(parse_database_url("sqlite:///file:a.db?mode=ro&uri=true")[0]) == Path("a.db")


@pytest.mark.parametrize(
    ("name", "file"),
    [("a%2520b.db", "a b.db"), ("///x/a.db", "/x/a.db"), ("//localhost/x/a.db", "/x/a.db"), ("a.db%23part", "a.db")],
)
def test_a_uri_of_sqlite_names_the_file_that_sqlite_opens(name: str, file: str) -> None:
    assert sqlite_file(parse_database_url(f"sqlite:///file:{name}?uri=true")[0]) == Path(file)


@pytest.mark.parametrize(
    "text", ["redis://host", "redis://host/", "rediss://user:p@host:6380/1", "unix:///run/redis.sock?db=1"]
)
def test_redis_urls_are_taken(text: str) -> None:
    assert create_redis(text).connection_pool.connection_kwargs["socket_timeout"] == 0.2


def test_clients_of_redis_hide_passwords() -> None:
    for text in (f"redis://u:{PASSWORD}@h/0", f"redis+sentinel://:{PASSWORD}@h/name?sentinel_password={PASSWORD}"):
        client = create_redis(text)
        assert PASSWORD not in f"{client!r}{client.connection_pool!r}"


def test_engines_hide_parameters_and_passwords() -> None:
    engine = create_engine(f"postgresql://user:{PASSWORD}@host/db")

    assert PASSWORD not in repr(engine)
    assert engine.sync_engine.hide_parameters
    assert create_engine("sqlite://").sync_engine.hide_parameters
