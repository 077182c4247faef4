"""Approvals over HTTP: asked at one of two gateways, decided, followed and used at the other."""

from __future__ import annotations

import asyncio
from uuid import uuid4

import gateway_process
import pytest
from gateway_process import SECRET, Agent, Bench

from agent_gateway_store import TrustLevel

pytestmark = pytest.mark.system

site, logs, bench = gateway_process.site, gateway_process.logs, gateway_process.bench


async def _ask(bench: Bench, path: str, *, at: int = 0) -> dict[str, str]:
    """Put a file there, ask to delete it, and return the answer."""
    (bench.site.sandbox / path).write_text("x")
    answer = await bench.agent.call("delete_file", {"path": path}, at=at)
    assert answer.status_code == 202, answer.text
    asked: dict[str, str] = answer.json()
    return asked


async def test_approved_call_runs_once(bench: Bench) -> None:
    """Asked at one gateway, decided and used at the other; the events tell the whole story."""
    name = f"{uuid4().hex}.txt"
    asked = await _ask(bench, name)
    call = {"path": name}

    early = await bench.agent.call("delete_file", call, token=asked["token"], at=1)
    decided = await bench.approver.decide(asked["approval_id"], "approve", at=1, note="go ahead")
    done = await bench.agent.call("delete_file", call, token=asked["token"], at=1)
    again = await bench.agent.call("delete_file", call, token=asked["token"])
    events = await bench.events()
    stored = await bench.store.approvals.get(approval_id=asked["approval_id"])

    assert asked["status"] == "approval_required"
    assert (early.status_code, early.json()["error"]) == (409, "approval_not_approved")
    assert (decided.status_code, decided.json()["status"]) == (200, "APPROVED")
    assert decided.json()["approver_id"] == bench.approver.caller_id
    assert (done.status_code, done.json()["result"]) == (200, {"deleted": True, "bytes": 1})
    assert not (bench.site.sandbox / name).exists()
    assert (again.status_code, again.json()["error"]) == (409, "approval_already_used")
    assert [event.decision for event in events] == ["APPROVAL_REQUIRED", "DENY", "APPROVAL_REQUIRED", "DENY"]
    assert [event.execution_status for event in events] == [None, None, "SUCCESS", None]
    assert [event.approver_id for event in events] == [None, None, bench.approver.caller_id, None]
    assert [event.parent_request_id for event in events] == [None, *[asked["request_id"]] * 3]
    assert {event.matched_policy_rule for event in events} == {"developer.require_approval.2 files/delete_file"}
    assert (stored.status, stored.outcome, stored.approver_note) == ("USED", "SUCCESS", "go ahead")


async def test_denied_approval_releases_nothing(bench: Bench) -> None:
    """A denial is final, and `decline` means the same."""
    name = f"{uuid4().hex}.txt"
    asked = await _ask(bench, name)

    decided = await bench.approver.decide(asked["approval_id"], "decline", note="no")
    late = await bench.approver.decide(asked["approval_id"], "approve")
    done = await bench.agent.call("delete_file", {"path": name}, token=asked["token"])

    assert decided.json()["status"] == "DENIED"
    assert (late.status_code, late.json()["error"]) == (409, "approval_already_decided")
    assert bench.approver.caller_id in late.json()["detail"]
    assert (done.status_code, done.json()["error"]) == (403, "approval_denied")
    assert (bench.site.sandbox / name).exists()
    assert [event.decision for event in await bench.events()] == ["APPROVAL_REQUIRED", "DENY"]


