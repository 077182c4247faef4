"""A batch of events that are stored already is settled as a whole: looked up together, not row by row."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from sqlalchemy import event, text

from agent_gateway_store import GatewayStore, WriteOutcome
from agent_gateway_store.audit.record import REUSED_LABEL
from builders import make_event, rehash
from proofs.harness import TRIGGERS, stored_events

pytestmark = pytest.mark.integration

STORED, DUPLICATE, SPOOLED = WriteOutcome.STORED, WriteOutcome.DUPLICATE, WriteOutcome.SPOOLED


@pytest.fixture
def redis_setting() -> str:
    """No Redis: the audit log does not know it."""
    return ""


@contextmanager
def single_inserts(store: GatewayStore) -> Iterator[list[str]]:
    """Give the inserts of events that go through SQLAlchemy, as those of single rows do."""
    seen: list[str] = []

    def hear(_connection: Any, _cursor: Any, statement: str, *_: Any) -> None:
        if "INSERT INTO audit_events" in statement:
            seen.append(statement)

    engine = store.database.engine.sync_engine
    event.listen(engine, "before_cursor_execute", hear)
    try:
        yield seen
    finally:
        event.remove(engine, "before_cursor_execute", hear)


async def test_known_and_reused_ids_of_a_batch_are_settled_together(store: GatewayStore) -> None:
    """With new events among them: each gets its outcome, and no row goes on its own."""
    known = [make_event(request_id=f"id {number}") for number in range(60)]
    others = [make_event(request_id=f"id {number}", tool_name="other") for number in range(0, 60, 3)]
    new = [make_event() for _ in range(30)]
    mixed = [*known[:30], *new, *known[30:]]
    await store.audit.write_many(known)

    with single_inserts(store) as inserts:
        outcomes = [await store.audit.write_many(some) for some in (mixed, others, [*others, *mixed])]

    assert inserts == []
    assert outcomes == [{STORED: 30, DUPLICATE: 60}, {STORED: 20}, {DUPLICATE: 110}]
    found = await stored_events(store)
    assert len(found) == 110
    assert sum(each.risk_labels == [REUSED_LABEL] for each in found) == 20
    assert all(each.content_hash == rehash(each) for each in found)


@pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
async def test_a_refused_row_among_known_ones_fails_only_itself(store: GatewayStore) -> None:
    """Known events stay duplicates, reused ids and new events are stored, and the refused one is set aside."""
    known = [make_event(request_id=f"id {number}") for number in range(5)]
    await store.audit.write_many(known)
    async with store.database.write() as connection:
        await connection.execute(text(TRIGGERS["sqlite"]))
    reused, poison = make_event(request_id="id 1", tool_name="other"), make_event(tool_name="poison")

    outcomes = await store.audit.write_many([*known, reused, make_event(), poison])

    assert outcomes == {STORED: 2, DUPLICATE: 5, SPOOLED: 1}
    assert len(await stored_events(store)) == 7
