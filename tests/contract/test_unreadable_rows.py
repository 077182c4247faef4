"""Rows that hold what no column of theirs should, past the store: one sentence in place of a driver's error."""

from __future__ import annotations

from pathlib import Path
from uuid import uuid4

import pytest
from contract_helpers import POSTGRES, approved, column, idle, until

from agent_gateway_store import GatewayStore, StoreSettings
from agent_gateway_store.audit.doors import renew_identity
from agent_gateway_store.errors import GatewayStoreError, InvalidApiKeyError, LogMismatchError, UnreadableRowError
from agent_gateway_store.evidence import check
from agent_gateway_store.models.audit import RedactionFlag
from agent_gateway_store.models.evidence import FindingKind
from agent_gateway_store.models.values import ApprovalStatus
from agent_gateway_store.testing import RecordingNotifier
from builders import CALL, CALLER, make_event, make_request
from cases import cases
from tampering import tamper

NOTICES = "notification_deliveries"
SETTINGS = StoreSettings(audit_seal_seconds=0)
SQLITE = pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
# A time of PostgreSQL, whose years go on to 294276, that Python cannot hold.
FAR = "'20000-01-01'"


async def sealed(store: GatewayStore) -> None:
    await store.audit.write_many([make_event(request_id=f"r-{number}") for number in range(3)])
    await store.evidence.seal()


LAST = (f"UPDATE audit_checkpoints SET size = {2**63 - 1}",)
CREATED = "UPDATE audit_checkpoints SET created_at = ", "The checkpoint over 3 events holds no time that can be read."


@pytest.mark.parametrize(
    ("database_url", "statement", "kind", "said"),
    [
        *(("sqlite", CREATED[0] + value, FindingKind.ALTERED, CREATED[1]) for value in ("'garbage'", "x'00'", "7")),
        ("postgres", f"{CREATED[0]}'20000-01-01'", FindingKind.ALTERED, CREATED[1]),
        (
            "sqlite",
            "UPDATE audit_leaves SET leaf_hash = 'text' WHERE position = 2",
            FindingKind.ALTERED,
            "is not what was sealed",
        ),
        *(
            (name, *LAST, FindingKind.TRUNCATED, "over 9,223,372,036,854,775,807 events")
            for name in ("sqlite", "postgres")
        ),
    ],
    indirect=["database_url"],
)
async def test_a_checkpoint_without_a_time_is_seen(
    database_url: str, statement: str, kind: FindingKind, said: str
) -> None:
    """Nor one over all numbers, or a leaf that is no hash: whoever needs what was changed is told to run `verify`."""
    async with GatewayStore(database_url, redis_url="", settings=SETTINGS) as store:
        await sealed(store)
        await tamper(store.database.engine, statement)

        found = await store.evidence.verify()
        assert kind in {each.kind for each in found.findings}
        assert any(said in each.text for each in found.findings), found.findings
        await store.audit.write(make_event())
        for refused in (store.evidence.seal, lambda: store.evidence.prove("r-1")):
            with pytest.raises(LogMismatchError, match="run `gateway-store evidence verify`"):
                await refused()


@POSTGRES
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


async def test_an_altered_event_hides_no_other(database_url: str) -> None:
    """JSON that Python does not read, or of another kind than the field holds: flagged, and seen by `verify`."""
    async with GatewayStore(database_url, redis_url="", settings=SETTINGS) as store:
        is_postgres = store.database.dialect == "postgresql"
        altered = UNREADABLE if is_postgres else UNREADABLE | ON_SQLITE
        await store.audit.write_many([make_event(request_id=each) for each in ("whole", *altered)])
        await store.evidence.seal()
        for request_id, (name, value) in altered.items():
            cast = f"CAST(CAST(:value AS TEXT) AS {'JSONB' if is_postgres else 'TEXT'})"
            change = f"UPDATE audit_events SET {name} = {cast} WHERE request_id = '{request_id}'"
            await tamper(store.database.engine, change, values=[{"value": value}])

        flags = {each.request_id: each.redaction_flags for each in await store.audit.search()}
        invalid = {each: [RedactionFlag(field=name, reason="INVALID")] for each, (name, _) in altered.items()}
        assert flags == {"whole": []} | invalid
        for request_id in altered:
            shown = check((await store.evidence.prove(request_id)).to_json())
            assert [each.kind for each in shown.findings] == [FindingKind.ALTERED], request_id
        found = await store.evidence.verify()
        assert [each.kind for each in found.findings] == [FindingKind.ALTERED] * len(altered)


