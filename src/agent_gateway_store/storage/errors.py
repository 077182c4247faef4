"""The one place where errors of the drivers are translated into errors of this package, and outages are logged."""

from __future__ import annotations

import asyncio
import logging
import math
import random
import re
import sqlite3
import ssl
import sys
import time
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from functools import wraps
from traceback import walk_tb
from typing import Any, ParamSpec, TypeVar

import asyncpg
from sqlalchemy import Connection, Engine
from sqlalchemy.exc import (
    DBAPIError,
    IllegalStateChangeError,
    IntegrityError,
    NoSuchModuleError,
    ProgrammingError,
    SQLAlchemyError,
)
from sqlalchemy.exc import TimeoutError as PoolTimeoutError
from sqlalchemy.ext.asyncio import AsyncEngine

from agent_gateway_store.errors import (
    GatewayStoreError,
    SchemaOutOfDateError,
    SessionInUseError,
    StoreUnavailableError,
    TransactionConflictError,
    UnreadableRowError,
)
from agent_gateway_store.models.base import metadata

RESTORE = "restore it from a backup"
"""What to do about a row that cannot be read, as it ends the sentence."""

P = ParamSpec("P")
T = TypeVar("T")

# serialization_failure and deadlock_detected: the same transaction may succeed when it is run again.
_CONFLICTS = ("40001", "40P01")
_UNIQUE_VIOLATION = "23505"
_NO_RIGHT = "42501"
# Who says in the server that a row is not permitted: a policy, and a trigger. What says it of a table is another one.
_REFUSING_ROWS = ("ExecWithCheckOptions", "exec_stmt_raise")
# A sequence that has come to its end.
_NO_ID_LEFT = "2200H"
# Chosen: a row lock is held for milliseconds. The server waits a second itself before it calls a wait a deadlock.
_PAUSES_S = (0.01, 0.05, 0.2)
# asyncpg raises InternalClientError, which has neither of its two roots, when a server is killed during a command.
_DRIVER = (asyncpg.PostgresError, asyncpg.InterfaceError, asyncpg.InternalClientError)
_OUTAGE = (OSError, TimeoutError, PoolTimeoutError, EOFError)
# Of SQLAlchemy's own errors these alone say something of the database: the others are the program's.
_DATABASE = (DBAPIError, NoSuchModuleError, PoolTimeoutError, *_DRIVER)
_ROW_FAULTS = (ValueError, TypeError, OverflowError, IntegrityError, sqlite3.IntegrityError, sqlite3.DataError)
_DRIVER_MODULES = ("aiosqlite", "asyncpg", "sqlalchemy", "agent_gateway_store.storage.asyncpg_pool")
# The event loop and the standard library are between the driver and the caller in every traceback.
_PLUMBING = sys.stdlib_module_names | {"uvloop", "winloop"}
# By class name and text, as the two drivers share no codes: asyncpg has a class for each error, sqlite3 only texts.
# PostgreSQL speaks the language of its lc_messages: of its texts only names are read, or which sentence fits best.
# Those of SQLite, PgBouncer and asyncpg are always in English.
_MISSING_SCHEMA = ("undefinedtable", "undefinedcolumn", "no such table", "no such column", "has no column named")
IDS_IN_USE = (
    "it gives ids that are in use, as in a copy without its sequences: run `gateway-store db restored --by NAME`"
)
"""Ends a sentence about a PostgreSQL whose sequences are behind its rows."""
_ENDED = "the server ended the connection: try again; if that fails, check that it runs and that DATABASE_URL is right"
_HINTS = (
    ("invalidpassword", "the database refuses the password: check DATABASE_URL"),
    ("valid client certificate", "the server asks for a client certificate: add sslcert= and sslkey= to DATABASE_URL"),
    ("no encryption", "the server takes this user only with TLS: set sslmode=require or verify-full in DATABASE_URL"),
    ("no pg_hba.conf entry", "the server's pg_hba.conf lets nobody in like this: add an entry for this user and host"),
    # Also what the two above say in another language than English.
    (
        "clientauthentication",
        "the server's pg_hba.conf lets this user in only with TLS, only with a client certificate, or not at all",
    ),
    ("invalidauthorization", "the database refuses the user: create the role or check DATABASE_URL"),
    ("invalidcatalogname", "the database does not exist: create it or check DATABASE_URL"),
    ("readonly", "the database is read-only: check the file's folder or the server's role"),
    (
        "execwithcheckoptions",
        "a policy of row-level security refuses the row: let the policy admit it, or write as another role",
    ),
    (
        "check_enable_rls",
        "a policy of row-level security hides rows from this role: run it as a role to which no policy applies",
    ),
    ("insufficientprivilege", "the database user may not do this: grant it the right to {object}"),
    (
        "toomanyconnections",
        "no connection is left: raise max_connections or the CONNECTION LIMIT of the role, or lower the pool",
    ),
    ("unable to open database file", "the file cannot be opened: check that its folder exists and is writable"),
    (
        "database file was removed",
        "its file was removed or replaced while it was open: put it back, or restart with no -wal file of another",
    ),
    (
        "belongs to a file that was moved away",
        "the -wal file beside it belongs to a file that was moved away: put that back, or remove both",
    ),
    ("file is not a database", "the file is not a SQLite database: check DATABASE_URL"),
    ("is malformed", "the file is damaged: restore it from a backup"),
    ("database is locked", "the file is locked by another process: try again"),
    ("database or disk is full", "the disk is full: make room"),
    (
        "sequencegeneratorlimitexceeded",
        "a sequence has come to its end: give the row with the largest id another one, and set the sequence",
    ),
    ("diskfull", "the disk is full: make room"),
    # What SQLite says where there is no room for the file beside its own that connections share, too.
    ("disk i/o error", "the disk is full or fails: make room, and check it"),
    ("duplicatepreparedstatement", "a pooler keeps no prepared statements: add pgbouncer=true to DATABASE_URL"),
    ("invalidsqlstatementname", "a pooler keeps no prepared statements: add pgbouncer=true to DATABASE_URL"),
    ("statement pooling mode", "the pooler takes no transactions: give it pool_mode = transaction"),
    ("configurationlimitexceeded", "it needs larger temporary files: raise temp_file_limit for our role"),
    ("raiseerror", "a trigger that is not the store's refuses it: drop that"),
    ("invalidcachedstatement", "a table or setting was changed meanwhile: try again"),
    ("querycanceled", "the server's statement_timeout ended it: raise it for our role with ALTER ROLE ... SET"),
    (
        "idleintransaction",
        "idle_in_transaction_session_timeout ended it: raise it for our role with ALTER ROLE ... SET",
    ),
    # After the two above, which end a connection as well. The driver says it, too, of what speaks no PostgreSQL.
    *((word, _ENDED) for word in ("connectiondoesnotexist", "adminshutdown", "crashshutdown", "internalclienterror")),
    ("connection is closed", _ENDED),
    ("locknotavailable", "another transaction held a lock for too long: end it, or raise lock_timeout for our role"),
    (
        "targetserverattributenotmatched",
        "no server in DATABASE_URL is what target_session_attrs asks for: promote a standby, or name the primary",
    ),
    ("gaierror", "the server's name is not known here: check the host in DATABASE_URL"),
    ("rejected ssl upgrade", "the server has no TLS: switch it on there, or lower sslmode in DATABASE_URL"),
    (
        "root certificate file",
        "no root certificate is known to check the server's: add sslrootcert= to DATABASE_URL",
    ),
    *(
        (
            word,
            "{object} exists already: rename it if another application made it, else restore the database as a whole",
        )
        for word in ("duplicatetable", "duplicatecolumn", "duplicate column", "duplicateobject", "already exists")
    ),
)

