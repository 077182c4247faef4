"""Database URLs as users write them."""

from __future__ import annotations

import ssl
from pathlib import Path
from typing import Any
from uuid import uuid4

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
# What SQLAlchemy and asyncpg take as text; for anything else they raise a TypeError at the first connection.
_TAKEN = {
    "host",
    "passfile",
    "password",
    "port",
    "prepared_statement_cache_size",
    "ssl",
    "target_session_attrs",
    "user",
}
_TRUE = ("1", "true", "yes", "on")


def parse_database_url(text: str | URL) -> tuple[URL, dict[str, Any]]:
    """Return the SQLAlchemy URL with our async driver, and the driver's connect arguments.

    Takes `postgresql://`, `postgres://` and `sqlite:///`, libpq's `sslmode`, `sslrootcert`, `sslcert`, `sslkey`,
    `connect_timeout` (seconds) and `application_name`, and `pgbouncer=true` for PgBouncer in transaction mode, which
    switches the caching of prepared statements off and makes their names unique.

    Raises:
        InvalidUrlError: The text is not a URL, names a database that is not supported, or has a parameter that the
            driver does not take. The message never repeats a password.
    """
    try:
        url = make_url(text)
    except (ArgumentError, ValueError):
        raise InvalidUrlError(f"{code_text(mask_url(str(text)))} is not a database URL: {_EXAMPLES}.") from None
    driver = _ASYNC_DRIVERS.get(url.drivername)
    if driver is None:
        raise InvalidUrlError(f"The URL scheme {code_text(url.drivername)} is not supported: {_EXAMPLES}.")
    url = url.set(drivername=driver)
    if url.get_backend_name() == "sqlite":
        return url, {}
    return _postgresql(url)


def is_memory(url: URL) -> bool:
    """True for a SQLite database that lives in memory only."""
    return url.get_backend_name() == "sqlite" and (
        url.database in (None, "", ":memory:") or url.query.get("mode") == "memory" or ":memory:" in str(url.database)
    )


def _postgresql(url: URL) -> tuple[URL, dict[str, Any]]:
    query = dict(url.query)
    options: dict[str, Any] = {}
    text = {name: value if isinstance(value, str) else value[-1] for name, value in query.items()}
    tls = {name: text.pop(name, None) for name in ("sslmode", "sslrootcert", "sslcert", "sslkey")}
    if any(tls.values()):
        options["ssl"] = _tls(**tls)
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
        options["prepared_statement_name_func"] = lambda: f"__ags_{uuid4()}__"
    if unknown := sorted(text.keys() - _TAKEN):
        raise InvalidUrlError(f"The parameter {code_text(unknown[0])} in the database URL is not supported: remove it.")
    return url.set(query={name: query[name] for name in text}), options


def _tls(sslmode: str | None, sslrootcert: str | None, sslcert: str | None, sslkey: str | None) -> str | ssl.SSLContext:
    mode = sslmode or "prefer"
    modes = ("disable", "allow", "prefer", "require", "verify-ca", "verify-full")
    if mode not in modes:
        raise InvalidUrlError(f"sslmode in the database URL must be one of {', '.join(modes)}.")
    if mode == "disable" or not (sslrootcert or sslcert):
        return mode
    try:
        context = ssl.create_default_context(cafile=sslrootcert and str(Path(sslrootcert).expanduser()))
        if sslcert:
            context.load_cert_chain(Path(sslcert).expanduser(), sslkey and Path(sslkey).expanduser())
    except OSError as exc:
        raise InvalidUrlError(
            "A certificate named in the database URL cannot be read: check its path and format."
        ) from exc
    # The modes of libpq: only `verify-full` compares the name, and a context for TLS compares it by default.
    context.check_hostname = mode == "verify-full"
    # As in libpq, `require` with a root certificate is `verify-ca`.
    if mode not in ("verify-ca", "verify-full") and not (mode == "require" and sslrootcert):
        context.verify_mode = ssl.CERT_NONE
    return context