@SQLITE
async def test_an_event_of_no_time_is_told_in_one_sentence(database_url: str) -> None:
    async with GatewayStore(database_url, redis_url="", settings=SETTINGS) as store:
        await sealed(store)
        await tamper(store.database.engine, "UPDATE audit_events SET timestamp = 'garbage' WHERE request_id = 'r-1'")

        with pytest.raises(
            UnreadableRowError, match=r"Row 2 of audit_events holds what no store writes.*evidence verify"
        ):
            await store.audit.search()


@SQLITE
@cases("value", ["'x'", "''", "'$2b$31$' || substr(key_hash, 8)", "key_hash || char(0)"])
async def test_an_altered_hash_is_that_of_no_key(store: GatewayStore, value: str) -> None:
    issued = await store.keys.issue(uuid4().hex, role="dev")
    await tamper(store.database.engine, f"UPDATE api_keys SET key_hash = {value}")

    with pytest.raises(InvalidApiKeyError):
        await store.keys.verify(issued.plaintext)


@cases(
    ("name", "value"),
    [*((f"{each}_at", "'x'") for each in ("expires", "last_used", "previous_key_expires")),
     ("key_hash", "x'00'"), ("trust_level", "1.5"), ("role", "CAST(x'ff41' AS TEXT)"), ("expires_at", "'20000-01-01'")],
)  # fmt: skip
async def test_an_altered_key_is_told_in_one_sentence_and_can_be_revoked(
    store: GatewayStore, name: str, value: str
) -> None:
    """Nobody comes in by it, and it hides no other. PostgreSQL holds no more than a time that Python cannot."""
    if (store.database.dialect == "postgresql") is not ("20000" in value):
        return
    caller = uuid4().hex
    issued = await store.keys.issue(caller, role="dev")
    await tamper(store.database.engine, f"UPDATE api_keys SET {name} = {value} WHERE caller_id = '{caller}'")

    for read in (lambda: store.keys.verify(issued.plaintext), lambda: store.keys.get(caller)):
        with pytest.raises(UnreadableRowError, match=rf"^Row \d+ of api_keys holds what no store writes \({name}\): "):
            await read()
    assert caller in [key.caller_id for key in await store.keys.list()]
    assert not (await store.keys.revoke(caller)).is_active
    assert await column(store, "is_active", f"api_keys WHERE caller_id = '{caller}'") == [False]


