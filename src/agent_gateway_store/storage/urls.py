"""Database URLs as users write them."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from ssl import CERT_NONE, VERIFY_X509_STRICT, SSLContext, create_default_context
from typing import Any
from urllib.parse import unquote_to_bytes

from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import ArgumentError

from agent_gateway_store._text import code_text
from agent_gateway_store.errors import InvalidUrlError
from agent_gateway_store.settings import mask_url

_ASYNC_DRIVERS = {
    "postgres": "postgresql+asyncpg",
    "postgresql": "postgresql+asyncpg",
    "postgresql+asyncpg": "postgresql+asyncpg",
    "sqlite": "sqlite+aiosqlite",
    "sqlite+aiosqlite": "sqlite+aiosqlite",
}
_EXAMPLES = "write sqlite:///gateway.db or postgresql://user:password@host/database"
_NO_HOST = "A SQLite URL has no host: write sqlite:///gateway.db, with three slashes."
_TRUE, _FALSE = ("1", "true", "yes", "on"), ("0", "false", "no", "off")
_SSL_MODES = ("disable", "allow", "prefer", "require", "verify-ca", "verify-full")
# Ours, libpq's, and what SQLAlchemy and asyncpg take as text, with the values where they are few. Anything else fails
# at the first connection, with an error of theirs.
_POSTGRESQL: dict[str, tuple[str, ...]] = {
    "application_name": (),
    "connect_timeout": (),
    "host": (),
    "listen": (*_TRUE, *_FALSE),
    "passfile": (),
    "password": (),
    "pgbouncer": (*_TRUE, *_FALSE),
    "port": (),
    "prepared_statement_cache_size": (),
    "ssl": _SSL_MODES,
    "sslcert": (),
    "sslkey": (),
    "sslmode": _SSL_MODES,
    "sslrootcert": (),
    "target_session_attrs": ("any", "primary", "standby", "read-write", "read-only", "prefer-standby"),
    "user": (),
}
# What comes before several hosts, these, and what comes after them. A single host is left to SQLAlchemy.
_SEVERAL_HOSTS = re.compile(r"(?s)([\w+]+://(?:[^/?]*@)?)([^/?@]*,[^/?@]*)([/?].*)?")
# A name or address, with brackets where it holds colons, and a port.
_HOST = re.compile(r"(\[[0-9A-Fa-f:.%]+\]|[^\[\]:]+|/.*?)(?::(\d+))?")
_PORT = "5432"
_PARAMETER = re.compile(r"[?&](\w+)=([^&]*)")
_URI_PATH = re.compile(r"^file:(//(localhost)?(?=/))?")
# SQLite itself ignores what it does not know, and what comes after a name that does not begin with `file:`.
_SQLITE: dict[str, tuple[str, ...]] = {
    "uri": (*_TRUE, *_FALSE),
    "mode": ("ro", "rw", "rwc", "memory"),
    "cache": ("private", "shared"),
}


def parse_database_url(text: str | URL, *, reads: bool = False) -> tuple[URL, dict[str, Any]]:
    """Return the SQLAlchemy URL with our async driver, and the driver's connect arguments.

    Takes `postgresql://`, `postgres://` and `sqlite:///` (or `sqlite:///file:name?mode=ro&uri=true`); of libpq several
    hosts, `target_session_attrs` (`read-write` for several hosts), `sslmode` (or `ssl`), `sslrootcert`, `sslcert`,
    `sslkey`, `connect_timeout` (seconds) and `application_name`; `pgbouncer=true` for PgBouncer in transaction mode,
    which switches the caching of prepared statements off and makes their names unique; and `listen=false` where there
    is no LISTEN and NOTIFY.

    Args:
        text: The URL.
        reads: It is only read there: without `target_session_attrs` a standby is right, of several hosts the first
            standby that answers, else the primary.

    Raises:
        InvalidUrlError: The text is not a URL, names a database that is not supported, or has a parameter or a value
            that would be ignored, or fail later. The message never repeats a password.
    """
    several = _SEVERAL_HOSTS.fullmatch(text) if isinstance(text, str) else None
    try:
        # With values that are empty, as of a variable that is not set: dropped, `sslmode=` would ask for no TLS.
        url = make_url(f"{several[1]}{several[3] or ''}" if several else text, keep_blank_values=True)
    except (ArgumentError, ValueError):
        raise InvalidUrlError(f"{code_text(mask_url(str(text)))} is not a database URL: {_EXAMPLES}.") from None
    driver = _ASYNC_DRIVERS.get(url.drivername)
    if driver is None:
        raise InvalidUrlError(f"The URL scheme {code_text(url.drivername)} is not supported: {_EXAMPLES}.")
    url = url.set(drivername=driver)
    if url.get_backend_name() == "sqlite":
        if several:
            raise InvalidUrlError(_NO_HOST)
        _require_sqlite(url)
        return url, {}
    return _postgresql(url, several[2].split(",") if several else [], reads=reads)


def can_listen(url: str | URL) -> bool:
    """True unless a database URL says that there is no LISTEN and NOTIFY."""
    given = dict(_PARAMETER.findall(str(url).lower()))
    return given.get("listen") not in _FALSE and given.get("pgbouncer") not in _TRUE


def is_memory(url: URL) -> bool:
    """True for a SQLite database that lives in memory only."""
    return url.get_backend_name() == "sqlite" and (
        url.database in (None, "", ":memory:") or url.query.get("mode") == "memory" or ":memory:" in str(url.database)
    )


def sqlite_file(url: URL) -> Path | None:
    """Return the file of a SQLite URL; None for another database, and for one in memory."""
    if url.get_backend_name() != "sqlite" or is_memory(url) or not url.database:
        return None
    if not url.database.startswith("file:"):
        return Path(url.database)
    # SQLite also takes `file:name?mode=ro`, of which only the name is a path: with %20 for a space, and after the name
    # of this machine where it begins with two slashes.
    name = _URI_PATH.sub("", url.database).partition("?")[0].partition("#")[0]
    return Path(os.fsdecode(unquote_to_bytes(name)))


def real_sqlite_file(url: URL) -> Path | None:
    """Return the file that `sqlite_file` leads to, the same for whichever link or URL names it."""
    file = sqlite_file(url)
    return file and Path(os.path.realpath(file))


def _require_sqlite(url: URL) -> None:
    if url.host or url.username or url.port:
        raise InvalidUrlError(_NO_HOST)
    query = _values(url, _SQLITE)
    is_uri, is_file = query.get("uri", "").lower() in _TRUE, str(url.database).startswith("file:")
    if is_uri != is_file or (query and not is_uri):
        raise InvalidUrlError(
            "Parameters of a SQLite URL need a name that begins with file: and uri=true, or have no effect: "
            "write sqlite:///file:gateway.db?mode=ro&uri=true."
        )
    if query.get("cache") == "shared" and not is_memory(url):
        raise InvalidUrlError("cache=shared in the database URL makes writers fail at once: remove it.")


def _values(url: URL, taken: Mapping[str, tuple[str, ...]], *, repeated: tuple[str, ...] = ()) -> dict[str, str]:
    """Return the parameters of a URL, after a check that each is taken, has a possible value, and comes once."""
    # Behind a ? that should have been written %3F may stand the rest of a password, up to its @.
    shows = not any("@" in f"{name}{value}" for name, value in url.query.items())
    for name, value in url.query.items():
        if name not in taken:
            named = f"The parameter {code_text(name)}" if shows else "A parameter"
            where = "a path" if url.get_backend_name() == "sqlite" else "a password"
            raise InvalidUrlError(
                f"{named} in the database URL is not supported: remove it; a question mark in {where} is written %3F."
            )
        if not all(_as_tuple(value)):
            raise InvalidUrlError(f"{name} in the database URL has no value: give it one, or leave {name} out.")
        if not isinstance(value, str) and name not in repeated:
            raise InvalidUrlError(f"{name} stands in the database URL twice: remove one.")
        possible = taken[name]
        # Words for yes and no may be in capitals; the rest is handed on as it is.
        if possible and (str(value).lower() if "true" in possible else value) not in possible:
            raise InvalidUrlError(f"{name} in the database URL must be one of {', '.join(possible)}.")
    return {name: value if isinstance(value, str) else value[-1] for name, value in url.query.items()}


def _servers(url: URL, named: list[str]) -> list[tuple[str, int]]:
    """Return the hosts and ports of a URL that names several, by `named` or by its parameters; else nothing."""
    hosts, ports = _listed(url, "host"), _listed(url, "port")
    if named and hosts:
        raise InvalidUrlError("The hosts stand in the database URL twice: leave out the parameter host.")
    hosts = named or hosts
    if len(hosts) < 2:
        if len(ports) > 1:
            raise InvalidUrlError("port in the database URL must be one whole number for one host.")
        return []
    found = [_HOST.fullmatch(host) for host in hosts]
    if len(ports) not in (0, 1, len(hosts)) or (ports and any(match and match[2] for match in found)):
        raise InvalidUrlError("The database URL must have no port, one for all its hosts, or one for each.")
    if len(ports) < 2:
        ports = (ports or [_PORT]) * len(hosts)
    servers = []
    for match, port in zip(found, ports, strict=True):
        given = (match and match[2]) or port
        # Five digits, as int() takes thousands, and isdecimal() the digits of other scripts as well.
        if match is None or not re.fullmatch(r"[0-9]{1,5}", given) or not 0 < int(given) < 65536:
            raise InvalidUrlError(
                "Each host in the database URL must be a name or address, and a port: host1:5432,host2."
            )
        servers.append((match[1].strip("[]"), int(given)))
    return servers


def _listed(url: URL, name: str) -> list[str]:
    """Return the values of a parameter, which may stand there several times, and hold several each time."""
    return [part for value in _as_tuple(url.query.get(name, ())) for part in value.split(",")]


def _as_tuple(value: str | tuple[str, ...]) -> tuple[str, ...]:
    return (value,) if isinstance(value, str) else value


def _postgresql(url: URL, named: list[str], *, reads: bool) -> tuple[URL, dict[str, Any]]:
    query = dict(url.query)
    options: dict[str, Any] = {}
    text = _values(url, _POSTGRESQL, repeated=("host", "port"))
    if servers := _servers(url, named):
        options["host"], options["port"] = map(list, zip(*servers, strict=True))
        # For people; what is connected to are the options.
        url = url.set(host=servers[0][0], port=servers[0][1])
        text = {name: value for name, value in text.items() if name not in ("host", "port")}
    # A standby first in the list takes no writes.
    target = ("prefer-standby" if servers else "any") if reads else "read-write" if servers else None
    if target is not None:
        query.setdefault("target_session_attrs", target)
        text.setdefault("target_session_attrs", target)
    tls = {name: text.pop(name, None) for name in ("sslmode", "ssl", "sslrootcert", "sslcert", "sslkey")}
    if any(tls.values()):
        options["ssl"] = _tls(**tls)
    for number in ("port", "prepared_statement_cache_size"):
        if not text.get(number, "0").isdecimal():
            raise InvalidUrlError(f"{number} in the database URL must be a whole number.")
    if timeout := text.pop("connect_timeout", None):
        if not timeout.isdecimal():
            raise InvalidUrlError("connect_timeout in the database URL must be a whole number of seconds.")
        # As in libpq, 0 waits without end.
        options["timeout"] = float(timeout) or None
    if name := text.pop("application_name", None):
        options["server_settings"] = {"application_name": name}
    if text.pop("pgbouncer", "false").lower() in _TRUE:
        # In transaction mode the next statement may run on another server connection, which has not prepared it.
        options["statement_cache_size"] = 0
        options["prepared_statement_cache_size"] = 0
        # One with a name would stay behind in the server connection when the next statement gets another one.
        options["prepared_statement_name_func"] = lambda: ""
        # PgBouncer goes on reporting what its server was before it was promoted, so the server itself is asked.
        if text.get("target_session_attrs") in ("read-write", "primary"):
            options["ask_for"] = text["target_session_attrs"]
        if "target_session_attrs" not in text or "ask_for" in options:
            query["target_session_attrs"] = text["target_session_attrs"] = "any"
    return url.set(query={name: query[name] for name in text}), options


def _tls(
    sslmode: str | None, ssl: str | None, sslrootcert: str | None, sslcert: str | None, sslkey: str | None
) -> str | SSLContext:
    if sslmode and ssl:
        raise InvalidUrlError("ssl and sslmode in the database URL are the same: remove one.")
    if sslkey and not sslcert:
        raise InvalidUrlError("sslkey in the database URL has no effect without sslcert: add it, or remove sslkey.")
    mode = sslmode or ssl or "prefer"
    if not (sslrootcert or sslcert):
        return mode
    if mode in ("disable", "allow", "prefer"):
        name = "sslrootcert" if sslrootcert else "sslcert"
        wanted = f"{'set' if sslmode or ssl else 'add'} {'ssl' if ssl else 'sslmode'}=verify-full"
        raise InvalidUrlError(
            f"{name} in the database URL has no effect where TLS is not required: {wanted}, or remove {name}."
        )
    try:
        context = create_default_context(cafile=sslrootcert and str(Path(sslrootcert).expanduser()))
        if sslcert:
            # Without a password OpenSSL would ask for that of an encrypted key on the terminal, and wait.
            context.load_cert_chain(
                Path(sslcert).expanduser(), sslkey and Path(sslkey).expanduser(), password=lambda: ""
            )
    except OSError as exc:
        raise InvalidUrlError(
            "A certificate or key named in the database URL cannot be read: check its path and format; a key must not "
            "be encrypted."
        ) from exc
    # As libpq and asyncpg do. From Python 3.13 on it is set, and refuses what PostgreSQL's own manual has people make.
    context.verify_flags &= ~VERIFY_X509_STRICT
    # The modes of libpq: only `verify-full` compares the name, and a context for TLS compares it by default.
    context.check_hostname = mode == "verify-full"
    # As in libpq, `require` with a root certificate is `verify-ca`.
    if mode == "require" and not sslrootcert:
        context.verify_mode = CERT_NONE
    return context
