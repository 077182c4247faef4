"""`CallGuard` without an adapter, where a host gives fields of the event by itself."""

from __future__ import annotations

from typing import Any

import guard_helpers
import pytest
from guard_helpers import CALLER, judge

from agent_gateway_store import GatewayStore, ToolCall
from agent_gateway_store.integrations.guard import CallGuard, CallPendingError, CallRefusedError

pytestmark = pytest.mark.integration

store = guard_helpers.store

CALL = ToolCall(server="s", tool="pay", arguments={"euro": 1})


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


@pytest.mark.parametrize("tool", ["pay", "free"])
@pytest.mark.parametrize(
    "fields",
    [{"session_id": 5}, {"nonsense": 1}, {"rationale": "r"}, {"decision": "ALLOW"}, {"approval_id": "x"}],
    ids=str,
)
async def test_fields_that_are_wrong_refuse_the_call_before_anybody_is_asked(
    store: GatewayStore, tool: str, fields: dict[str, Any]
) -> None:
    """Later they would use an approval up for nothing."""
    call = CALL.model_copy(update={"tool": tool})
    with pytest.raises(CallRefusedError, match="The gateway failed"):
        await CallGuard(store, judge).run(call, CALLER, done, **fields)
    (event,) = await store.audit.list_recent()
    assert (event.decision, event.matched_policy_rule, event.tool_name) == ("DENY", "gateway.failure", tool)
    assert not await store.approvals.list_requests()