@pytest.mark.parametrize(
    ("database_url", "name", "value"),
    [
        *(("postgres", *each) for each in (("tool_call", "'[]'"), ("expires_at", FAR), ("use_before", FAR))),
        *(("sqlite", "tool_call", value) for value in ("'7'", "''")),
        *(("sqlite", *each) for each in (("use_before", "'x'"), ("created_at", "7"), ("risk_explanation", "x'ff00'"))),
        ("sqlite", "risk_explanation", "CAST(x'ff41' AS TEXT)"),
    ],
    indirect=["database_url"],
)
async def test_an_altered_approval_releases_nothing_and_hides_no_other(
    database_url: str, tmp_path: Path, name: str, value: str
) -> None:
    """And can be denied; its time may be one that Python cannot hold, and SQLite keeps anything."""
    said = rf"^Row \d+ of approval_requests holds what no store writes \({name}\): restore it from a backup\.$"
    async with GatewayStore(database_url, redis_url="", settings=SETTINGS) as store:
        approvals = store.approvals
        used, waits = await approved(store), await approvals.issue_token(make_request(request_id="r-2"))
        named = (await approvals.check_token(used)).approval_id
        asked = await approvals.acquire(make_request())
        await approvals.approve(approval_id=asked.approval_id, approver_id="approver-1")
        await store.audit.write(make_event(request_id="r-1", approval_id=named))
        await tamper(store.database.engine, f"UPDATE approval_requests SET {name} = {value}")
        whole = await approvals.issue_token(make_request(request_id="r-4"))

        listed = list(await approvals.search())
        assert [each.risk_explanation[:12] for each in listed[1:]] == ["INVALID: Row"] * 3
        assert listed[0].approval_id == (await approvals.check_token(whole)).approval_id
        assert [each async for each in approvals.stream()] == listed
        assert len(await store.retention.find(caller_id="dev-agent")) == 5
        for refused in (
            lambda: approvals.check_token(used),
            lambda: approvals.get(approval_id=named),
            lambda: approvals.wait_for_decision(used, timeout_s=5),
            lambda: approvals.consume_token(used, caller_id="dev-agent", tool_call=CALL),
            # Of another call it asks anew.
            *([] if name == "tool_call" else [lambda: approvals.acquire(make_request(), wait_s=5)]),
        ):
            with pytest.raises(UnreadableRowError, match=said):
                await refused()
        assert "asked" in {step["event"] for step in await approvals.history(approval_id=named)}
        assert (await store.evidence.prove("r-1")).approval is None
        async with store.audit.call(CALL, CALLER, decision="ALLOW", approval_id=named, request_id="r-3"):
            pass
        assert await store.audit.get_by_request_id("r-3") is not None
        if store.database.dialect == "sqlite":
            with pytest.raises(UnreadableRowError, match=said):
                await approvals.approve(waits, "approver-1")
        assert (await approvals.deny(waits, "approver-1")).status is ApprovalStatus.DENIED
        assert await column(store, "status", "approval_requests WHERE request_id = 'r-2'") == ["DENIED"]
        for file in ("a.jsonl", "a.csv", "a.parquet"):
            try:
                await approvals.export(tmp_path / file)
            except GatewayStoreError as exc:
                assert " of approval_requests holds " in str(exc)  # noqa: PT017


@SQLITE
async def test_an_altered_approval_stops_no_restore(database_url: str) -> None:
    async with GatewayStore(database_url, redis_url="", settings=SETTINGS, plugins=[RecordingNotifier()]) as store:
        for number in range(2):
            await store.approvals.issue_token(make_request(request_id=f"r-{number}"))

        async def is_delivered() -> bool:
            return not await store.notifications.list("DUE")

        # And due again after the test: the store would deliver them meanwhile.
        await until(is_delivered)
        later = "2100-01-01 00:00:00.000000".replace(":", r"\:")
        due = f"UPDATE {NOTICES} SET status = 'DUE', delivered_at = NULL, next_attempt_at = '{later}'"
        first = "(SELECT approval_id FROM approval_requests WHERE id = 1)"
        altered = (
            f"UPDATE {name} SET approval_id = 'zz' WHERE approval_id = " for name in (NOTICES, "approval_requests")
        )
        await tamper(store.database.engine, due, *(f"{each}{first}" for each in altered))

        facts = await renew_identity(store.database.engine, by="ann", environment="test")
        assert facts["approvals_cancelled"] == 2
        assert await column(store, "id", NOTICES) == []


@SQLITE
async def test_what_is_no_utf8_stops_no_sweep(database_url: str) -> None:
    async with GatewayStore(database_url, redis_url="", settings=SETTINGS) as store:
        for number in range(2):
            await store.approvals.issue_token(make_request(request_id=f"r-{number}"))
        past = "UPDATE approval_requests SET expires_at = '2020-01-01 00:00:00.000000'".replace(":", r"\:")
        await tamper(
            store.database.engine, past, "UPDATE approval_requests SET caller_id = CAST(x'ff41' AS TEXT) WHERE id = 1"
        )

        assert await store.approvals.expire_stale() == 2
        assert await column(store, "status", "approval_requests") == ["EXPIRED"] * 2


async def test_an_altered_use_stops_no_later_ask(database_url: str) -> None:
    time = FAR if database_url.startswith("postgres") else "'x'"
    async with GatewayStore(database_url, redis_url="", settings=SETTINGS) as store:
        asked = await store.approvals.acquire(make_request())
        await store.approvals.approve(approval_id=asked.approval_id, approver_id="approver-1")
        assert (await store.approvals.acquire(make_request())).status is ApprovalStatus.USED
        await tamper(store.database.engine, f"UPDATE approval_requests SET tool_call = '7', used_at = {time}")

        again = await store.approvals.acquire(make_request())
        shown = await store.approvals.get(approval_id=again.approval_id)
        assert (shown.status, "used before, at a time that" in shown.risk_explanation) == (ApprovalStatus.PENDING, True)