# As in "permission denied for table api_keys", "must be owner of table api_keys", or "table api_keys already exists".
_OBJECT = re.compile(
    r"(?:permission denied for|must be owner of) (\w+ \S+)|(\w+ \S+)(?: (?:of|for) \w+ \S+)? already exists"
)


@contextmanager
def translate_errors(doing: str, *, in_session: bool = False, engine: AsyncEngine | None = None) -> Iterator[None]:
    """Turn what the drivers and the network raise into ours, with the cause kept.

    What does not come from a driver passes unchanged, and so do integrity errors that are not the database's own: the
    body may be a request handler that misses a file, or a row.

    Args:
        doing: What was attempted, as it ends the sentence "The database could not ...".
        in_session: The transaction is the caller's.
        engine: Translate only what is raised through this engine, and is not the fault of a statement or of its values:
            the body is the application's.

    """
    try:
        yield
    except GatewayStoreError:
        raise
    except (SQLAlchemyError, *_DRIVER, *_OUTAGE) as exc:
        is_by_others = is_refused(exc)
        if isinstance(exc, IntegrityError) and not is_by_others and not is_id_taken(exc):
            raise
        if _is_shared(exc):
            raise SessionInUseError from exc
        # An error of the network may be the body's own.
        is_ours = isinstance(exc, _DATABASE) or (not isinstance(exc, SQLAlchemyError) and _from_driver(exc))
        if not is_ours:
            raise
        if engine is not None and not (_came_through(exc, engine) and is_outage(exc) and not _is_statements(exc)):
            raise
        error = _translated(exc, doing, in_session=in_session)
        if "DATABASE_READ_URL" in doing:
            error.args = (str(error).replace("DATABASE_URL", "DATABASE_READ_URL"),)
        # What the server says of a refused row holds the row.
        raise error from None if is_by_others else exc


