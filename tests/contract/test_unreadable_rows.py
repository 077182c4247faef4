"""Rows that hold what no column of theirs should, past the store: one sentence in place of a driver's error."""

from __future__ import annotations

import pytest

from agent_gateway_store import GatewayStore, StoreSettings
from agent_gateway_store.errors import InvalidApiKeyError, LogMismatchError, StoreUnavailableError
from agent_gateway_store.evidence import check
from agent_gateway_store.models.audit import RedactionFlag
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


UNREADABLE = {
    "a large number": ("sanitized_args", '{"n": ' + "9" * 5_000 + "}"),
    "a large label": ("risk_labels", "[" + "9" * 5_000 + "]"),
    "extra": ("extra", '{"n": ' + "9" * 5_000 + "}"),
    "arguments in a list": ("sanitized_args", "[1]"),
    "extra in a list": ("extra", "[1]"),
    "labels in an object": ("risk_labels", '{"LABEL": 1}'),
    "a label that is a number": ("risk_labels", "[1]"),
    "flags in an object": ("redaction_flags", "{}"),
}
# What PostgreSQL refuses. The JSON decoder stops at "x" as if a list had come to its end.
ON_SQLITE = {
    "no JSON": ("sanitized_args", "x"),
    "deep": ("sanitized_args", "[" * 100_000 + "]" * 100_000),
    "empty": ("risk_labels", ""),
    "flags": ("redaction_flags", '[{"x": 1}]'),
    "no UUID": ("approval_id", "x"),
}


async def assert_others_are_listed(url: str, name: str, value: str) -> None:
    """One row that somebody altered is flagged, and hides no other; what was altered is not passed off as sealed."""
    async with GatewayStore(url, redis_url="", settings=SETTINGS) as store:
        await sealed(store)
        kind = "JSONB" if store.database.dialect == "postgresql" else "TEXT"
        altered = f"UPDATE audit_events SET {name} = CAST(CAST(:value AS TEXT) AS {kind}) WHERE request_id = 'r-1'"
        await tamper(store.database.engine, altered, values=[{"value": value}])

        found = {each.request_id: each for each in await store.audit.search()}
        assert sorted(found) == ["r-0", "r-1", "r-2"]
        assert found["r-1"].redaction_flags == [RedactionFlag(field=name, reason="INVALID")]
        assert found["r-0"].redaction_flags == found["r-2"].redaction_flags == []
        shown = check((await store.evidence.prove("r-1")).to_json())
        assert [each.kind for each in shown.findings] == [FindingKind.ALTERED]
        assert [each.kind for each in (await store.evidence.verify()).findings] == [FindingKind.ALTERED]


@pytest.mark.parametrize(("name", "value"), UNREADABLE.values(), ids=UNREADABLE)
async def test_an_altered_event_hides_no_other(database_url: str, name: str, value: str) -> None:
    """JSON that Python does not read, or of another kind than the field holds."""
    await assert_others_are_listed(database_url, name, value)


@SQLITE
@pytest.mark.parametrize(("name", "value"), ON_SQLITE.values(), ids=ON_SQLITE)
async def test_what_is_no_json_hides_no_other(database_url: str, name: str, value: str) -> None:
    """SQLite keeps any text."""
    await assert_others_are_listed(database_url, name, value)


@SQLITE
async def test_an_event_of_no_time_is_told_in_one_sentence(database_url: str) -> None:
    """Nothing may stand for when it was."""
    async with GatewayStore(database_url, redis_url="", settings=SETTINGS) as store:
        await sealed(store)
        await tamper(store.database.engine, "UPDATE audit_events SET timestamp = 'garbage' WHERE request_id = 'r-1'")

        with pytest.raises(StoreUnavailableError, match=r"audit_events holds what no store writes.*evidence verify"):
            await store.audit.search()


@SQLITE
@pytest.mark.parametrize("value", ["'x'", "''", "x'00'", "'$2b$31$' || substr(key_hash, 8)", "key_hash || char(0)"])
async def test_an_altered_hash_is_that_of_no_key(database_url: str, value: str) -> None:
    """The key is refused, as any that does not match."""
    async with GatewayStore(database_url, redis_url="", settings=SETTINGS) as store:
        issued = await store.keys.issue("alice", role="dev")
        await tamper(store.database.engine, f"UPDATE api_keys SET key_hash = {value}")

        with pytest.raises(InvalidApiKeyError):
            await store.keys.verify(issued.plaintext)


@SQLITE
@pytest.mark.parametrize("name", ["expires_at", "last_used_at", "previous_key_expires_at"])
async def test_an_altered_key_is_told_in_one_sentence(database_url: str, name: str) -> None:
    """Nobody comes in by it."""
    async with GatewayStore(database_url, redis_url="", settings=SETTINGS) as store:
        issued = await store.keys.issue("alice", role="dev")
        await tamper(store.database.engine, f"UPDATE api_keys SET {name} = 'garbage'")

        for read in (lambda: store.keys.verify(issued.plaintext), store.keys.list, lambda: store.keys.get("alice")):
            with pytest.raises(StoreUnavailableError, match="A row of api_keys holds what no store writes"):
                await read()
