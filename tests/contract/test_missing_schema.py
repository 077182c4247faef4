"""A database that has lost tables or columns since the store was opened."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from functools import partial

import pytest
from contract_helpers import BY_TOKEN
from sqlalchemy import text

from agent_gateway_store import GatewayStore, errors
from agent_gateway_store.keys.format import new_key
from builders import make_request

TOKEN = "t" * 43
USES: list[Callable[[GatewayStore], Awaitable[object]]] = [
    *(partial(lambda use, store: use(store, TOKEN), use) for use in BY_TOKEN),
    lambda store: store.approvals.issue_token(make_request()),
    lambda store: store.approvals.list_requests(),
    lambda store: store.keys.verify(new_key("0123456789AB")),
]
LOST = {
    "tables": [
        ("approval_requests RENAME TO lost_requests", "lost_requests RENAME TO approval_requests"),
        ("api_keys RENAME TO lost_keys", "lost_keys RENAME TO api_keys"),
    ],
    "columns": [
        ("approval_requests RENAME outcome TO lost", "approval_requests RENAME lost TO outcome"),
        ("api_keys RENAME role TO lost", "api_keys RENAME lost TO role"),
    ],
}


@pytest.fixture(params=LOST)
async def broken(request: pytest.FixtureRequest, store: GatewayStore) -> AsyncIterator[GatewayStore]:
    """A store whose tables, or a column of each, go by another name for the time of the test."""

    async def alter(*changes: str) -> None:
        async with store.database.write() as connection:
            for change in changes:
                await connection.execute(text(f"ALTER TABLE {change}"))

    away, back = zip(*LOST[request.param], strict=True)
    await alter(*away)
    yield store
    await alter(*back)


async def test_every_use_asks_for_a_migration(broken: GatewayStore) -> None:
    """Whichever way a statement goes to the database."""
    for use in USES:
        with pytest.raises(errors.SchemaOutOfDateError, match="gateway-store db upgrade"):
            await use(broken)