@contextmanager
def readable_rows(row: str, step: str) -> Iterator[None]:
    """Raise UnreadableRowError, a sentence of `row` and `step`, over a row that was written past the store."""
    try:
        yield
    except GatewayStoreError:
        raise
    except (ValueError, TypeError, ArithmeticError, LookupError, AttributeError) as exc:
        raise UnreadableRowError(f"{row} holds what no store writes ({type(exc).__name__}): {step}.") from exc


def is_bad_text(exc: BaseException) -> bool:
    """True if SQLite, which keeps any bytes as text, holds some that are not UTF-8."""
    return "decode to UTF-8" in str(driver_error(exc))


@contextmanager
def readable_text(table: str) -> Iterator[None]:
    """Turn what SQLite's driver raises over such text into UnreadableRowError."""
    try:
        yield
    except sqlite3.OperationalError as exc:
        if not is_bad_text(exc):
            raise
        raise UnreadableRowError(f"A row of {table} holds text that is not UTF-8: {RESTORE}.") from exc


def _is_shared(exc: BaseException) -> bool:
    """True if a session, or a connection of the driver, was still busy with the work of another task."""
    # "isce" is SQLAlchemy's code of "concurrent operations are not permitted"; asyncpg has a text only.
    if isinstance(exc, IllegalStateChangeError) or getattr(exc, "code", None) == "isce":
        return True
    return _is_busy(driver_error(exc))


def _is_busy(error: BaseException) -> bool:
    return isinstance(error, asyncpg.InterfaceError) and "another operation" in str(error)


def _from_driver(exc: BaseException) -> bool:
    """True if the innermost frame outside the event loop is the driver's, or that of a pool of its connections."""
    names = [frame.f_globals.get("__name__", "") for frame, _ in walk_tb(exc.__traceback__)]
    foreign = [name for name in names if name.partition(".")[0] not in _PLUMBING]
    return bool(foreign) and f"{foreign[-1]}.".startswith(tuple(f"{module}." for module in _DRIVER_MODULES))


def retry_conflicts(function: Callable[P, Coroutine[Any, Any, T]]) -> Callable[P, Coroutine[Any, Any, T]]:
    """Run a function, which is one whole transaction, up to four times if the database ends it in favour of another.

    One of the caller's transaction is not run again: what the caller did in it before is gone with it.
    """

    @wraps(function)
    async def run(*args: P.args, **kwargs: P.kwargs) -> T:
        for pause_s in _PAUSES_S:
            try:
                return await function(*args, **kwargs)
            except Exception as exc:
                if conflict_of(exc) is None or getattr(exc, "in_session", False):
                    raise
            # Transactions that met once would meet again if all of them waited equally long.
            await asyncio.sleep(pause_s * random.uniform(0.5, 1.5))  # noqa: S311
        return await function(*args, **kwargs)

    return run


