"""Evidence of what a store holds, collected from its tables and checked without it."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from contract_helpers import approved
from sqlalchemy import insert

from agent_gateway_store import AuditEvent, GatewayStore, ToolCall
from agent_gateway_store.errors import AuditEventNotFoundError, LogMismatchError
from agent_gateway_store.evidence import Evidence, check
from agent_gateway_store.evidence.proof import prove
from agent_gateway_store.evidence.tree import TileHashes
from agent_gateway_store.models.approval import hash_approval, hash_tool_call, is_of_call
from agent_gateway_store.models.evidence import AuditCheckpoint, AuditLeaf
from builders import CALL, make_event, make_request
from sealed_log import KEY, SealedLog

VKEY = str(KEY.verifier)


class Sealed:
    """The events of a store, sealed by the definition of the tables.

    Attributes:
        log: The same log in memory.
    """

    def __init__(self, store: GatewayStore, log: SealedLog) -> None:
        self.store, self.log = store, log

    @classmethod
    async def of(cls, store: GatewayStore, *, size: int | None = None) -> Sealed:
        """Seal the first `size` events; None: all."""
        events = sorted(await store.audit.list_recent(), key=lambda event: event.id or 0)[:size]
        log = SealedLog(events)
        leaves = [
            {"position": at, "event_id": event.id, "salt": log.salts[at], "leaf_hash": log.leaves[at]}
            for at, event in enumerate(events)
        ]
        checkpoint = log.checkpoint()
        async with store.database.write() as connection:
            await connection.execute(insert(AuditLeaf), leaves)
            await connection.execute(insert(AuditCheckpoint), [checkpoint.model_dump()])
        return cls(store, log)

    async def read(self, names: Sequence[tuple[int, int]]) -> TileHashes:
        tiles = self.log.tiles
        return TileHashes({name: tiles[name] for name in names})


async def test_evidence_of_a_stored_event_is_checked_without_the_store(store: GatewayStore) -> None:
    await store.audit.write_many(
        [make_event(request_id=f"r-{at}", sanitized_args={"ü": [1.5, 2**70]}) for at in range(5)]
    )
    sealed = await Sealed.of(store)
    evidence = await prove(store.database, sealed.read, "r-3", org_id=None)
    found = check(evidence.to_json(), keys=[VKEY])

    assert found.ok, found
    assert (found.checked, found.size, evidence.position, evidence.event.request_id) == (1, 5, 3, "r-3")
    assert check(evidence.to_tlog_proof(), keys=[VKEY]).ok
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
    sealed = await Sealed.of(store)
    evidence = await prove(store.database, sealed.read, "r-1", org_id=None)
    # What comes after the call changes no hash.
    await store.approvals.record_outcome(token, "SUCCESS")
    later = await prove(store.database, sealed.read, "r-1", org_id=None)

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


async def prove_unsealed(store: GatewayStore, event: AuditEvent) -> Evidence:
    await store.audit.write(event)

    async def read(_names: Sequence[tuple[int, int]]) -> TileHashes:
        raise AssertionError("an event that is not sealed has no tiles")

    return await prove(store.database, read, event.request_id, org_id=None)


async def test_an_event_that_is_not_sealed_has_no_proof(store: GatewayStore) -> None:
    """Neither one without a leaf, nor one that no checkpoint covers yet."""
    evidence = await prove_unsealed(store, make_event(request_id="r-1"))

    assert check(evidence.to_json()).unsealed == 1


async def test_an_event_after_the_last_seal_has_no_proof(store: GatewayStore) -> None:
    await store.audit.write_many([make_event(request_id=f"r-{at}") for at in range(3)])
    sealed = await Sealed.of(store, size=2)

    assert (await prove(store.database, sealed.read, "r-2", org_id=None)).checkpoint is None
    assert (await prove(store.database, sealed.read, "r-1", org_id=None)).position == 1


async def test_an_event_that_is_not_there_or_is_another_organisations_is_not_found(store: GatewayStore) -> None:
    await store.audit.write(make_event(request_id="r-1", org_id="acme"))
    sealed = await Sealed.of(store)

    assert (await prove(store.database, sealed.read, "r-1", org_id="acme")).position == 0
    for request_id, org_id in (("r-1", "other"), ("r-2", "acme"), ("r-2", None)):
        with pytest.raises(AuditEventNotFoundError, match=request_id):
            await prove(store.database, sealed.read, request_id, org_id=org_id)


async def test_a_log_that_lacks_a_hash_is_not_proved_from(store: GatewayStore) -> None:
    await store.audit.write_many([make_event(request_id=f"r-{at}") for at in range(3)])
    sealed = await Sealed.of(store)
    sealed.log.leaves.pop()

    with pytest.raises(LogMismatchError, match="evidence verify"):
        await prove(store.database, sealed.read, "r-0", org_id=None)
