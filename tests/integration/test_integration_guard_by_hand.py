"""`CallGuard` without an adapter, where a host gives fields of the event by itself."""

from __future__ import annotations

import asyncio
import traceback
from contextlib import suppress
from typing import Any

import guard_helpers
import pytest
from guard_helpers import CALLER, judge

from agent_gateway_store import CallerIdentity, GatewayStore, ToolCall, errors
from agent_gateway_store.integrations.guard import CallGuard, CallPendingError, CallRefusedError, Verdict

pytestmark = pytest.mark.integration

store = guard_helpers.store

CALL = ToolCall(server="s", tool="pay", arguments={"euro": 1})
FREE = ToolCall(server="s", tool="free", arguments={})


async def done() -> str:
    return "done"


async def test_a_request_id_that_stays_the_same_leaves_one_event_of_the_question(store: GatewayStore) -> None:
    """However often the call comes back under it, and once more when it is asked for anew."""
    guard = CallGuard(store, judge)
    for run in (1, 2):
        for _ in range(3):
            with pytest.raises(CallPendingError):
                await guard.run(CALL, CALLER, done, request_id="job-7")
        (asked,) = await store.approvals.list_requests("PENDING")
        assert len(await store.audit.list_recent()) == 2 * run - 1
        await store.approvals.approve(approval_id=asked.approval_id, approver_id="alice")
        assert await guard.run(CALL, CALLER, done, request_id="job-7") == "done"


async def test_fields_that_are_wrong_refuse_the_call_before_anybody_is_asked(store: GatewayStore) -> None:
    """Later they would use an approval up for nothing."""
    wrong: list[dict[str, Any]] = [{"session_id": 5}, {"nonsense": 1}, {"rationale": "r"}, {"sanitized_args": {}}]
    for call in (CALL, FREE):
        for fields in (*wrong, {"decision": "ALLOW"}):
            with pytest.raises(CallRefusedError, match="The gateway failed"):
                await CallGuard(store, judge).run(call, CALLER, done, **fields)
            event = (await store.audit.list_recent())[0]
            assert (event.decision, event.matched_policy_rule, event.tool_name) == (
                "DENY",
                "gateway.failure",
                call.tool,
            )
    assert (len(await store.audit.list_recent()), await store.approvals.list_requests()) == (10, [])


async def test_a_closed_store_runs_nothing_and_asks_no_policy(store: GatewayStore) -> None:
    """Nothing could say that it ran."""

    def policy(_caller: CallerIdentity, _call: ToolCall) -> Verdict:
        pytest.fail("the policy was asked")

    await store.close()
    with pytest.raises(errors.StoreNotOpenError):
        await CallGuard(store, policy).run(CALL, CALLER, done)


async def test_a_released_call_runs_nothing_once_the_store_is_closed(store: GatewayStore) -> None:
    """Between its release and its run."""
    ran = list[str]()

    async def run() -> None:
        ran.append("ran")

    released = await CallGuard(store, judge).release(FREE, CALLER)
    await store.close()
    with pytest.raises(errors.StoreNotOpenError):
        await released.run(run)
    assert not ran


async def test_a_call_that_is_cancelled_between_its_release_and_its_tool_leaves_an_event(store: GatewayStore) -> None:
    """And its approval says that it was not run."""
    guard = CallGuard(store, judge)
    with pytest.raises(CallPendingError):
        await guard.run(CALL, CALLER, done)
    (asked,) = await guard_helpers.approve(store)
    running = asyncio.create_task((await guard.release(CALL, CALLER)).run(done))
    await asyncio.sleep(0)
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running
    last = (await guard_helpers.events(store))[-1]
    assert (last.decision, last.execution_status) == ("DENY", None)
    assert "not run: it was cancelled before that" in last.deterministic_rationale
    assert (await store.approvals.get(approval_id=asked.approval_id)).outcome == "NOT_RUN"


async def test_what_stops_a_call_before_it_runs_leaves_one_event_and_no_value(store: GatewayStore) -> None:
    """A verdict that says nothing, an argument that cannot be copied, the end of the program."""

    class Uncopied:
        def __deepcopy__(self, _memo: object) -> object:
            raise ValueError("SECRET")

    def end(*_: object) -> Verdict:
        raise SystemExit

    copied = judge(CALLER, FREE).model_copy(update={"decision": "SANITIZE_AND_ALLOW"})
    with pytest.raises(CallRefusedError, match="The gateway failed"):
        await CallGuard(store, lambda *_: copied).run(FREE, CALLER, done)
    with pytest.raises(CallRefusedError, match="cannot be copied") as refused:
        await CallGuard(store, judge).run(FREE.model_copy(update={"arguments": {"x": Uncopied()}}), CALLER, done)
    with pytest.raises(SystemExit):
        await CallGuard(store, end).run(FREE, CALLER, done)
    assert "SECRET" not in "".join(traceback.format_exception(refused.value))
    assert [each.decision for each in await store.audit.list_recent()] == ["DENY"] * 3


async def test_a_question_that_is_given_up_leaves_no_event(store: GatewayStore) -> None:
    async def slow(*_: object) -> Verdict:
        await asyncio.Event().wait()
        raise AssertionError

    with pytest.raises(TimeoutError):
        await asyncio.wait_for(CallGuard(store, slow).ask(CALL, CALLER, request_id="q"), 0.05)
    assert not await store.audit.list_recent()


async def test_a_mapping_that_sanitize_uses_again_shows_each_call_its_own(store: GatewayStore) -> None:
    shared: dict[str, Any] = {}

    def sanitize(call: ToolCall) -> dict[str, Any]:
        shared.update(call.arguments)
        return shared

    guard = CallGuard(store, judge, sanitize=sanitize)
    calls = [FREE.model_copy(update={"arguments": {"x": number}}) for number in range(2)]
    await asyncio.gather(*(guard.run(call, CALLER, done) for call in calls))
    assert {event.sanitized_args["x"] for event in await store.audit.list_recent()} == {0, 1}


async def test_a_tool_that_cannot_be_awaited_is_refused_in_one_sentence(store: GatewayStore) -> None:
    """A plain function has run by then, and a generator has not begun."""
    tool: Any = lambda: 5  # noqa: E731
    with pytest.raises(TypeError, match="returned int, which cannot be awaited: make <lambda> an `async def`"):
        await CallGuard(store, judge).run(FREE, CALLER, tool)
    assert [each.execution_status for each in await guard_helpers.events(store)] == ["TOOL_ERROR"]


async def test_a_tool_that_fails_late_is_no_timeout_unless_it_was_cancelled(store: GatewayStore) -> None:
    """In a task that went on after an earlier cancellation, too."""

    async def fails() -> None:
        raise ValueError

    async def cancelled_before() -> None:
        with suppress(asyncio.CancelledError):
            await asyncio.Event().wait()
        released = await CallGuard(store, judge).release(FREE, CALLER)
        with suppress(ValueError):
            await released.run(fails, deadline=0)

    task = asyncio.create_task(cancelled_before())
    await asyncio.sleep(0)
    task.cancel()
    await task
    assert [each.execution_status for each in await guard_helpers.events(store)] == ["TOOL_ERROR"]