async def test_token_is_bound_to_caller_and_arguments(bench: Bench) -> None:
    """Another file, another tool, another caller, another token: none of them runs, and the token stays good."""
    name = f"{uuid4().hex}.txt"
    asked = await _ask(bench, name)
    await bench.approver.decide(asked["approval_id"], "approve")
    (bench.site.sandbox / "other.txt").write_text("x")
    other = await bench.store.keys.issue(f"other-{uuid4().hex[:8]}", role="developer")
    stranger = Agent(bench.site, "other", other.plaintext.get_secret_value(), bench.agent.clients)

    refused = [
        await bench.agent.call("delete_file", {"path": "other.txt"}, token=asked["token"]),
        await bench.agent.call("write_file", {"path": name, "content": "x"}, token=asked["token"]),
        await stranger.call("delete_file", {"path": name}, token=asked["token"]),
        await bench.agent.call("delete_file", {"path": name}, token="no-such-token"),
    ]
    done = await bench.agent.call("delete_file", {"path": name}, token=asked["token"])

    assert [answer.status_code for answer in refused] == [403, 403, 403, 403]
    assert [answer.json()["error"] for answer in refused] == [*["approval_mismatch"] * 3, "approval_not_found"]
    assert (bench.site.sandbox / "other.txt").exists()
    assert done.status_code == 200


async def test_caller_follows_its_approval(bench: Bench) -> None:
    """The status is PENDING at once, and `wait` returns as soon as somebody decides at the other gateway."""
    asked = await _ask(bench, f"{uuid4().hex}.txt")
    token = {"X-Approval-Token": asked["token"]}

    pending = await bench.agent.send("GET", "/v1/approval", headers=token)
    waiting = asyncio.create_task(bench.agent.send("GET", "/v1/approval", headers=token, params={"wait": 15}))
    await bench.approver.decide(asked["approval_id"], "approve", at=1)
    decided = await waiting

    assert (pending.status_code, pending.json()["status"]) == (200, "PENDING")
    assert (decided.json()["status"], decided.json()["approver_id"]) == ("APPROVED", bench.approver.caller_id)
    assert "token" not in decided.json()
    unknown = {"X-Approval-Token": "no-such-token"}
    answers = [await bench.agent.send("GET", "/v1/approval", headers=unknown, params={"wait": n}) for n in (0, 31)]
    assert [answer.status_code for answer in answers] == [404, 422]


async def test_approver_sees_what_is_pending(bench: Bench) -> None:
    """The list shows the call with its arguments redacted, without token or hash."""
    answer = await bench.agent.call("write_file", {"path": "new.txt", "content": SECRET})
    asked = answer.json()

    listed = await bench.approver.send("GET", "/v1/approvals", params={"status": "PENDING", "limit": 500})
    item = next(item for item in listed.json()["items"] if item["approval_id"] == asked["approval_id"])

    assert item["tool_call"] == {
        "server": "files",
        "tool": "write_file",
        "arguments": {"path": "new.txt", "content": "[redacted]"},
    }
    assert (item["caller_id"], item["status"]) == (bench.agent.caller_id, "PENDING")
    assert SECRET not in listed.text
    assert asked["token"] not in listed.text
    assert "tool_call_hash" not in listed.text


async def test_only_approvers_decide_and_read(bench: Bench) -> None:
    """A developer's key opens none of the approver's endpoints, and an admin's only the audit log."""
    asked = await _ask(bench, f"{uuid4().hex}.txt")
    issued = await bench.store.keys.issue(f"admin-{uuid4().hex[:8]}", role="admin", trust_level=TrustLevel.ADMIN)
    admin = Agent(bench.site, "admin", issued.plaintext.get_secret_value(), bench.agent.clients)

    refused = [
        await bench.agent.decide(asked["approval_id"], "approve"),
        await bench.agent.send("GET", "/v1/approvals"),
        await bench.agent.send("GET", "/v1/audit"),
        await admin.decide(asked["approval_id"], "approve"),
    ]
    read = [await who.send("GET", "/v1/audit", params={"limit": 3}) for who in (admin, bench.approver)]

    assert [answer.status_code for answer in refused] == [403] * 4
    assert [(answer.status_code, len(answer.json()["items"])) for answer in read] == [(200, 3)] * 2
    token = {"X-Approval-Token": asked["token"]}
    assert (await bench.agent.send("GET", "/v1/approval", headers=token)).json()["status"] == "PENDING"
