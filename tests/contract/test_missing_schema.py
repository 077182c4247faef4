"""A database that has lost tables or columns since the store was opened."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable

import pytest
from sqlalchemy import text

from agent_gateway_store import GatewayStore, errors
from agent_gateway_store.keys.format import new_key
from builders import CALL, make_request

TOKEN = "t" * 43
USES: dict[str, Callable[[GatewayStore], Awaitable[object]]] = {
    "issue_token": lambda store: store.approvals.issue_token(make_request()),
    "check_token": lambda store: store.approvals.check_token(TOKEN),
    "approve": lambda store: store.approvals.approve(TOKEN, "approver-1"),
    "deny": lambda store: store.approvals.deny(TOKEN, "approver-1"),
    "consume_token": lambda store: store.approvals.consume_token(TOKEN, caller_id="dev-agent", tool_call=CALL),
    "release_output": lambda store: store.approvals.release_output(TOKEN, caller_id="dev-agent"),
    "record_outcome": lambda store: store.approvals.record_outcome(TOKEN, "done"),
    "wait_for_decision": lambda store: store.approvals.wait_for_decision(TOKEN, timeout_s=0),
    "list_requests": lambda store: store.approvals.list_requests(),
    "verify": lambda store: store.keys.verify(new_key("0123456789AB")),
}
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


@pytest.mark.parametrize("use", USES)
async def test_every_use_asks_for_a_migration(broken: GatewayStore, use: str) -> None:
    """Whichever way a statement goes to the database."""
    with pytest.raises(errors.SchemaOutOfDateError, match="gateway-store db upgrade"):
        await USES[use](broken)
