"""`ApprovalManager(session, redis)`: the same approvals for a gateway that owns its session."""

from __future__ import annotations

import pytest
import redis.asyncio
from contract_helpers import EACH
from sqlalchemy import select, text
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession

from agent_gateway_store import ApprovalManager, ApprovalRequest, StoreSettings, errors
from agent_gateway_store.storage.cache import get_redis
from agent_gateway_store.storage.database import close_db, get_db
from builders import CALL, make_request


@pytest.fixture
def manager(session: AsyncSession, client: redis.asyncio.Redis | None) -> ApprovalManager:
    """A manager over both."""
    return ApprovalManager(session, client)


@EACH
async def test_whole_life(manager: ApprovalManager, session: AsyncSession) -> None:
    """Asked, checked, approved, used, noted, listed; and no transaction is left open by a write."""
    token = await manager.issue_token(make_request(request_id="r-1"))
    assert not session.in_transaction()
    assert (await manager.check_token(token)).status == "PENDING"
    assert (await manager.acquire(make_request())).status == "PENDING"
    found = (await manager.check_token(token, fresh=True)).approval_id
    await session.commit()
    assert (await manager.approve(token, approver_id="approver-1", note="ok")).status == "APPROVED"
    assert (await manager.consume_token(token, caller_id="dev-agent", tool_call=CALL)).status == "USED"
    assert (await manager.record_outcome(token, "done")).status == "USED"

    assert (await manager.get(approval_id=found)).outcome == "done"
    assert [row.request_id for row in await manager.list_requests("USED")] == ["r-1"]
    assert await manager.expire_stale() == 0


@EACH
async def test_refusal_leaves_the_session_usable(manager: ApprovalManager, session: AsyncSession) -> None:
    token = await manager.issue_token(make_request())
    await manager.deny(token, "approver-1")

    with pytest.raises(errors.ApprovalAlreadyDecidedError, match="DENIED by approver-1"):
        await manager.approve(token, "approver-2")
    assert not session.in_transaction()
    assert (await manager.check_token(token)).status == "DENIED"
    assert len(list((await session.execute(select(ApprovalRequest))).scalars())) == 1


async def test_work_of_the_caller_goes_with_the_write(manager: ApprovalManager, session: AsyncSession) -> None:
    """What the caller had in the session is committed with a write that succeeds, and rolled back with one refused."""
    insert = text(
        "INSERT INTO api_keys (key_id, caller_id, org_id, key_hash, role, trust_level, environment, is_active)"
        " VALUES (:name, :name, 'default', 'x', 'r', 1, 'dev', true)"
    )
    await session.execute(insert, {"name": "kept"})
    token = await manager.issue_token(make_request())
    await session.execute(insert, {"name": "dropped"})
    with pytest.raises(errors.SelfApprovalError):
        await manager.approve(token, "dev-agent")

    assert list((await session.execute(text("SELECT caller_id FROM api_keys"))).scalars()) == ["kept"]


@EACH
async def test_settings_and_organisation_are_taken(session: AsyncSession, client: redis.asyncio.Redis | None) -> None:
    acme = ApprovalManager(session, client, org_id="acme", settings=StoreSettings(allow_self_approval=True))
    token = await acme.issue_token(make_request())

    with pytest.raises(errors.ApprovalNotFoundError):
        await ApprovalManager(session, client, org_id="globex").check_token(token)
    assert (await acme.approve(token, "dev-agent")).status == "APPROVED"
    assert [row.org_id for row in await ApprovalManager(session, client).list_requests()] == ["acme"]


@EACH
async def test_dependencies_of_a_web_framework_fit(
    database_url: str, redis_setting: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DATABASE_URL", database_url)
    monkeypatch.setenv("REDIS_URL", redis_setting)
    tokens = []
    for _ in range(2):
        async for session in get_db():
            async for client in get_redis():
                assert (client is None) == (not redis_setting)
                tokens.append(await ApprovalManager(session, client).issue_token(make_request()))
    await close_db()

    assert len(set(tokens)) == 2


async def test_broken_session_is_reported_as_ours(session: AsyncSession, engine: AsyncEngine) -> None:
    """A table that is missing is one sentence with the next step, not an error of a driver."""
    manager = ApprovalManager(session)
    async with engine.begin() as connection:
        await connection.execute(text("ALTER TABLE approval_votes RENAME TO hidden_votes"))
    try:
        token = await manager.issue_token(make_request())
        with pytest.raises(errors.SchemaOutOfDateError, match="db upgrade"):
            await manager.approve(token, "approver-1")
        assert (await manager.check_token(token, fresh=True)).status == "PENDING"
    finally:
        await session.rollback()
        async with engine.begin() as connection:
            await connection.execute(text("ALTER TABLE hidden_votes RENAME TO approval_votes"))