def conflict_of(exc: BaseException) -> str | None:
    """Return "40001" or "40P01" if the database ended a transaction in favour of another one, else None."""
    state = getattr(exc, "sqlstate", None) if isinstance(exc, GatewayStoreError) else sqlstate_of(exc)
    return state if state in _CONFLICTS else None


def sqlstate_of(exc: BaseException) -> str | None:
    """Return PostgreSQL's five letters for an error of a driver, or None."""
    state: str | None = getattr(driver_error(exc), "sqlstate", None)
    return state


def is_id_taken(exc: BaseException) -> bool:
    """True if the database refused a row of ours for the id that it gave it itself: its sequence is behind the rows."""
    error = driver_error(exc)
    table = metadata.tables.get(getattr(error, "table_name", None) or "")
    return (
        table is not None
        and table.autoincrement_column is not None
        and sqlstate_of(exc) == _UNIQUE_VIOLATION
        and getattr(error, "constraint_name", None) == table.primary_key.name
    )


def is_refused(exc: BaseException) -> bool:
    """True if a constraint or trigger of somebody else's keeps a row out of our tables: it holds what ours ask for."""
    error = driver_error(exc)
    if getattr(error, "sqlite_errorname", None) == "SQLITE_CONSTRAINT_TRIGGER":
        return True
    is_other = (sqlstate_of(exc) or "").startswith("23") and sqlstate_of(exc) != _UNIQUE_VIOLATION
    return is_other and getattr(error, "table_name", None) in metadata.tables


def _came_through(exc: BaseException, engine: AsyncEngine) -> bool:
    """True if a method of this engine, or of one of its connections, is in the traceback."""
    callers = (frame.f_locals.get("self") for frame, _ in walk_tb(exc.__traceback__))
    engines = (caller.engine for caller in callers if isinstance(caller, Connection | Engine))
    return any(each is engine.sync_engine for each in engines)


def _is_statements(exc: BaseException) -> bool:
    """True if a statement is wrong, and not only for a table or column that is not there."""
    # SQLite has one code for all that is wrong with a statement.
    is_wrong = (
        isinstance(exc, ProgrammingError) or getattr(driver_error(exc), "sqlite_errorcode", 0) == sqlite3.SQLITE_ERROR
    )
    return is_wrong and not _misses_schema(exc)


def is_outage(exc: BaseException) -> bool:
    """True if the database could not answer, or not number the row; False if it refused this row."""
    if is_id_taken(exc) or sqlstate_of(exc) == _NO_ID_LEFT:
        return True
    if isinstance(exc, DBAPIError):
        exc = exc.orig or exc
    cause = getattr(exc, "__cause__", None)
    driver = cause if isinstance(cause, asyncpg.PostgresError) else exc
    if isinstance(driver, asyncpg.PostgresError):
        if driver.sqlstate == _NO_RIGHT:
            return getattr(driver, "server_source_function", None) not in _REFUSING_ROWS
        # Classes of PostgreSQL's appendix "Error Codes" that are the row's fault: data exceptions, violations of
        # constraints and views, limits such as that of an index row, and what a trigger raises.
        return not str(getattr(driver, "sqlstate", "") or "").startswith(("22", "23", "44", "54", "P0"))
    return not isinstance(exc, _ROW_FAULTS)


