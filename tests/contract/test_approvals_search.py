"""Approvals found by what they are about, and the story of one."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import pytest

from agent_gateway_store import ApprovalStatus, GatewayStore, ToolCall, clock, errors
from agent_gateway_store.approval import reports
from builders import CALL, make_event, make_request


async def filled(store: GatewayStore) -> dict[str, str]:
    """Four approvals; returns their tokens by request id."""
    tokens = {}
    for number in range(4):
        call = ToolCall(server=f"server-{number % 2}", tool=f"Tool%{number}", arguments={"n": number})
        request = make_request(
            request_id=f"r-{number}", caller_id=f"agent-{number % 2}", tool_call=call, org_id=f"org-{number // 2}",
            risk_explanation="deletes \\ 100%" if number == 3 else "reads",
        )  # fmt: skip
        tokens[f"r-{number}"] = await store.approvals.issue_token(request)
    await store.approvals.approve(tokens["r-1"], "carla", "Fine by ME")
    await store.approvals.deny(tokens["r-2"], "dora")
    return tokens


async def test_every_filter_finds_what_it_means(store: GatewayStore) -> None:
    await filled(store)

    async def found(**filters: Any) -> list[str]:
        return [request.request_id[2:] for request in await store.approvals.search(**filters)]

    assert await found() == ["3", "2", "1", "0"]
    assert await found(caller_id="agent-1") == ["3", "1"]
    assert await found(tool_name="Tool%2") == await found(tool_name=["Tool%2", "x"]) == ["2"]
    assert await found(mcp_server="server-0") == ["2", "0"]
    assert await found(status="PENDING") == ["3", "0"]
    assert await found(status=[ApprovalStatus.APPROVED, "DENIED"]) == ["2", "1"]
    assert await found(approver_id="carla") == ["1"]
    assert await found(request_id="r-0") == ["0"]
    assert await found(org_id="org-1", status="DENIED") == ["2"]
    assert await found(text="tool%1") == await found(text="by me") == ["1"]
    assert await found(text="\\ 100%") == ["3"]
    assert await found(text="%") == ["3", "2", "1", "0"]
    assert await found(since="1h", until=timedelta(seconds=-60)) == ["3", "2", "1", "0"]
    assert await found(until="1h") == await found(tool_name=[]) == []
    clock.move(timedelta(hours=3))
    assert await found(status="EXPIRED") == ["3", "1", "0"]


async def test_a_stream_goes_through_every_page(store: GatewayStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """More approvals than one page holds, each once, newest first, with the filters of the search."""
    await filled(store)
    monkeypatch.setattr(reports, "_STREAMED_ROWS", 20)
    for number in range(45):
        await store.approvals.issue_token(make_request(request_id=f"s-{number}", caller_id="streamer"))

    streamed = [request.request_id async for request in store.approvals.stream(caller_id="streamer")]

    assert streamed == [f"s-{number}" for number in reversed(range(45))]
    assert [request.request_id async for request in store.approvals.stream(status="DENIED")] == ["r-2"]
    with pytest.raises(TypeError, match="no filter 'tool'"):
        _ = [request async for request in store.approvals.stream(tool="x")]  # type: ignore[call-arg]


async def test_cursors_are_of_one_search(store: GatewayStore) -> None:
    """A page leads to the next; with other filters, or in a store for another organisation, it is refused."""
    await filled(store)
    first = await store.approvals.search(limit=3)
    await store.approvals.issue_token(make_request(request_id="later"))
    rest = await store.approvals.list_requests(limit=3, cursor=first.next_cursor)
    pending = await store.approvals.list_requests("PENDING", limit=1)

    assert [request.request_id for request in [*first, *rest]] == ["r-3", "r-2", "r-1", "r-0"]
    for cursor, filters in ((first.next_cursor, {"status": "PENDING"}), (pending.next_cursor, {}), ("x", {})):
        with pytest.raises(errors.InvalidCursorError):
            await store.approvals.search(cursor=cursor, **filters)  # type: ignore[arg-type]
    with pytest.raises(errors.InvalidCursorError):
        await store.for_org("org-1").approvals.search(cursor=first.next_cursor)
    with pytest.raises(TypeError, match="no filter 'tool': use one of caller_id"):
        await store.approvals.search(tool="x")  # type: ignore[call-arg]
    with pytest.raises(ValueError, match="status must be one of PENDING"):
        await store.approvals.search(status="MAYBE")


async def test_history_tells_the_story_in_order(store: GatewayStore) -> None:
    """Asked, each vote, decided, used, what came of it; unknown until that is recorded."""
    token = await store.approvals.issue_token(make_request(required_approvals=2))
    approval_id = (await store.approvals.check_token(token)).approval_id
    await store.approvals.approve(token, "carla", "yes", channel="cli")
    await store.approvals.approve(token, "dora")
    await store.approvals.consume_token(token, caller_id="dev-agent", tool_call=CALL)
    before = await store.approvals.history(approval_id)
    assert [found.approval_id for found in await store.approvals.search(outcome="unknown")] == [approval_id]
    await store.approvals.record_outcome(token, "SUCCESS")
    assert await store.approvals.search(outcome="unknown") == []
    assert [found.approval_id for found in await store.approvals.search(outcome=["SUCCESS", "x"])] == [approval_id]
    story = [row for row in await store.approvals.history(str(approval_id)) if row["event"] != "notice"]

    told = [(row["event"], row["by"], row["status"]) for row in story]
    assert told == [
        ("asked", "dev-agent", None),
        ("vote", "carla", "APPROVED"),
        ("vote", "dora", "APPROVED"),
        ("decided", "dora", "APPROVED"),
        ("used", "dev-agent", "USED"),
        ("outcome", None, None),
    ]
    assert (story[1]["note"], story[1]["channel"], story[-1]["note"]) == ("yes", "cli", "SUCCESS")
    assert "unknown" in [row["note"] for row in before]


async def test_history_shows_the_calls_of_an_approval(store: GatewayStore) -> None:
    """The one that asked and those that it released, of its own organisation; in the order of time."""
    request = make_request(request_id="r-asked", org_id="acme")
    pending = await store.approvals.acquire(request)
    asked = await store.approvals.get(approval_id=pending.approval_id)
    for request_id, later_s, fields in (
        ("r-other", 2, {}),
        ("r-asked", 0, {"decision": "APPROVAL_REQUIRED", "execution_status": None}),
        ("r-run", 1, {"approval_id": pending.approval_id, "execution_status": "SUCCESS"}),
        ("r-foreign", 1, {"approval_id": pending.approval_id, "org_id": "globex"}),
    ):
        at = asked.created_at + timedelta(seconds=later_s)
        await store.audit.write(make_event(**{"request_id": request_id, "org_id": "acme", "timestamp": at, **fields}))

    story = await store.for_org("acme").approvals.history(pending.approval_id)
    assert [(row["event"], row["status"], row["note"]) for row in story if row["event"] != "notice"] == [
        ("asked", None, asked.risk_explanation),
        ("call", "APPROVAL_REQUIRED", "request r-asked"),
        ("call", "SUCCESS", "request r-run"),
    ]
    released = await store.for_org("acme").audit.search(approval_id=pending.approval_id)
    assert [event.request_id for event in released] == ["r-run"]


async def test_history_of_what_expired_was_cancelled_or_is_not_there(store: GatewayStore) -> None:
    pending, cancelled = [await store.approvals.issue_token(make_request()) for _ in range(2)]
    ids = [(await store.approvals.check_token(token)).approval_id for token in (pending, cancelled)]
    await store.approvals.cancel(cancelled, "dev-agent")
    clock.move(timedelta(hours=3))

    stories = [
        [row["status"] for row in await store.approvals.history(each) if row["event"] != "notice"] for each in ids
    ]
    assert stories == [[None, "EXPIRED"], [None, "CANCELLED", "CANCELLED"]]
    for view, wanted in ((store.for_org("acme"), ids[0]), (store, "none")):
        with pytest.raises(errors.ApprovalNotFoundError):
            await view.approvals.history(wanted)
