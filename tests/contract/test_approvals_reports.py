"""What an auditor asks of approvals: votes in listings, counts and waiting times, exports."""

from __future__ import annotations

import csv
import io
import json
import stat
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from contract_helpers import counted_statements
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncSession

from agent_gateway_store import ApprovalManager, ApprovalRequest, ApprovalScope, GatewayStore, ToolCall, clock, errors
from agent_gateway_store.audit.doors import renew_identity
from agent_gateway_store.models.delivery import NotificationDelivery
from builders import make_event, make_request

SECRET = "never-released"


async def filled(store: GatewayStore) -> list[str]:
    """Four approvals, asked at 0 s; decided after 10, 20 and 30 s, and not at all. Returns their tokens."""
    tokens = []
    for number in range(4):
        request = make_request(
            request_id=f"r-{number}",
            caller_id=f"agent-{number % 2}",
            tool_call=ToolCall(server="s", tool=f"t-{number % 2}", arguments={"text": "=1+1, \n ü"}),
            org_id=f"org-{number // 2}",
            required_approvals=2 if number == 0 else 1,
            scope=ApprovalScope.OUTPUT_RELEASE if number == 2 else ApprovalScope.EXECUTION,
            output_payload={"secret": SECRET} if number == 2 else None,
        )
        tokens.append(await store.approvals.issue_token(request))
    clock.move(timedelta(seconds=10))
    await store.approvals.approve(tokens[0], "carla", "Fine", channel="slack")
    await store.approvals.approve(tokens[0], "dora", "Fine, too")
    clock.move(timedelta(seconds=10))
    await store.approvals.deny(tokens[1], "dora", '"No", said Dora\n')
    clock.move(timedelta(seconds=10))
    await store.approvals.approve(tokens[2], "carla")
    await store.approvals.release_output(tokens[2], caller_id="agent-0")
    return tokens


def told(request: ApprovalRequest) -> list[tuple[str, str, str]] | None:
    return request.votes and [(vote.approver_id, str(vote.decision), vote.channel) for vote in request.votes]


async def test_a_listing_tells_the_votes_of_each_approval(store: GatewayStore) -> None:
    """In a search, a stream and `get`, in the order of time; as objects, dicts, tables and frames."""
    await filled(store)
    page = await store.approvals.search()
    expected = {
        "r-0": [("carla", "APPROVED", "slack"), ("dora", "APPROVED", "api")],
        "r-1": [("dora", "DENIED", "api")],
        "r-2": [("carla", "APPROVED", "api")],
        "r-3": [],
    }

    assert {each.request_id: told(each) or [] for each in page} == expected
    assert {each.request_id: told(each) or [] async for each in store.approvals.stream()} == expected
    one = await store.approvals.get(approval_id=page[-1].approval_id)
    assert told(one) == expected["r-0"]
    dicts = page.to_dicts()
    assert [vote["channel"] for vote in dicts[-1]["votes"]] == ["slack", "api"]
    assert json.loads(page.to_arrow().column("votes").to_pylist()[-1])[0]["approver_id"] == "carla"
    assert make_request().votes is None
    assert ApprovalRequest.model_validate_json(one.model_dump_json()).request_id == "r-0"


async def test_the_votes_of_a_page_are_one_statement(store: GatewayStore) -> None:
    for number in range(10):
        await store.approvals.issue_token(make_request(request_id=f"r-{number}"))
    with counted_statements(store, "approval_votes") as statements:
        async with AsyncSession(store.database.engine) as session:
            page = await ApprovalManager(session).search(limit=100)

    assert (len(page), len(statements)) == (10, 1)


async def test_counts_and_waiting_times(store: GatewayStore) -> None:
    """By status, outcome, caller, tool and approver; the seconds from asking to the decision; with filters."""
    await filled(store)

    (everything,) = await store.approvals.stats()
    assert everything == {
        "approvals": 4,
        "pending": 1,
        "approved": 1,
        "denied": 1,
        "expired": 0,
        "cancelled": 0,
        "used": 1,
        "unknown_outcomes": 1,
        "wait_p50_s": pytest.approx(20, abs=5),
        "wait_p90_s": pytest.approx(30, abs=5),
        "wait_p99_s": pytest.approx(30, abs=5),
    }

    async def counted(by: str, **filters: Any) -> dict[Any, int]:
        return {row[by]: row["approvals"] for row in await store.approvals.stats(by, **filters)}

    assert await counted("status") == {"PENDING": 1, "APPROVED": 1, "DENIED": 1, "USED": 1}
    assert await counted("outcome") == {None: 3, "unknown": 1}
    assert await counted("caller_id") == {"agent-0": 2, "agent-1": 2}
    assert await counted("tool_name", caller_id=["agent-0"]) == {"t-0": 2}
    assert await counted("approver_id") == {"carla": 1, "dora": 2, None: 1}
    assert await counted("scope", outcome="unknown") == {"OUTPUT_RELEASE": 1}
    assert await counted("mcp_server", text="T-1") == {"s": 2}
    assert await counted("org_id", status="DENIED") == {"org-0": 1}
    assert [row["approvals"] for row in await store.for_org("org-1").approvals.stats(bucket="1d")] == [2]
    (none,) = await store.approvals.stats(caller_id="nobody")
    assert (none["approvals"], none["wait_p50_s"]) == (0, None)
    clock.move(timedelta(hours=3))
    (later,) = await store.approvals.stats()
    assert (later["pending"], later["expired"]) == (0, 2)
    frame = (await store.approvals.stats(["weekday", "status"], "1d", "Europe/Berlin")).to_pandas()
    assert list(frame.columns[:4]) == ["bucket", "weekday", "status", "approvals"]
    with pytest.raises(ValueError, match="by must name"):
        await store.approvals.stats("token")
    async with AsyncSession(store.database.engine) as session:
        assert (await ApprovalManager(session).stats())[0]["approvals"] == 4


