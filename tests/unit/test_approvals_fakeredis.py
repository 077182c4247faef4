"""`ApprovalManager(session, redis)` over a database in memory and a Redis of Python."""

from __future__ import annotations

import fakeredis
import pytest
from sqlalchemy.ext.asyncio import AsyncSession

from agent_gateway_store import ApprovalManager, errors
from agent_gateway_store.storage import migrate
from agent_gateway_store.storage.database import create_engine
from builders import CALL, make_request

pytestmark = pytest.mark.unit


@pytest.mark.parametrize("decode_responses", [False, True])
async def test_approval_lives_over_fakeredis(decode_responses: bool) -> None:
    """Both entries are written with a TTL and follow the decision, with a client that decodes and one that does not."""
    engine = create_engine("sqlite://")
    await migrate.upgrade(engine)
    request = make_request()
    async with (
        AsyncSession(engine) as session,
        fakeredis.FakeAsyncRedis(decode_responses=decode_responses) as client,
    ):
        manager = ApprovalManager(session, client)
        token = await manager.issue_token(request)
        keys = await client.keys()
        lives = [await client.ttl(key) for key in keys]
        await manager.approve(approval_id=request.approval_id, approver_id="approver-1")
        checked = await manager.check_token(token)
        await manager.consume_token(token, caller_id="dev-agent", tool_call=CALL)
        with pytest.raises(errors.ApprovalAlreadyUsedError):
            await manager.consume_token(token, caller_id="dev-agent", tool_call=CALL)
        used = await manager.check_token(token)
    await engine.dispose()

    assert len(keys) == 2
    assert all(0 < life <= 3600 for life in lives)
    assert (checked.status, used.status) == ("APPROVED", "USED")
