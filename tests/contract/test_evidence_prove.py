"""Evidence of what a store holds, collected from its tables and checked without it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest
from contract_helpers import POSTGRES, approved

from agent_gateway_store import AuditEvent, GatewayStore, StoreSettings, ToolCall
from agent_gateway_store.errors import AuditEventNotFoundError, LogMismatchError
from agent_gateway_store.evidence import Evidence, check
from agent_gateway_store.models.approval import hash_approval, hash_tool_call, is_of_call
from agent_gateway_store.storage.asyncpg_pool import RawConnection
from builders import CALL, make_event, make_request
from sealed_log import KEY
from tampering import tamper

pytestmark = POSTGRES
VKEY = str(KEY.verifier)
SETTINGS = StoreSettings(audit_seal_seconds=0, audit_signing_key=KEY.to_text())  # type: ignore[arg-type]


@pytest.fixture
async def store(database_url: str) -> AsyncIterator[GatewayStore]:
    """An open store that signs its checkpoints, and seals when it is told to."""
    async with GatewayStore(database_url, redis_url="", settings=SETTINGS) as opened:
        yield opened


async def prove_unsealed(store: GatewayStore, event: AuditEvent) -> Evidence:
    await store.audit.write(event)
    return await store.evidence.prove(event.request_id)


async def test_evidence_of_a_stored_event_is_checked_without_the_store(store: GatewayStore) -> None:
    await store.audit.write_many(
        [make_event(request_id=f"r-{at}", sanitized_args={"ü": [1.5, 2**70]}) for at in range(300)]
    )
    await store.evidence.seal()
    evidence = await store.evidence.prove("r-3")
    found = check(evidence.to_json(), keys=[VKEY])

    assert found.ok, found
    assert (found.checked, found.size, evidence.position, evidence.event.request_id) == (1, 300, 3, "r-3")
    assert check(evidence.to_tlog_proof(), keys=[VKEY]).ok
    assert not check(evidence.to_json().replace('"read_file"', '"send_mail"'), keys=[VKEY]).ok
    assert evidence.approval is None


@pytest.mark.parametrize("is_named", [True, False])
async def test_the_approval_and_its_votes_come_with_it(store: GatewayStore, is_named: bool) -> None:
    """The one that the event names, else the one that was asked for under its request id."""
    token = await approved(store, request_id="r-1", required_approvals=1)
    await store.approvals.consume_token(token, caller_id="dev-agent", tool_call=CALL)
    request = (await store.approvals.search(request_id="r-1"))[0]
    [vote] = (await prove_unsealed(store, make_event(request_id="other", approval_id=request.approval_id))).votes
    event = make_event(
        request_id="r-1",
        tool_name=CALL.tool,
        approval_id=request.approval_id if is_named else None,
        extra={"approval_sha256": hash_approval(request, [vote])},
    )
    await store.audit.write(event)
    await store.evidence.seal()
    evidence = await store.evidence.prove("r-1")
    # What comes after the call changes no hash.
    await store.approvals.record_outcome(token, "SUCCESS")
    later = await store.evidence.prove("r-1")

    assert [each.approver_id for each in evidence.votes] == ["approver-1"]
    assert later.approval is not None
    assert later.approval.outcome == "SUCCESS"
    for each in (evidence, later):
        found = check(each.to_json(), keys=[VKEY])
        assert found.ok, found
        assert any("are those that the event names" in remark for remark in found.remarks)
        assert token not in each.to_json()


@pytest.mark.parametrize("stranger", ["caller", "server", "tool", "arguments", "arguments of the event"])
async def test_the_approval_of_another_call_under_the_same_request_id_is_left_out(
    store: GatewayStore, stranger: str
) -> None:
    """Whoever knows a request id can ask under it, also for a harmless call of the same tool."""
    harmless = ToolCall(server="mail", tool="read", arguments={"box": "in"})
    bound = harmless if stranger == "arguments" else harmless.model_copy(update={"arguments": {"box": "raw"}})
    await store.approvals.issue_token(make_request(request_id="r-1", tool_call=harmless), call=bound)
    event = {"mcp_server": "mail", "tool_name": "read", "raw_args_hash": AuditEvent.hash_args(bound.arguments)}
    event |= {
        "caller": {"caller_id": "other"},
        "server": {"mcp_server": "db"},
        "tool": {"tool_name": "drop"},
        "arguments": {"raw_args_hash": AuditEvent.hash_args({"box": "out"})},
        "arguments of the event": {
            "raw_args_hash": AuditEvent.hash_args({"box": "out"}),
            "sanitized_args": {"box": "out"},
        },
    }[stranger]

    assert (await prove_unsealed(store, make_event(request_id="r-1", **event))).approval is None


async def test_the_approval_of_this_call_is_found_below_others_of_its_request_id(store: GatewayStore) -> None:
    """The one with the same arguments, also where a harmless one was asked for after it."""
    for path in ("run", "harmless"):
        await store.approvals.issue_token(
            make_request(request_id="r-1", tool_call=CALL.model_copy(update={"arguments": {"path": path}}))
        )
    evidence = await prove_unsealed(
        store,
        make_event(request_id="r-1", tool_name=CALL.tool, raw_args_hash=AuditEvent.hash_args({"path": "run"})),
    )

    assert evidence.approval is not None
    assert evidence.approval.tool_call.arguments == {"path": "run"}


async def test_sanitised_arguments_keep_no_approval_out(store: GatewayStore) -> None:
    """Hashes that cannot be compared say nothing against it."""
    shown = CALL.model_copy(update={"arguments": {"path": "***"}})
    await store.approvals.issue_token(make_request(request_id="r-1", tool_call=shown), call=CALL)
    raw = AuditEvent.hash_args(CALL.arguments)
    event = make_event(request_id="r-1", tool_name=CALL.tool, raw_args_hash=raw, sanitized_args={"path": "***"})

    assert (await prove_unsealed(store, event)).approval is not None


@pytest.mark.parametrize("rekeyed", ["event", "approval"])
async def test_hashes_under_two_keys_keep_no_approval_out(store: GatewayStore, rekeyed: str) -> None:
    """A host that hashes arguments under no key or an old one; equal arguments, but not those of another call."""
    key = "k" * 40 if rekeyed == "event" else None
    await store.approvals.issue_token(make_request(request_id="r-1", tool_call=CALL))
    [request] = await store.approvals.search(request_id="r-1")
    if rekeyed == "approval":
        request = request.model_copy(update={"tool_call_hash": hash_tool_call(CALL, key="k" * 40)})

    def fits(path: str) -> bool | None:
        args = CALL.arguments | {"path": path}
        raw = AuditEvent.hash_args(args, key=key)
        event = make_event(request_id="r-1", tool_name=CALL.tool, raw_args_hash=raw, sanitized_args=args)
        return is_of_call(request, event)

    assert fits(CALL.arguments["path"]) is None
    assert fits("other") is False


async def test_an_event_that_no_checkpoint_covers_has_no_proof(store: GatewayStore) -> None:
    """Before the first seal, and after the last one."""
    assert check((await prove_unsealed(store, make_event(request_id="r-1"))).to_json()).unsealed == 1
    await store.evidence.seal()
    assert (await prove_unsealed(store, make_event(request_id="r-2"))).checkpoint is None
    assert (await store.evidence.prove("r-1")).position == 0


async def test_a_proof_reads_all_its_hashes_at_once(store: GatewayStore) -> None:
    """SQLite has no round trips. The event, its leaf, the approval, and the hashes of however many tiles."""
    await store.audit.write_many([make_event(request_id=f"r-{at}") for at in range(300)])
    await store.evidence.seal()
    asked: list[str] = []
    async with store.database.connection("read") as connection:
        assert isinstance(connection, RawConnection)
        # It is the one that is used next, too.
        connection.driver.add_query_logger(lambda record: asked.append(record.query))
    evidence = await store.evidence.prove("r-299")
    # The driver tells of a statement at the next turn of the loop.
    await asyncio.sleep(0)

    assert evidence.position == 299
    assert len(asked) == 4, asked


async def test_an_event_that_is_not_there_or_is_another_organisations_is_not_found(store: GatewayStore) -> None:
    await store.audit.write(make_event(request_id="r-1", org_id="acme"))
    acme = store.for_org("acme")

    for view, request_id in ((store.for_org("other"), "r-1"), (acme, "r-2"), (store, "r-2")):
        with pytest.raises(AuditEventNotFoundError, match=request_id):
            await view.evidence.prove(request_id)


async def test_a_log_that_lacks_a_hash_is_not_proved_from(store: GatewayStore) -> None:
    await store.audit.write_many([make_event(request_id=f"r-{at}") for at in range(3)])
    await store.evidence.seal()
    await tamper(store.database.engine, "DELETE FROM audit_leaves WHERE position = 2")

    with pytest.raises(LogMismatchError, match="evidence verify"):
        await store.evidence.prove("r-0")
