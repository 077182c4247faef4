"""Decide about an approval and use it: the database picks the winner, and the loser learns who won."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, NamedTuple, cast
from uuid import UUID

from agent_gateway_store._text import is_blank
from agent_gateway_store.approval.queries import ApprovalRef, StoredApproval, asked_of, get, read
from agent_gateway_store.approval.statements import (
    APPROVE,
    APPROVE_FINAL,
    CANCEL,
    CONSUME,
    COUNT_APPROVALS,
    DENY,
    EXPIRE,
    LOCK_PENDING,
    RELEASE,
    SET_OUTCOME,
    VOTE,
)
from agent_gateway_store.encoding.canonical import hash_json
from agent_gateway_store.encoding.sanitize import Scrubber, storable_key
from agent_gateway_store.errors import (
    ApprovalAlreadyDecidedError,
    ApprovalAlreadyUsedError,
    ApprovalAlreadyVotedError,
    ApprovalError,
    ApprovalExpiredError,
    ApprovalMismatchError,
    ApprovalNotApprovedError,
    ApprovalNotFoundError,
    SelfApprovalError,
)
from agent_gateway_store.hooks.dispatch import Vetoes
from agent_gateway_store.models.approval import ApprovalRequest, ApprovalScope, VoteDecision
from agent_gateway_store.models.values import ApprovalStatus, PendingApproval
from agent_gateway_store.storage.asyncpg_pool import RawConnection
from agent_gateway_store.storage.database import AnyConnection, Transactions
from agent_gateway_store.storage.errors import retry_conflicts
from agent_gateway_store.storage.statements import Statement


class VoteInput:
    """What one approver decides, scrubbed.

    Raises:
        TypeError: `approver_id` is blank, or no text.
    """

    def __init__(self, approver_id: str, note: str | None, channel: str, decision: VoteDecision) -> None:
        if not isinstance(approver_id, str) or is_blank(approver_id):
            raise TypeError("Say who decides: approver_id is required, and must not be blank.")
        self.approver_id = storable_key(approver_id)
        self.note = Scrubber().text("note", note or "")
        self.channel = storable_key(channel)
        self.decision = decision

    @property
    def values(self) -> dict[str, Any]:
        """The parameters of statements that it gives."""
        return {
            "p_approver_id": self.approver_id,
            "p_note": self.note,
            "p_channel": self.channel,
            "p_decision": self.decision,
        }


async def require_no_veto(vetoes: Vetoes | None, transactions: Transactions, ref: ApprovalRef, vote: VoteInput) -> None:
    """Return if no plugin objects to `vote`. Where no plugin wants to be asked, this reads nothing.

    Plugins are asked while no transaction is open. What does not exist, or is not pending, is left to the decision
    itself, which raises.

    Raises:
        DecisionVetoedError: A plugin objects or fails.
    """
    if vetoes is None or not vetoes.is_wanted:
        return
    try:
        found = await get(transactions, ref)
    except ApprovalNotFoundError:
        return
    if found.request.status is not ApprovalStatus.PENDING:
        return
    await vetoes.require_none(
        PendingApproval(**asked_of(found.request)),
        decision=cast("Literal['APPROVED', 'DENIED']", vote.decision.value),
        approver_id=vote.approver_id,
        note=vote.note,
        channel=vote.channel,
    )


async def decide(
    connection: AnyConnection, ref: ApprovalRef, vote: VoteInput, *, allow_self: bool, use_s: float
) -> StoredApproval:
    """Store a vote, decide where it is the last one needed, and return the approval as it then stands; does not commit.

    Args:
        allow_self: Whether the caller of the tool call may approve.
        use_s: For how many seconds an approval that was asked for by `acquire` without a deadline can be used.

    Raises:
        ApprovalError: As `ApprovalManager.approve` says; what was written must be rolled back.
    """
    if vote.decision is not VoteDecision.APPROVED:
        return await _close(connection, ref, vote)
    values = {**ref.values, **vote.values, "p_allow_self": allow_self, "p_ttl_s": use_s}
    # `Changes.decide` has tried that on PostgreSQL.
    row = None if isinstance(connection, RawConnection) else await APPROVE[ref.by].first(connection, values)
    if row is not None:
        return await _store_vote(connection, row, vote)
    # More than one vote is needed, or it is refused. The lock makes voters wait for each other, so that each counts all
    # the votes before its own.
    row = await LOCK_PENDING[ref.by].first(connection, values)
    if row is None:
        raise await _why_not_decided(connection, ref, vote, is_self_refused=not allow_self)
    locked = await _store_vote(connection, row, vote)
    counted = await COUNT_APPROVALS.one(connection, {"p_approval_id": row["approval_id"]})
    if counted["approvals"] < row["required_approvals"]:
        return locked
    row = await APPROVE_FINAL[ref.by].first(connection, values)
    if row is None:
        raise await _why_not_decided(connection, ref, vote, is_self_refused=not allow_self)
    return StoredApproval.from_row(row)


async def _close(connection: AnyConnection, ref: ApprovalRef, vote: VoteInput) -> StoredApproval:
    statement = (CANCEL if vote.decision is VoteDecision.CANCELLED else DENY)[ref.by]
    row = await statement.first(connection, {**ref.values, **vote.values})
    if row is None:
        raise await _why_not_decided(connection, ref, vote, is_self_refused=False)
    return await _store_vote(connection, row, vote)


async def _store_vote(connection: AnyConnection, row: Mapping[str, Any], vote: VoteInput) -> StoredApproval:
    # Of an approval that is altered nothing is stored; closed it can be all the same.
    is_approval = vote.decision is VoteDecision.APPROVED
    stored = StoredApproval.from_row(row) if is_approval else StoredApproval.repaired(row)
    values = vote.values | {"p_approval_id": stored.request.approval_id, "p_org_id": stored.request.org_id}
    # Somebody who has voted may still cancel; the first vote stays on record.
    is_first = await VOTE.first(connection, values) is not None
    if not is_first and vote.decision is not VoteDecision.CANCELLED:
        raise ApprovalAlreadyVotedError(
            f"{vote.approver_id} has already voted on this approval: others must decide.",
            approval_id=stored.request.approval_id,
            status=str(ApprovalStatus.PENDING),
        )
    return stored


async def expire(connection: AnyConnection, *, org_id: str | None, batch_size: int) -> list[StoredApproval]:
    """Write EXPIRED to one batch of what is overdue; does not commit. Rows that another sweep holds are left to it."""
    rows = await EXPIRE.rows(connection, {"p_org_id": org_id, "p_batch_size": batch_size})
    return list(map(StoredApproval.repaired, rows))


class Permission(NamedTuple):
    """What an approval must be for; without `tool_call_hash` the output of whichever call it was asked for."""

    caller_id: str
    scope: ApprovalScope
    tool_call_hash: str | None = None


@retry_conflicts
async def use(
    transactions: Transactions, ref: ApprovalRef, permission: Permission, *, hash_key: str | None
) -> StoredApproval:
    """Move an approval to USED for this caller, scope and call, or output, and commit.

    Raises:
        ApprovalError: As `ApprovalManager.consume_token` and `release_output` say.
    """
    values = {**ref.values, **{f"p_{field}": value for field, value in permission._asdict().items()}}
    if permission.tool_call_hash is not None:
        async with transactions.connection("autocommit") as connection:
            return await _use(connection, CONSUME, ref, values, permission)
    # The output is checked after the use, which is rolled back where it does not match its hash.
    async with transactions.connection("transaction") as connection:
        used = await _use(connection, RELEASE, ref, values, permission)
        _check_output(used.request, hash_key)
        return used


async def _use(
    connection: AnyConnection, statement: Statement, ref: ApprovalRef, values: dict[str, Any], permission: Permission
) -> StoredApproval:
    for _ in range(2):
        row = await statement.first(connection, values)
        if row is not None:
            return StoredApproval.from_row(row)
        request = (await read(connection, ref)).request
        # On PostgreSQL it may have been approved between the two statements: then a second try decides.
        if request.status is not ApprovalStatus.APPROVED:
            break
    raise _why_not_used(request, permission)


def _check_output(request: ApprovalRequest, hash_key: str | None) -> None:
    if request.output_payload is None:
        problem = "holds no output"
    elif hash_json(request.output_payload, key=hash_key) != request.output_hash:
        problem = "holds an output that does not match its hash"
    else:
        return
    raise ApprovalMismatchError(
        f"The approval {problem}, so nothing was released: ask for an approval of the output.",
        approval_id=request.approval_id,
    )


@retry_conflicts
async def set_outcome(transactions: Transactions, ref: ApprovalRef, outcome: str) -> StoredApproval:
    """Store the outcome of a used approval, once, and commit. The very same outcome again changes nothing.

    Raises:
        ApprovalError: As `ApprovalManager.record_outcome` says.
    """
    text = Scrubber().text("outcome", outcome)
    async with transactions.connection("autocommit") as connection:
        row = await SET_OUTCOME[ref.by].first(connection, {**ref.values, "p_outcome": text})
        if row is not None:
            return StoredApproval.repaired(row)
        found = await read(connection, ref)
    if found.request.status is not ApprovalStatus.USED:
        why = f"Only a used approval has an outcome: it stands at {_who(found.request)}."
        raise _standing(ApprovalNotApprovedError, why, found.request)
    if found.request.outcome != text:
        why = "The approval has already been used and its outcome was recorded."
        raise _standing(ApprovalAlreadyUsedError, why, found.request)
    return found


async def _why_not_decided(
    connection: AnyConnection, ref: ApprovalRef, vote: VoteInput, *, is_self_refused: bool
) -> ApprovalError:
    request = (await read(connection, ref)).request
    if request.status is ApprovalStatus.EXPIRED:
        return _expired(request)
    if request.status is not ApprovalStatus.PENDING:
        return _standing(ApprovalAlreadyDecidedError, f"The approval was already decided: {_who(request)}.", request)
    if is_self_refused and request.caller_id == vote.approver_id:
        return SelfApprovalError(
            f"{vote.approver_id} asked for this call and may not approve it: let somebody else decide.",
            approval_id=request.approval_id,
        )
    return ApprovalError("The approval changed while it was being decided: try again.", approval_id=request.approval_id)


def _why_not_used(request: ApprovalRequest, permission: Permission) -> ApprovalError:
    if request.caller_id != permission.caller_id:
        return _mismatch("another caller", request.approval_id)
    if permission.tool_call_hash not in (None, request.tool_call_hash):
        return _mismatch("another tool call", request.approval_id)
    if request.scope is not permission.scope:
        return _mismatch(f"the scope {request.scope}, not for {permission.scope}", request.approval_id)
    if request.status is ApprovalStatus.USED:
        when = f" at {request.used_at:%Y-%m-%d %H:%M:%S} UTC" if request.used_at else ""
        text = f"The approval has already been used{when}: ask for a new one."
        return _standing(ApprovalAlreadyUsedError, text, request)
    if request.status is ApprovalStatus.EXPIRED:
        return _expired(request)
    text = f"The approval is not approved: it stands at {_who(request)}."
    return _standing(ApprovalNotApprovedError, text, request)


def _mismatch(what: str, approval_id: UUID) -> ApprovalError:
    return ApprovalMismatchError(
        f"The approval is for {what}: ask for an approval of this one.", approval_id=approval_id
    )


def _expired(request: ApprovalRequest) -> ApprovalError:
    deadline = request.use_before if request.approver_id and request.use_before else request.expires_at
    when = f" at {deadline:%Y-%m-%d %H:%M:%S} UTC" if deadline else ""
    return _standing(ApprovalExpiredError, f"The approval has expired{when}: ask for a new one.", request)


def _standing(kind: type[ApprovalError], text: str, request: ApprovalRequest) -> ApprovalError:
    return kind(
        text,
        approval_id=request.approval_id,
        status=str(request.status),
        approver_id=request.approver_id,
        decided_at=request.decision_at,
    )  # type: ignore[call-arg]  # every kind handed in here takes the standing decision


def _who(request: ApprovalRequest) -> str:
    by = f" by {request.approver_id}" if request.approver_id else ""
    at = f" at {request.decision_at:%Y-%m-%d %H:%M:%S} UTC" if request.decision_at else ""
    return f"{request.status}{by}{at}"
