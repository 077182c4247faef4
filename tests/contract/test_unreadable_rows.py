"""Rows that hold what no column of theirs should, past the store: one sentence in place of a driver's error."""

from __future__ import annotations

import pytest

from agent_gateway_store import GatewayStore, StoreSettings
from agent_gateway_store.errors import LogMismatchError
from agent_gateway_store.models.evidence import FindingKind
from builders import make_event
from tampering import tamper

SETTINGS = StoreSettings(audit_seal_seconds=0)
SQLITE = pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
POSTGRES = pytest.mark.parametrize("database_url", ["postgres"], indirect=True)


async def sealed(store: GatewayStore) -> None:
    """Write and seal three events."""
    await store.audit.write_many([make_event(request_id=f"r-{number}") for number in range(3)])
    await store.evidence.seal()


async def assert_log_refuses(url: str, statement: str, kind: FindingKind, said: str) -> None:
    """After a statement, `verify` names it, and whoever needs what it changed is told to run that."""
    async with GatewayStore(url, redis_url="", settings=SETTINGS) as store:
        await sealed(store)
        await tamper(store.database.engine, statement)

        found = await store.evidence.verify()
        assert kind in {each.kind for each in found.findings}
        assert any(said in each.text for each in found.findings), found.findings
        await store.audit.write(make_event())
        for refused in (store.evidence.seal, lambda: store.evidence.prove("r-1")):
            with pytest.raises(LogMismatchError, match="run `gateway-store evidence verify`"):
                await refused()


CREATED = "The checkpoint over 3 events holds no time that can be read."


@SQLITE
@pytest.mark.parametrize("value", ["'garbage'", "x'00'", "7"])
async def test_a_checkpoint_without_a_time_is_seen(database_url: str, value: str) -> None:
    """On SQLite a column holds anything."""
    statement = f"UPDATE audit_checkpoints SET created_at = {value}"
    await assert_log_refuses(database_url, statement, FindingKind.ALTERED, CREATED)


@POSTGRES
async def test_a_checkpoint_of_a_time_that_python_cannot_hold_is_seen(database_url: str) -> None:
    """PostgreSQL goes on to the year 294276."""
    statement = "UPDATE audit_checkpoints SET created_at = '20000-01-01'"
    await assert_log_refuses(database_url, statement, FindingKind.ALTERED, CREATED)


@SQLITE
async def test_a_leaf_that_holds_text_is_seen(database_url: str) -> None:
    """No hash of the tree is made of it."""
    statement = "UPDATE audit_leaves SET leaf_hash = 'text' WHERE position = 2"
    await assert_log_refuses(database_url, statement, FindingKind.ALTERED, "is not what was sealed")


async def test_a_checkpoint_over_all_numbers_is_seen(database_url: str) -> None:
    """It would be the last one for ever."""
    statement = f"UPDATE audit_checkpoints SET size = {2**63 - 1}"
    said = "There was a checkpoint over 9,223,372,036,854,775,807 events"
    await assert_log_refuses(database_url, statement, FindingKind.TRUNCATED, said)


async def test_a_leaf_at_the_last_of_all_positions_stops_sealing_with_one_sentence(database_url: str) -> None:
    """Anybody who may add leaves can put one there; proofs of what was sealed go on."""
    async with GatewayStore(database_url, redis_url="", settings=SETTINGS) as store:
        await sealed(store)
        leaf = f"INSERT INTO audit_leaves (position, event_id, salt, leaf_hash) VALUES ({2**63 - 1}, 999, NULL, 'x')"
        await tamper(store.database.engine, leaf)

        await store.audit.write(make_event())
        with pytest.raises(LogMismatchError, match="does not agree with its last checkpoint, over 3 events"):
            await store.evidence.seal()
        assert (await store.evidence.prove("r-1")).position == 1
        found = await store.evidence.verify()
    assert [(each.kind, each.text) for each in found.findings] == [
        (FindingKind.BAD_TREE, "There are 1 leaves outside of the last checkpoint.")
    ]
