"""Notifiers that fail on demand, and what the outbox holds."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

from contract_helpers import until
from sqlalchemy import text

from agent_gateway_store import GatewayStore, Notice, StoreSettings


class Post:
    """A notifier that keeps what it takes, and does what `act` does first."""

    def __init__(self, name: str = "post", act: Callable[[Notice], Awaitable[object]] | None = None) -> None:
        self.name = name
        self.act = act
        self.tried: list[Notice] = []
        self.taken: list[Notice] = []

    async def notify_pending(self, notice: Notice) -> None:
        await self._take(notice)

    async def notify_decision(self, notice: Notice) -> None:
        await self._take(notice)

    async def _take(self, notice: Notice) -> None:
        self.tried.append(notice)
        if self.act is not None:
            await self.act(notice)
        self.taken.append(notice)

    @property
    def events(self) -> list[tuple[str, str]]:
        """Event and status of what was taken, in order."""
        return [(notice.event, notice.status.value) for notice in self.taken]


def raising(error: Exception, *, times: int | None = None) -> Callable[[Notice], Awaitable[object]]:
    """An act that raises, always or so many times."""
    left = [times]

    async def act(_: Notice) -> None:
        if left[0] is None or left[0] > 0:
            left[0] = None if left[0] is None else left[0] - 1
            raise error

    return act


def quiet(**fields: Any) -> StoreSettings:
    """Settings with which nothing is sent until a test says so."""
    return StoreSettings(notification_worker=False, **fields)


async def rows(store: GatewayStore, columns: str = "notifier, event, status, attempts") -> list[tuple[Any, ...]]:
    """What the outbox holds, the bundled notifier left out, without the types of the models."""
    async with store.database.engine.connect() as connection:
        found = await connection.execute(
            text(f"SELECT {columns} FROM notification_deliveries WHERE notifier <> 'log' ORDER BY id")
        )
        return [tuple(row) for row in found]


async def settled(store: GatewayStore, count: int) -> None:
    """Wait until so many rows are delivered or dead."""

    async def enough() -> bool:
        return len([row for row in await rows(store, "status") if row[0] != "DUE"]) >= count

    await until(enough)
