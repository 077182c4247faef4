"""A call that waits for a human: it answers that it is pending, and the same call again runs once it is approved."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from fastmcp import Client, Context, FastMCP
from fastmcp.client.client import CallToolResult
from fastmcp.client.elicitation import ElicitResult
from fastmcp.server import create_proxy
from fastmcp.tools import Tool
from fastmcp_helpers import CALLER, Bench, always, judge
from mcp_types import ElicitRequest, ElicitRequestFormParams, InputRequiredResult

from agent_gateway_store import AuditEvent, CallerIdentity, GatewayStore, StoreSettings, clock
from agent_gateway_store.integrations.fastmcp import GatewayMiddleware


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

    asked, other, ran_event, again = await events(bench)
    assert {(each.decision, each.execution_status, each.approval_id) for each in (asked, other, again)} == {
        ("APPROVAL_REQUIRED", None, None)
    }
    assert str(request.approval_id) in asked.deterministic_rationale
    assert (ran_event.decision, ran_event.execution_status) == ("APPROVAL_REQUIRED", "SUCCESS")
    assert (ran_event.approval_id, ran_event.approver_id) == (request.approval_id, "alice")


@pytest.mark.parametrize(("on_pending", "end"), [("wait", "revoke"), ("return", "another role")])
async def test_a_key_that_ends_while_its_call_waits_runs_nothing(bench: Bench, on_pending: str, end: str) -> None:
    """The approval is asked for in the name of the key; whoever has it no longer gets nothing by it."""
    issued = await bench.store.keys.issue("agent", role="developer")

    async def identify(_context: Any) -> CallerIdentity:
        found = await bench.store.keys.verify(issued.plaintext)
        return found if end == "revoke" else found.model_copy(update={"role": roles[-1]})

    roles = ["developer"]
    options = {"on_pending": on_pending, "identify": identify, "approval_wait_s": 30}
    waiting = asyncio.create_task(ask(bench, **options))
    request = await bench.pending()
    if end == "revoke":
        await bench.store.keys.revoke("agent")
    roles.append("guest")
    await bench.store.approvals.approve(approval_id=request.approval_id, approver_id="alice")

    refused = await waiting

    assert (refused.is_error, bench.ran) == (True, [])
    [event] = await bench.store.audit.list_recent()
    assert (event.decision, event.execution_status, event.caller_id) == ("DENY", None, "agent")
    stands = await bench.store.approvals.get(approval_id=request.approval_id)
    assert (stands.status, stands.outcome) in [("CANCELLED", None), ("USED", "NOT_RUN")]


async def test_a_client_that_goes_away_cancels_nothing(bench: Bench) -> None:
    """The approval stands, its event says that a human was asked, and the next call uses it."""
    waiting = asyncio.create_task(ask(bench, approval_wait_s=30))
    request = await bench.pending()
    waiting.cancel()
    await asyncio.wait([waiting])
    event = await bench.first_event()
    assert (event.decision, event.request_id) == ("APPROVAL_REQUIRED", request.request_id)
    assert "went away while the call waited for a human" in event.deterministic_rationale
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


class Pages:
    """A client's user, who is sent to pages; and does there what `then` does."""

    def __init__(self, then: Callable[[], Awaitable[None]] | None = None) -> None:
        self.then, self.seen = then, []

    async def open(self, _message: str, _type: Any, params: Any, _context: Any) -> ElicitResult[None]:
        self.seen.append(params.url)
        if self.then is not None:
            await self.then()
        return ElicitResult(action="accept")


@pytest.fixture
async def paged(tmp_path: Path) -> AsyncIterator[Bench]:
    """A bench whose store knows where its console is."""
    settings = StoreSettings(console_url="https://gateway.example/console/")
    async with GatewayStore(f"sqlite:///{tmp_path}/gateway.db", redis_url="", settings=settings) as store:
        yield Bench(store)


async def ask_with_pages(served: FastMCP[Any], pages: Pages, tool: str = "delete_file", **arguments: Any) -> Any:
    async with Client(served, elicitation_handler=pages.open) as client:
        return await client.call_tool(tool, arguments or {"path": "a.txt"}, raise_on_error=False)


async def test_a_user_is_sent_to_the_page_and_the_call_runs(paged: Bench) -> None:
    """Within the one call of the client: asked, decided on the page, run; two events."""
    pages = Pages(lambda: decide(paged, "approve"))
    assert (await ask_with_pages(server(paged), pages)).data is True

    asked, ran = await events(paged)
    assert pages.seen == [f"https://gateway.example/console/approvals/{ran.approval_id}"]
    assert (asked.execution_status, ran.execution_status, paged.ran) == (None, "SUCCESS", ["a.txt"])
    assert ran.sanitized_args == {"path": "[hidden]"}


