"""What several contract tests need: requests to issue, a notifier that records, a count of SQL statements."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from sqlalchemy import event, text

from agent_gateway_store import GatewayStore, Notice
from agent_gateway_store.storage import statements
from builders import CALL, make_request  # noqa: F401  what the contract tests ask for

SOON_S = 4.0
"""More than a signal takes on a busy machine, and less than the poll of a store that hears signals."""


async def approved(store: GatewayStore, **fields: Any) -> str:
    """Issue a request, approve it, and return its token."""
    token = await store.approvals.issue_token(make_request(**fields))
    await store.approvals.approve(token, "approver-1")
    return token


async def column(store: GatewayStore, name: str, table: str) -> list[Any]:
    """Return what a column of a table holds, without the types of the models."""
    async with store.database.engine.connect() as connection:
        return list((await connection.execute(text(f"SELECT {name} FROM {table} ORDER BY id"))).scalars())


async def idle(store: GatewayStore) -> None:
    """Wait until no connection is checked out: the subscription of a waiter may still be connecting when it returns."""
    async with asyncio.timeout(10):
        while store.database.engine.pool.checkedout():  # type: ignore[attr-defined]
            await asyncio.sleep(0.005)


@contextmanager
def counted_statements(store: GatewayStore) -> Iterator[list[str]]:
    """Collect the SQL statements that go through the store's engine, or past it to the driver."""
    collected: list[str] = []
    run = statements.CompiledStatement.run

    async def noting(compiled: statements.CompiledStatement, *args: Any) -> Any:
        collected.append(compiled.text)
        return await run(compiled, *args)

    def note(_connection: Any, _cursor: Any, statement: str, *_: Any) -> None:
        if not statement.startswith("BEGIN"):
            collected.append(statement)

    engine = store.database.engine.sync_engine
    event.listen(engine, "before_cursor_execute", note)
    statements.CompiledStatement.run = noting  # type: ignore[method-assign]
    try:
        yield collected
    finally:
        statements.CompiledStatement.run = run  # type: ignore[method-assign]
        event.remove(engine, "before_cursor_execute", note)


class RecordingNotifier:
    """A notifier that keeps what it is told; with `gate` it waits for it first."""

    name = "recording"

    def __init__(self, gate: threading.Event | None = None) -> None:
        self.notices: list[Notice] = []
        self._gate = gate

    async def notify_pending(self, notice: Notice) -> None:
        self._keep(notice)

    async def notify_decision(self, notice: Notice) -> None:
        self._keep(notice)

    def _keep(self, notice: Notice) -> None:
        if self._gate is not None:
            assert self._gate.wait(10)
        self.notices.append(notice)

    @property
    def seen(self) -> list[tuple[str, str]]:
        """Event and status of each notice, sorted: notices may overtake each other."""
        return sorted((notice.event, str(notice.status)) for notice in self.notices)
