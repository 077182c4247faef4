"""What every command stands on: the global options, the settings they give, an open store."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator, Coroutine
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import timedelta
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, cast

import typer

if TYPE_CHECKING:
    from agent_gateway_store.settings import StoreSettings
    from agent_gateway_store.store import GatewayStore

__all__ = [
    "Options",
    "choose",
    "duration",
    "new_store",
    "open_store",
    "options_of",
    "run",
    "settings_of",
    "sqlite_file",
]

T = TypeVar("T")
E = TypeVar("E", bound=Enum)
_UNITS = {"s": "seconds", "m": "minutes", "h": "hours", "d": "days"}


@dataclass(frozen=True)
class Options:
    """The global options as they were given; None where they were not."""

    database_url: str | None = None
    redis_url: str | None = None
    org: str | None = None
    env_file: Path | None = None


def options_of(ctx: typer.Context) -> Options:
    """Return the global options of this run."""
    return cast("Options", ctx.find_root().obj or Options())


def settings_of(ctx: typer.Context) -> StoreSettings:
    """Return the settings: options win over the environment, and that over the file of --env-file."""
    from agent_gateway_store.settings import StoreSettings

    given = options_of(ctx)
    named = {"database_url": given.database_url, "redis_url": given.redis_url}
    return StoreSettings(
        _env_file=given.env_file,
        **{name: value for name, value in named.items() if value is not None},  # type: ignore[arg-type]
    )


def new_store(ctx: typer.Context, **options: Any) -> GatewayStore:
    """Return a store, bound to --org if it was given, that is not open yet."""
    from agent_gateway_store.store import GatewayStore

    settings = options.pop("settings", None) or settings_of(ctx)
    store = GatewayStore(settings=settings, **options)
    org = options_of(ctx).org
    return store if org is None else store.for_org(org)


@asynccontextmanager
async def open_store(ctx: typer.Context, **options: Any) -> AsyncIterator[GatewayStore]:
    """Open a store for one command."""
    async with new_store(ctx, **options) as store:
        yield store


def run(coroutine: Coroutine[Any, Any, T]) -> T:
    """Run a command's coroutine to its end."""
    return asyncio.run(coroutine)


def sqlite_file(url: str) -> Path | None:
    """Return the file of a SQLite URL, or None for another database or one in memory."""
    from agent_gateway_store.storage.urls import is_memory, parse_database_url

    parsed, _ = parse_database_url(url)
    if parsed.get_backend_name() != "sqlite" or is_memory(parsed) or not parsed.database:
        return None
    return Path(parsed.database.removeprefix("file:").partition("?")[0])


def choose(kind: type[E], text: str, option: str) -> E:
    """Return the member of `kind` that `text` names, in any case.

    Raises:
        typer.BadParameter: There is none.
    """
    try:
        return kind[text.upper()]
    except KeyError:
        raise typer.BadParameter(f"{option} must be one of {', '.join(kind.__members__)}.") from None


def duration(text: str, option: str) -> timedelta:
    """Return `90s`, `15m`, `24h` or `30d` as a timedelta.

    Raises:
        typer.BadParameter: It is none of these.
    """
    found = re.fullmatch(r"(\d{1,6})([smhd])", text.strip().lower(), re.ASCII)
    if found is None:
        raise typer.BadParameter(f"{option} must be a number with a unit: 90s, 15m, 24h or 30d.")
    return timedelta(**{_UNITS[found[2]]: int(found[1])})