async def test_a_user_who_has_not_decided_is_not_asked_again_within_the_call(paged: Bench) -> None:
    """The call ends as pending; the next one sends to the same page."""
    pages = Pages()
    for _ in range(2):
        assert (await ask_with_pages(server(paged), pages)).structured_content["status"] == "PENDING"
    assert len(pages.seen) == 2
    assert len(set(pages.seen)) == 1
    assert (len(await events(paged)), paged.ran) == (1, [])


@pytest.mark.parametrize("case", ["no page", "no elicitation", "earlier protocol"])
async def test_without_pages_the_call_is_pending(bench: Bench, paged: Bench, case: str) -> None:
    """No CONSOLE_URL, a client without elicitation, or one of an earlier protocol: the error as ever."""
    pages = Pages()
    options: dict[str, Any] = {} if case == "no elicitation" else {"elicitation_handler": pages.open}
    if case == "earlier protocol":
        options["mode"] = "legacy"
    async with Client(server(bench if case == "no page" else paged), **options) as client:
        answer = await client.call_tool("delete_file", {"path": "a.txt"}, raise_on_error=False)
    assert (answer.is_error, answer.structured_content["status"], pages.seen) == (True, "PENDING", [])


@pytest.mark.parametrize("is_proxy", [False, True])
async def test_a_tool_that_asks_its_client_sees_only_its_own_answers(paged: Bench, is_proxy: bool) -> None:
    """The page first, then the tool's own question; with what was answered to that, a new call waits as an error."""
    answers: list[Any] = []
    behind: FastMCP[Any] = FastMCP("behind")

    @behind.tool
    async def delete_slowly(path: str, ctx: Context) -> str | InputRequiredResult:
        answers.append(ctx.input_responses)
        if ctx.input_responses is None:
            form = ElicitRequestFormParams(message="Sure?", requested_schema={"type": "object", "properties": {}})
            return InputRequiredResult(input_requests={"sure": ElicitRequest(params=form)}, request_state="1")
        return path

    served = server(paged)
    served.mount(create_proxy(behind) if is_proxy else behind)
    opened: list[str] = []

    async def answer(_message: str, _type: Any, params: Any, _context: Any) -> ElicitResult[Any]:
        if params.mode == "url":
            opened.append(params.url)
            await decide(paged, "approve")
        return ElicitResult(action="accept", content=None if params.mode == "url" else {})

    async with Client(served, elicitation_handler=answer) as client:
        ended = await client.call_tool("delete_slowly", {"path": "a.txt"}, raise_on_error=False)
    assert ended.structured_content["status"] == "PENDING"
    assert (answers, len(opened)) == ([None], 1)


@pytest.mark.parametrize(
    ("is_proxy", "name", "label", "warnings"),
    [(True, None, None, 1), (False, None, None, 1), (False, "FastMCP-office", None, 0), (False, None, "x", 0)],
)
async def test_a_server_without_a_name_is_warned_of_once(
    bench: Bench, is_proxy: bool, name: str | None, label: str | None, warnings: int, caplog: pytest.LogCaptureFixture
) -> None:
    """FastMCP makes up another one in each process, in which no approval releases the call."""
    back = FastMCP[Any]("files")
    front = create_proxy(back, name=name) if is_proxy else FastMCP[Any](name)
    (back if is_proxy else front).add_tool(Tool.from_function(lambda path: path, name="delete_file"))
    front.add_middleware(GatewayMiddleware(bench.store, judge, identify=always, approval_wait_s=0.05, server=label))
    async with Client(front) as client:
        for _ in range(2):
            await client.call_tool("delete_file", {"path": "a"}, raise_on_error=False)
    said = [each.getMessage() for each in caplog.records if each.name == "agent_gateway_store.integrations"]
    assert len(said) == warnings
    assert all("Name the server" in each and front.name in each for each in said)


async def test_a_client_that_goes_away_before_its_approved_call_runs_leaves_the_outcome(bench: Bench) -> None:
    """The approval is used up, and nothing ran: the next approver is not told that nobody knows."""
    begun = asyncio.Event()

    async def identify(_context: Any) -> CallerIdentity:
        if bench.ran:
            bench.ran.append("asked again")
            if len(bench.ran) == 3:
                begun.set()
                await asyncio.sleep(30)
        return CALLER

    assert (await ask(bench, identify=identify)).is_error
    await decide(bench, "approve")
    (request,) = await bench.store.approvals.list_requests()
    bench.ran.append("approved")
    calling = asyncio.create_task(ask(bench, identify=identify))
    await begun.wait()
    calling.cancel()
    with pytest.raises(asyncio.CancelledError):
        await calling
    async with asyncio.timeout(10):
        while (found := await bench.store.approvals.get(approval_id=request.approval_id)).outcome is None:
            await asyncio.sleep(0.01)
    assert (found.status, found.outcome) == ("USED", "NOT_RUN")
    assert bench.ran == ["approved", "asked again", "asked again"]
