"""What every command needs: the global options, the settings that follow from them, an open store."""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import dataclass
from datetime import timedelta
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, cast

import typer

from agent_gateway_store.cli.errors import CommandError, ExitCode
from agent_gateway_store.cli.output import complain
from agent_gateway_store.errors import GatewayStoreError

if TYPE_CHECKING:
    from agent_gateway_store.settings import StoreSettings
    from agent_gateway_store.store import GatewayStore
    from agent_gateway_store.sync import SyncGatewayStore

T = TypeVar("T")
E = TypeVar("E", bound=Enum)
S = TypeVar("S", "GatewayStore", "SyncGatewayStore")
# As the lifetime of a key: every database can still count that far back.
_LONGEST = timedelta(days=1_000_000)


@dataclass(frozen=True)
class Options:
    """The global options as they were given; None where they were not."""

    database_url: str | None = None
    redis_url: str | None = None
    org: str | None = None
    env_file: Path | None = None
    debug: bool = False


def options_of(ctx: typer.Context) -> Options:
    """Return the global options of this run."""
    return cast("Options", ctx.find_root().obj or Options())


def settings_of(ctx: typer.Context) -> StoreSettings:
    """Return the settings. Options win over the environment, and the environment over the file of --env-file."""
    from agent_gateway_store.settings import StoreSettings

    given = options_of(ctx)
    named = {"database_url": given.database_url, "redis_url": given.redis_url}
    if given.database_url is not None:
        # The replica that is set is one of another database.
        named["database_read_url"] = ""
    if given.env_file is not None:
        _require_settings(given.env_file)
    return StoreSettings(
        _env_file=given.env_file,
        **{name: value for name, value in named.items() if value is not None},  # type: ignore[arg-type]
    )


def _require_settings(file: Path) -> None:
    """Raise CommandError if a line says nothing: without it, another database might be meant."""
    from dotenv.parser import parse_stream

    try:
        with file.open(encoding="utf-8") as lines:
            wrong = [each.original for each in parse_stream(lines) if each.error or (each.key and each.value is None)]
    except UnicodeDecodeError as exc:
        raise CommandError(f"{file} is not text in UTF-8: save it as that.", ExitCode.USAGE) from exc
    if wrong:
        # Empty lines before it are counted as its own.
        line = wrong[0].line + len(wrong[0].string) - len(wrong[0].string.lstrip("\n"))
        raise CommandError(f"Line {line} of {file} is not NAME=value: correct it.", ExitCode.USAGE)


def open_store(ctx: typer.Context, *, settings: StoreSettings | None = None) -> GatewayStore:
    """Return a store for `async with`, which opens it; bound to --org if it was given."""
    from agent_gateway_store.store import GatewayStore

    return _construct(ctx, GatewayStore, settings or settings_of(ctx))


def open_blocking_store(ctx: typer.Context) -> SyncGatewayStore:
    """Open as `open_store` does, for `with`: the store's event loop runs in a thread of its own."""
    from agent_gateway_store.sync import SyncGatewayStore

    return _construct(ctx, SyncGatewayStore, settings_of(ctx))


def _construct(ctx: typer.Context, kind: type[S], settings: StoreSettings) -> S:
    try:
        store = kind(settings=settings)
    except GatewayStoreError:
        raise
    except ValueError as exc:
        raise CommandError(f"A setting is wrong: {exc}", ExitCode.USAGE) from exc
    org = options_of(ctx).org
    return store if org is None else store.for_org(org)


def require_no_org(ctx: typer.Context) -> None:
    """Raise BadParameter where --org was given to a command about the whole log, or the whole database."""
    if options_of(ctx).org is not None:
        raise typer.BadParameter("This is about all organisations: leave --org out.")


def run(coroutine: Coroutine[Any, Any, T]) -> T:
    """Run a command's coroutine to its end."""
    # Here, as in other commands: printing help must not wait for it.
    import asyncio

    return asyncio.run(coroutine)


def in_store(
    ctx: typer.Context, call: Callable[[GatewayStore], Awaitable[T]], *, settings: StoreSettings | None = None
) -> T:
    """Return what `call` returns, given a store that is open for this one call."""

    async def work() -> T:
        async with open_store(ctx, settings=settings) as store:
            return await call(store)

    return run(work())


def read_store(
    ctx: typer.Context,
    call: Callable[[GatewayStore], Awaitable[T]],
    *,
    as_json: bool,
    settings: StoreSettings | None = None,
) -> T:
    """Run a command that only reads as `in_store` does; unless for JSON, say on standard error which database it reads.

    It says, too, whether that database is new or empty: in another folder, or without DATABASE_URL, that is likely not
    the one that was meant.
    """
    from agent_gateway_store.settings import mask_url

    chosen = settings or settings_of(ctx)
    file = sqlite_file(chosen.database_url)
    is_new = file is not None and not file.exists()

    async def work(store: GatewayStore) -> T:
        if not as_json:
            # An organisation may have nothing in a database that is the right one.
            is_empty = is_new or (options_of(ctx).org is None and await _is_empty(store))
            state = f", which is {'new and empty' if is_new else 'empty'}"
            another = f"{state}. --database-url or DATABASE_URL names another database" if is_empty else ""
            complain(f"Reading {file or mask_url(chosen.database_url)}{another}.")
        return await call(store)

    return in_store(ctx, work, settings=chosen)


async def _is_empty(store: GatewayStore) -> bool:
    return not (
        await store.audit.list_recent(limit=1)
        or await store.approvals.list_requests(limit=1)
        or await store.keys.list(limit=1)
    )


def sqlite_file(url: str) -> Path | None:
    """Return the file of a SQLite URL; None for another database, and for one in memory."""
    from agent_gateway_store.storage import urls

    return urls.sqlite_file(urls.parse_database_url(url)[0])


def choose(kind: type[E], text: str, option: str) -> E:
    """Return the member of `kind` that `text` names, in any case; raise BadParameter if there is none."""
    try:
        return kind[text.upper()]
    except KeyError:
        raise typer.BadParameter(f"{option} must be one of {', '.join(kind.__members__)}.") from None


def json_object(text: str, option: str) -> dict[str, Any]:
    """Return the object that a JSON text holds; raise BadParameter if it holds none."""
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        raise typer.BadParameter(f"""{option} must be a JSON object, such as '{{"path": "/tmp/report.txt"}}'.""")
    return found


def duration(text: str, option: str) -> timedelta:
    """Return `90s`, `15m`, `24h`, `30d` or `2w` as a timedelta; raise BadParameter if the databases cannot count it."""
    from agent_gateway_store.storage import filters

    try:
        found = filters.duration(option, text)
    except ValueError as exc:
        raise typer.BadParameter(str(exc)) from None
    if found > _LONGEST:
        raise typer.BadParameter(f"{option} must be a million days at most.")
    return found
