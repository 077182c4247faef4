"""Stores with audit plugins of every temper."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any

from agent_gateway_store import AuditEvent, GatewayStore, hookimpl
from agent_gateway_store.settings import StoreSettings

SHORT_S = 0.3
"""The patience for plugins that are meant to run out of time."""


class Editor:
    """Sees events before they are stored, and returns what its function makes of them."""

    def __init__(self, name: str, edit: Callable[[AuditEvent], Any]) -> None:
        self.name = name
        self.edit = edit
        self.seen: list[AuditEvent] = []

    @hookimpl
    def gateway_store_before_audit_write(self, event: AuditEvent) -> Any:
        self.seen.append(event)
        return self.edit(event)


class Listener:
    """Hears of events after their commit."""

    def __init__(self, name: str = "listener", then: Callable[[], Any] = lambda: None) -> None:
        self.name = name
        self.then = then
        self.batches: list[Sequence[AuditEvent]] = []

    @property
    def heard(self) -> list[str]:
        """The request ids, in order."""
        return [event.request_id for batch in self.batches for event in batch]

    @hookimpl
    def gateway_store_audit_written(self, events: Sequence[AuditEvent]) -> Any:
        self.batches.append(events)
        return self.then()


@asynccontextmanager
async def open_with(*plugins: object, timeout_s: float = 20, **settings: Any) -> AsyncIterator[GatewayStore]:
    """Open a SQLite store in the current folder with these plugins."""
    chosen = StoreSettings(plugin_timeout_seconds=timeout_s, **settings)
    async with GatewayStore("sqlite:///gateway.db", redis_url="", settings=chosen, plugins=plugins) as store:
        yield store