def _translated(exc: BaseException, doing: str, *, in_session: bool) -> GatewayStoreError:
    if isinstance(exc, NoSuchModuleError):
        return StoreUnavailableError(f"The database could not {doing}: no driver for this kind of URL.")
    error = driver_error(exc)
    if (state := conflict_of(exc)) is not None:
        return TransactionConflictError(
            f"The database could not {doing}: it ended the transaction in favour of another one "
            f"({type(error).__name__}). Nothing was stored: run the whole transaction again.",
            sqlstate=state,
            in_session=in_session,
        )
    if isinstance(error, ssl.SSLError):
        return StoreUnavailableError(f"The database could not {doing}: {_tls_hint(error)}.")
    if is_id_taken(exc):
        return StoreUnavailableError(f"The database could not {doing}: {IDS_IN_USE}.")
    if is_refused(exc):
        table = getattr(error, "table_name", None) or "our table"
        return StoreUnavailableError(
            f"The database could not {doing}: a constraint or trigger on {table} that is not the store's refuses the "
            f"row ({type(error).__name__}): drop it."
        )
    if is_bad_text(exc):
        return UnreadableRowError(f"The database could not {doing}: a row holds text that is not UTF-8: {RESTORE}.")
    if _misses_schema(exc):
        return SchemaOutOfDateError(
            f"The database could not {doing}: a table or column is missing. Run `gateway-store db upgrade`."
        )
    said = _said(error)
    for word, hint in _HINTS:
        if word in said:
            where = "what it asked for" if (found := _OBJECT.search(said)) is None else found[1] or found[2]
            return StoreUnavailableError(f"The database could not {doing}: {hint.format(object=where)}.")
    if isinstance(exc, TimeoutError | PoolTimeoutError):
        return StoreUnavailableError(f"The database could not {doing} in time: check its health and try again.")
    return StoreUnavailableError(
        f"The database could not {doing} ({type(error).__name__}): check that it runs and that DATABASE_URL is right."
    )


def _misses_schema(exc: BaseException) -> bool:
    said = _said(driver_error(exc))
    return isinstance(exc, (DBAPIError, *_DRIVER)) and any(word in said for word in _MISSING_SCHEMA)


def _said(error: BaseException) -> str:
    # With names that are the same in every language: of what ended a connection, and of the function of the server.
    cause = type(error.__cause__).__name__
    return f"{type(error).__name__} {cause}\n{error}\n{getattr(error, 'server_source_function', None)}".lower()


def driver_error(exc: BaseException) -> BaseException:
    """Return the driver's own error, whatever it was raised as."""
    # SQLAlchemy keeps its adapter's error in `orig`, and that keeps asyncpg's as its cause.
    if isinstance(exc, DBAPIError) and exc.orig is not None:
        exc = exc.orig
    error = exc.__cause__ if exc.__cause__ is not None else exc
    # Of a ROLLBACK between the server's last word in a COPY and the end of the socket.
    if _is_busy(error) and isinstance(error.__context__, asyncpg.OperatorInterventionError):
        error = error.__context__
    return error


def _tls_hint(error: ssl.SSLError) -> str:
    # Numbers of OpenSSL's X509_verify_cert_error_string: expired, not yet valid, another host name, another address.
    code = getattr(error, "verify_code", None)
    if code in (9, 10):
        return "the server's certificate is not valid at this time: renew it, or set this machine's clock"
    if code in (62, 64):
        return "the server's certificate is for another name: use its name as the host in DATABASE_URL"
    if code is not None:
        return "the server's certificate is of an authority that is not trusted: check sslrootcert in DATABASE_URL"
    if "CERTIFICATE_REQUIRED" in (error.reason or ""):
        return "the server asks for a client certificate: add sslcert= and sslkey= to DATABASE_URL"
    if "ALERT" in (error.reason or ""):
        return "the server refuses our certificate: check sslcert and sslkey in DATABASE_URL"
    return f"TLS failed ({error.reason or type(error).__name__}): check sslmode in DATABASE_URL and the server's TLS"


# Chosen: an outage of an hour is sixty lines.
_LOG_AGAIN_S = 60.0


class OutageLog:
    """Says that something is away at most once a minute, however often that is met, and once that it is back."""

    def __init__(self, logger: logging.Logger) -> None:
        self._logger = logger
        self._said_at = -math.inf
        self._is_said = False

    def away(self, text: str, *args: object) -> None:
        """Log a warning, unless there was one in the last minute."""
        if (now := time.monotonic()) - self._said_at >= _LOG_AGAIN_S:
            self._logger.warning(text, *args)
            self._said_at, self._is_said = now, True

    def back(self, text: str) -> None:
        """Log that it is back, if the log still says otherwise."""
        if self._is_said:
            self._logger.warning(text)
            self._is_said = False
