"""A call that waits for a human: it answers that it is pending, and the same call again runs once it is approved."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from fastmcp import Client, FastMCP
from fastmcp.client.client import CallToolResult
from fastmcp_helpers import Bench

from agent_gateway_store import AuditEvent, GatewayStore, clock

pytestmark = pytest.mark.integration


@pytest.fixture
async def bench(tmp_path: Path) -> AsyncIterator[Bench]:
    """A bench on an open store."""
    async with GatewayStore(f"sqlite:///{tmp_path}/gateway.db", redis_url="") as store:
        yield Bench(store)


def server(bench: Bench, **options: Any) -> FastMCP[Any]:
    return bench.server(**({"on_pending": "return", "approval_wait_s": 0.05} | options))


async def ask(bench: Bench, path: str = "a.txt", **options: Any) -> CallToolResult:
    """Call from a client of its own, on a server of its own."""
    async with Client(server(bench, **options)) as client:
        return await client.call_tool("delete_file", {"path": path}, raise_on_error=False)


async def decide(bench: Bench, verb: str) -> None:
    request = await bench.pending()
    await getattr(bench.store.approvals, verb)(approval_id=request.approval_id, approver_id="alice", note="seen")


async def events(bench: Bench) -> list[AuditEvent]:
    """Oldest first."""
    return list(reversed(await bench.store.audit.list_recent()))


async def test_a_pending_call_says_so_and_runs_once_it_is_approved(bench: Bench) -> None:
    """Hours later, over another connection and in another server; then it must be asked for again."""
    first = await ask(bench)
    request = await bench.pending()
    assert (first.is_error, bench.ran) == (True, [])
    assert first.structured_content == {
        "approval_id": str(request.approval_id),
        "status": "PENDING",
        "expires_at": request.model_dump(mode="json")["expires_at"],
        "next": "call again with the same arguments",
    }
    text = first.content[0].text  # type: ignore[union-attr]
    assert "call again with the same arguments before" in text
    assert str(request.approval_id) in text
    assert (await ask(bench)).structured_content == first.structured_content
    clock.move(timedelta(hours=9))
    await decide(bench, "approve")

    assert (await ask(bench, "b.txt")).is_error
    ran = await ask(bench)
    assert (ran.data, bench.ran) == (True, ["a.txt"])
    assert (await ask(bench)).structured_content["approval_id"] != str(request.approval_id)  # type: ignore[index]
    assert bench.ran == ["a.txt"]
    assert (await bench.store.approvals.get(approval_id=request.approval_id)).outcome == "SUCCESS"


async def test_one_event_for_the_question_one_for_the_run(bench: Bench) -> None:
    """Asking again leaves none; the run names its approval and who gave it."""
    for _ in range(3):
        await ask(bench)
    request = await bench.pending()
    await decide(bench, "approve")
    await ask(bench)

    asked, ran = await events(bench)
    assert (asked.decision, asked.execution_status, asked.approval_id) == ("APPROVAL_REQUIRED", None, None)
    assert str(request.approval_id) in asked.deterministic_rationale
    assert (ran.decision, ran.execution_status) == ("APPROVAL_REQUIRED", "SUCCESS")
    assert (ran.approval_id, ran.approver_id) == (request.approval_id, "alice")


async def test_a_denied_call_is_refused_each_time(bench: Bench) -> None:
    """With who denied it and why, and an event for each refusal."""
    await ask(bench)
    await decide(bench, "deny")
    for _ in range(2):
        refused = await ask(bench)
        assert refused.is_error
        assert "DENIED by alice" in refused.content[0].text  # type: ignore[union-attr]
    assert [(each.decision, each.approver_id) for each in await events(bench)][1:] == [("DENY", "alice")] * 2
    assert not await bench.store.approvals.list_requests("PENDING")


async def test_a_client_that_waits_gets_the_result(bench: Bench) -> None:
    """A decision within `approval_wait_s` needs no second call."""
    waiting = asyncio.create_task(ask(bench, approval_wait_s=30))
    await decide(bench, "approve")
    assert (await waiting).data is True


async def test_a_client_that_goes_away_cancels_nothing(bench: Bench) -> None:
    """The approval stands, and the next call uses it."""
    waiting = asyncio.create_task(ask(bench, approval_wait_s=30))
    request = await bench.pending()
    waiting.cancel()
    await asyncio.wait([waiting])
    assert (await bench.pending()).approval_id == request.approval_id
    await decide(bench, "approve")
    assert (await ask(bench)).data is True


async def test_a_tool_that_was_replaced_is_not_run(bench: Bench) -> None:
    """What was approved is another tool by now: the approval is spent, and nothing ran."""
    changing = server(bench, approval_wait_s=30)
    async with Client(changing) as client:
        waiting = asyncio.create_task(client.call_tool("delete_file", {"path": "a.txt"}, raise_on_error=False))
        request = await bench.pending()

        @changing.tool
        async def delete_file(path: str, password: str = "", everything: bool = True) -> bool:
            bench.ran.append("everything")
            return True

        await decide(bench, "approve")
        refused = await waiting
    assert refused.is_error
    assert "changed while the call waited" in refused.content[0].text  # type: ignore[union-attr]
    assert bench.ran == []
    stored = await bench.store.approvals.get(approval_id=request.approval_id)
    assert (stored.status, stored.outcome) == ("USED", "NOT_RUN")
    (event,) = await events(bench)
    assert (event.decision, event.approval_id) == ("DENY", None)


def test_another_word_is_refused(bench: Bench) -> None:
    """When the middleware is built."""
    with pytest.raises(ValueError, match='"return" or "wait"'):
        bench.server(on_pending="later")