@pytest.mark.parametrize("name", ["a.jsonl", "a.csv", "a.parquet", "a.jsonl.gz"])
async def test_an_export_has_the_votes_and_no_secret(store: GatewayStore, tmp_path: Path, name: str) -> None:
    """Oldest first, for its owner alone, not over another file; neither a token nor an output that waits is in it."""
    tokens = await filled(store)
    path = tmp_path / name
    result = await store.approvals.export(path)

    assert (result.rows, result.files, result.path) == (4, 1, path)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    with pytest.raises(FileExistsError, match="overwrite=True"):
        await store.approvals.export(path)
    (await store.approvals.export(path, overwrite=True, status="DENIED"))
    await store.approvals.export(path, overwrite=True)
    if name == "a.jsonl":
        records = [json.loads(line) for line in path.read_text().splitlines()]
        votes = [record["votes"] for record in records]
        request = (await store.approvals.search(request_id="r-0"))[0]
        expected = request.model_dump(mode="json", exclude={"token", "output_payload"})
        assert {key: records[0][key] for key in expected} == expected
    elif name == "a.csv":
        rows = list(csv.DictReader(io.StringIO(path.read_bytes().decode(), newline="")))
        votes = [json.loads(row["votes"]) for row in rows]
        assert rows[1]["approver_note"].startswith('"No"')
    elif name == "a.parquet":
        import pyarrow.parquet as pq

        votes = [json.loads(each) for each in pq.read_table(path).column("votes").to_pylist()]
    else:
        return
    shown = [[(vote["approver_id"], vote["channel"]) for vote in each] for each in votes]
    assert shown == [[("carla", "slack"), ("dora", "api")], [("dora", "api")], [("carla", "api")], []]
    assert votes[1][0]["note"] == '"No", said Dora\n'
    written = path.read_bytes()
    assert SECRET.encode() not in written
    assert not [token for token in tokens if token.encode() in written]
    async with store.database.engine.connect() as connection:
        for (digest,) in await connection.execute(text("SELECT token FROM approval_requests")):
            assert digest.encode() not in written


async def test_what_another_organisation_asked_is_not_exported(store: GatewayStore, tmp_path: Path) -> None:
    await filled(store)

    assert (await store.for_org("org-1").approvals.export(tmp_path / "a.jsonl")).rows == 2
    assert '"org-0"' not in (tmp_path / "a.jsonl").read_text()
    async with AsyncSession(store.database.engine) as session:
        with pytest.raises(ValueError, match="connection of its own"):
            await ApprovalManager(session).export(tmp_path / "b.jsonl")


async def record_notices(store: GatewayStore) -> None:
    """Write what the store has sent of four approvals, to a notifier that is not loaded here."""
    ids = [request.approval_id for request in await store.approvals.search()]
    async with AsyncSession(store.database.engine) as session:
        session.add_all(
            NotificationDelivery(approval_id=each, notifier="elsewhere", event="pending", payload={}) for each in ids
        )
        await session.commit()


async def test_cursors_from_before_a_restore_are_refused(store: GatewayStore) -> None:
    await filled(store)
    await store.audit.write_many(make_event(request_id=f"e-{number}") for number in range(4))
    searches: tuple[Any, ...] = (store.audit.search, store.approvals.search, store.notifications.list)
    await record_notices(store)
    before = [(await search(limit=2)).next_cursor for search in searches]
    for search, cursor in zip(searches, before, strict=True):
        assert await search(limit=2, cursor=cursor)

    await renew_identity(store.database.engine, by="operator", environment="test", keep_approvals=True)

    for search, cursor in zip(searches, before, strict=True):
        with pytest.raises(errors.InvalidCursorError, match="db restored"):
            await search(limit=2, cursor=cursor)
        assert await search(limit=2, cursor=(await search(limit=2)).next_cursor)


async def test_a_restore_ends_what_may_have_been_decided_or_used_since(store: GatewayStore) -> None:
    """With the notices of it that were not sent, unless it is kept; what is over stays as it is."""
    await store.approvals.issue_token(
        make_request(request_id="late", expires_at=clock.utc_now() + timedelta(seconds=5))
    )
    approved, *_, pending = await filled(store)
    await record_notices(store)
    kept = await renew_identity(store.database.engine, by="ann", environment="test", keep_approvals=True)
    assert (kept["approvals_cancelled"], (await store.approvals.check_token(approved)).status) == (0, "APPROVED")

    facts = await renew_identity(store.database.engine, by="ann", environment="test")

    states = {each.request_id: (str(each.status), each.approver_note) for each in await store.approvals.search()}
    ended = ("CANCELLED", "Restored from a backup.")
    over = {"r-1": ("DENIED", '"No", said Dora\n'), "r-2": ("USED", ""), "late": ("EXPIRED", "")}
    assert (facts["approvals_cancelled"], states) == (2, {"r-0": ended, "r-3": ended, **over})
    left = {notice.approval_id for notice in await store.notifications.list(notifier="elsewhere")}
    assert left == {each.approval_id for each in await store.approvals.search() if each.request_id in over}
    call = ToolCall(server="s", tool="t-0", arguments={"text": "=1+1, \n ü"})
    with pytest.raises(errors.ApprovalNotApprovedError, match="CANCELLED"):
        await store.approvals.consume_token(approved, caller_id="agent-0", tool_call=call)
    with pytest.raises(errors.ApprovalAlreadyDecidedError, match="ann"):
        await store.approvals.approve(pending, "carla")