@SQLITE
async def test_a_page_ends_before_approvals_of_no_time(database_url: str) -> None:
    """They are on the next one; a page of nothing else raises."""
    async with GatewayStore(database_url, redis_url="", settings=SETTINGS) as store:
        for number in range(4):
            await store.approvals.issue_token(make_request(request_id=f"r-{number}"))
        altered = "UPDATE approval_requests SET created_at = created_at || 'x'"
        await tamper(store.database.engine, f"{altered} WHERE request_id = 'r-2'")

        first = await store.approvals.search(limit=2)
        then = await store.approvals.search(limit=2, cursor=first.next_cursor)
        last = await store.approvals.search(limit=2, cursor=then.next_cursor)
        found = [[each.request_id for each in page] for page in (first, then, last)]
        assert found == [["r-3"], ["r-2", "r-1"], ["r-0"]]
        await tamper(store.database.engine, altered)
        with pytest.raises(UnreadableRowError, match=r"\(created_at\)"):
            await store.approvals.search(limit=2)


TIMES = {"approval_votes": "voted_at", "notification_deliveries": "created_at", "audit_holds": "placed_at"}


@pytest.mark.parametrize(
    ("database_url", "changes"),
    [
        ("sqlite", {"audit_holds": "filters = '[1]'"}),
        ("postgres", {"audit_holds": r"""filters = '{"nosuch"\: 1}'"""}),
        ("sqlite", {table: f"{name} = 'x'" for table, name in TIMES.items()}),
        ("postgres", {table: f"{name} = {FAR}" for table, name in TIMES.items()}),
    ],
    indirect=["database_url"],
)
async def test_an_altered_hold_keeps_everything_until_it_is_released(
    database_url: str, changes: dict[str, str]
) -> None:
    """Nobody can say what it covers; votes and notices of times that cannot be read are listed, too."""
    async with GatewayStore(database_url, redis_url="", settings=SETTINGS, plugins=[RecordingNotifier()]) as store:
        await approved(store)
        await idle(store)
        await store.retention.hold("kept", reason="a case", by="alice", caller_id="dev-agent")
        await tamper(store.database.engine, *(f"UPDATE {table} SET {change}" for table, change in changes.items()))

        assert len((await store.approvals.search())[0].votes or ()) == 1
        assert {"vote", "notice"} <= {
            step["event"] for step in await store.approvals.history((await store.approvals.search())[0].approval_id)
        }
        assert len(await store.notifications.list()) == len(await column(store, "id", "notification_deliveries"))
        (hold,) = await store.retention.holds()
        assert hold.reason.startswith("INVALID: Row kept of audit_holds holds what no store writes")
        with pytest.raises(UnreadableRowError, match="Row kept of audit_holds"):
            await store.retention.prune(before="0s", by="alice", discard=True, below_floor=True)
        assert (await store.retention.release_hold("kept", by="alice")).name == "kept"


@SQLITE
@pytest.mark.parametrize(
    ("name", "value"),
    [("risk_labels", "'[1]'"), ("latency_ms", "9e999"), ("latency_ms", "'x'"), ("risk_score", "CAST(x'ff41' AS TEXT)")],
)
async def test_bulk_reads_of_an_altered_event_raise_one_sentence_or_repair_it(
    database_url: str, tmp_path: Path, name: str, value: str
) -> None:
    async with GatewayStore(database_url, redis_url="", settings=SETTINGS) as store:
        await sealed(store)
        await tamper(store.database.engine, f"UPDATE audit_events SET {name} = {value} WHERE request_id = 'r-1'")

        for read in (
            lambda: anext(store.audit.stream(request_id="r-1")),
            store.audit.to_arrow,
            store.audit.to_pandas,
            *(lambda file=file: store.audit.export(tmp_path / file) for file in ("e.jsonl", "e.csv", "e.parquet")),
        ):
            try:
                await read()
            except UnreadableRowError as exc:
                assert "holds" in str(exc)  # noqa: PT017
