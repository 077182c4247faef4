"""What a database holds outlives the way up and back, and no step down drops what is in use."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
from alembic.util import CommandError
from migration_helpers import execute
from sqlalchemy import text
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import AsyncEngine

from agent_gateway_store.storage import migrate
from tampering import tamper, triggers_off

pytestmark = pytest.mark.integration


COLUMNS = (
    "id, request_id, org_id, timestamp, caller_id, caller_role, environment, mcp_server, tool_name, raw_args_hash, "
    "sanitized_args, risk_labels, risk_score, matched_policy_rule, decision, execution_status, latency_ms, "
    "output_decision, redaction_flags, deterministic_rationale"
)


def insert(number: int, status: str | None = None) -> str:
    said = "NULL" if status is None else f"'{status}'"
    return (
        f"INSERT INTO audit_events ({COLUMNS}) VALUES ({number}, 'r-{number}', 'acme', '2026-05-01 00:00:00', 'c', "
        f"'r', 'e', 's', 't', '{'0' * 64}', '{{}}', '[]', 0.5, 'p', 'ALLOW', {said}, 1, 'ALLOW', '[]', 'd')"
    )


async def read(engine: AsyncEngine, names: str = COLUMNS) -> list[Any]:
    async with engine.begin() as connection:
        return [tuple(row) for row in await connection.execute(text(f"SELECT {names} FROM audit_events ORDER BY id"))]


async def test_rows_outlive_the_way_to_0002_and_back(engine: AsyncEngine) -> None:
    """Old rows keep all they hold, without a transaction; rows written since have one, on PostgreSQL."""
    await migrate.upgrade(engine, "0001_initial")
    await execute(engine, insert(1))
    before = await read(engine)
    await migrate.upgrade(engine)
    await execute(engine, insert(2))
    transactions = [row[0] for row in await read(engine, "transaction_id")]
    after = await read(engine)
    await migrate.downgrade(engine, "0001_initial")
    back = await read(engine)

    assert (transactions[0], transactions[1] is not None) == (None, engine.dialect.name == "postgresql")
    assert after[:1] == before
    assert back == after


async def test_rows_outlive_the_way_to_0004_and_back(engine: AsyncEngine) -> None:
    """Old rows keep all they hold; the new words are taken from then on, others are still refused."""
    await migrate.upgrade(engine, "0003_due_by_notifier")
    await execute(engine, insert(1), insert(2, "TIMEOUT"), insert(7, "SUCCESS"))
    before = await read(engine, f"{COLUMNS}, transaction_id")
    with pytest.raises(IntegrityError):
        await execute(engine, insert(8, "CANCELLED"))
    await migrate.upgrade(engine)
    after = await read(engine, f"{COLUMNS}, transaction_id")
    await execute(engine, insert(8, "CANCELLED"), insert(9, "APPROVED_OUTPUT_RELEASE"))
    with pytest.raises(IntegrityError):
        await execute(engine, insert(10, "FINE"))

    assert after == before
    assert [row[0] for row in await read(engine, "id")] == [1, 2, 7, 8, 9]


async def test_rows_outlive_the_way_to_0006_and_back(engine: AsyncEngine) -> None:
    """Old rows get an empty extra, and so do those of a process that does not know the columns yet."""
    await migrate.upgrade(engine, "0004_execution_status")
    await execute(engine, insert(1), insert(2, "TIMEOUT"))
    before = await read(engine)
    await migrate.upgrade(engine)
    await execute(engine, insert(3))
    added = await read(engine, "approval_id, CAST(extra AS TEXT)")
    after = await read(engine)
    await migrate.downgrade(engine, "0004_execution_status")

    assert after[:2] == before
    assert added == [(None, "{}")] * 3
    assert await read(engine) == after


@pytest.mark.parametrize(
    ("column", "value"), [("approval_id", "a" * 32), ("extra", '{"a": 1}')], ids=["approval_id", "extra"]
)
async def test_downgrade_drops_no_column_in_use(engine: AsyncEngine, column: str, value: str) -> None:
    await migrate.upgrade(engine)
    await execute(engine, insert(1), insert(2))
    async with engine.begin() as connection, triggers_off(connection):
        await connection.exec_driver_sql(f"UPDATE audit_events SET {column} = '{value}' WHERE id = 2")
    before = await read(engine, f"id, {column}")
    with pytest.raises(CommandError, match="1 audit events have an approval_id or something in extra"):
        await migrate.downgrade(engine, "0004_execution_status")

    assert (await read(engine, f"id, {column}"), await migrate.current(engine)) == (before, migrate.head())


def insert_key(number: int, active: bool, dialect: str) -> str:
    """The statement that inserts a key of one caller."""
    is_active = str(active).lower() if dialect == "postgresql" else str(int(active))
    return (
        "INSERT INTO api_keys (key_id, caller_id, org_id, key_hash, role, trust_level, environment, is_active) "
        f"VALUES ('k-{number}', 'c', 'acme', 'h', 'r', 1, 'e', {is_active})"
    )


async def test_keys_outlive_the_way_to_0007_and_back(engine: AsyncEngine) -> None:
    """From then on a caller has several rows, one of them active; before, and again afterwards, only one."""
    key = partial(insert_key, dialect=engine.dialect.name)
    everything = "SELECT * FROM api_keys ORDER BY id"
    await migrate.upgrade(engine, "0006_event_extra")
    await execute(engine, key(1, False))
    with pytest.raises(IntegrityError):
        await execute(engine, key(2, True))
    async with engine.begin() as connection:
        before = (await connection.exec_driver_sql(everything)).all()
    await migrate.upgrade(engine)
    await execute(engine, key(3, True), key(4, False))
    with pytest.raises(IntegrityError):
        await execute(engine, key(5, True))
    with pytest.raises(CommandError, match="1 callers have revoked API keys beside another one"):
        await migrate.downgrade(engine, "0006_event_extra")
    await execute(engine, "DELETE FROM api_keys WHERE key_id != 'k-1'")
    await migrate.downgrade(engine, "0006_event_extra")

    async with engine.begin() as connection:
        assert (await connection.exec_driver_sql(everything)).all() == before
    with pytest.raises(IntegrityError):
        await execute(engine, key(6, True))


async def test_downgrade_rewrites_no_event(engine: AsyncEngine) -> None:
    """While an event has a word that the older schema does not know, it is refused in one sentence, nothing changed."""
    await migrate.upgrade(engine)
    await execute(engine, insert(1, "SUCCESS"), insert(2, "CANCELLED"), insert(3, "APPROVED_OUTPUT_RELEASE"))
    before = await read(engine)
    with pytest.raises(CommandError, match=r"2 audit events have the execution_status CANCELLED or .* delete them"):
        await migrate.downgrade(engine, "0003_due_by_notifier")
    assert (await read(engine), await migrate.current(engine)) == (before, migrate.head())
    await tamper(engine, "DELETE FROM audit_events WHERE id > 1")
    await migrate.downgrade(engine, "0003_due_by_notifier")

    assert await read(engine) == before[:1]
    with pytest.raises(IntegrityError):
        await execute(engine, insert(2, "CANCELLED"))
