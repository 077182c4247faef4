"""Decide: one voice each, the database picks the winner."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sqlalchemy import ColumnElement, func, select
from sqlalchemy.dialects import postgresql, sqlite

from agent_gateway_store.approval import refusals
from agent_gateway_store.approval.rows import request_of, standing
from agent_gateway_store.approval.transitions import move, requests, votes
from agent_gateway_store.models.approval import VoteDecision
from agent_gateway_store.models.scrub import Scrubber, storable_key
from agent_gateway_store.models.values import ApprovalStatus
from agent_gateway_store.storage.database import Executor, db_now, dialect_of, first_row

__all__ = ["Ballot", "approve", "end"]

_PENDING, _APPROVED = ApprovalStatus.PENDING, ApprovalStatus.APPROVED


class Ballot:
    """What one approver says, scrubbed.

    Raises:
        TypeError: `approver_id` is empty.
    """

    def __init__(self, approver_id: str, note: str, channel: str, decision: VoteDecision) -> None:
        if not approver_id:
            raise TypeError("Say who decides: approver_id is required.")
        self.approver_id = storable_key(approver_id)
        self.note = Scrubber().text("note", note)
        self.channel = storable_key(channel)
        self.says = decision

    def decision(self) -> dict[str, Any]:
        """The columns by which this ballot decides."""
        return {"approver_id": self.approver_id, "approver_note": self.note, "decision_at": db_now()}


async def approve(
    executor: Executor, key: ColumnElement[bool], ballot: Ballot, *, allow_self: bool
) -> Mapping[str, Any]:
    """Cast a vote to approve, and approve where it is the last one needed; does not commit.

    Returns:
        The row as it then stands: APPROVED, or PENDING while voices are missing.

    Raises:
        ApprovalError: As `ApprovalManager.approve` says; what was written must be rolled back.
    """
    others = () if allow_self else (requests.c.caller_id != ballot.approver_id,)
    single = move((_PENDING,), _APPROVED, key, requests.c.required_approvals <= 1, *others, **ballot.decision())
    row = await first_row(executor, single)
    if row is not None:
        await _vote(executor, row, ballot)
        return row
    # Taking the row first makes voters wait for each other; each then counts what is really there.
    row = await first_row(executor, move((_PENDING,), _PENDING, key, *others))
    if row is None:
        raise await _refused(executor, key, ballot, allow_self=allow_self)
    await _vote(executor, row, ballot)
    if await _approvals(executor, row) < row["required_approvals"]:
        return row
    decided = await first_row(executor, move((_PENDING,), _APPROVED, key, **ballot.decision()))
    if decided is None:
        raise await _refused(executor, key, ballot, allow_self=allow_self)
    return decided


async def end(
    executor: Executor,
    key: ColumnElement[bool],
    ballot: Ballot,
    sources: tuple[ApprovalStatus, ...],
    target: ApprovalStatus,
) -> Mapping[str, Any]:
    """Move an approval from one of `sources` to `target` by this one voice; does not commit. Returns the row.

    Raises:
        ApprovalError: As `ApprovalManager.deny` says; what was written must be rolled back.
    """
    row = await first_row(executor, move(sources, target, key, **ballot.decision()))
    if row is None:
        raise await _refused(executor, key, ballot, allow_self=True)
    await _vote(executor, row, ballot)
    return row


async def _approvals(executor: Executor, row: Mapping[str, Any]) -> int:
    counted = select(func.count()).where(
        votes.c.approval_id == row["approval_id"], votes.c.decision == VoteDecision.APPROVED
    )
    count: int = (await executor.execute(counted)).scalar_one()
    return count


async def _vote(executor: Executor, row: Mapping[str, Any], ballot: Ballot) -> None:
    insert = (postgresql.insert if dialect_of(executor) == "postgresql" else sqlite.insert)(votes)
    values = {
        "approval_id": row["approval_id"],
        "org_id": row["org_id"],
        "approver_id": ballot.approver_id,
        "decision": ballot.says,
        "note": ballot.note,
        "channel": ballot.channel,
        "voted_at": db_now(),
    }
    statement = insert.values(values).on_conflict_do_nothing().returning(votes.c.id)
    is_first = (await executor.execute(statement)).first() is not None
    if not is_first and ballot.says is not VoteDecision.CANCELLED:
        raise refusals.already_voted(request_of(row).approval_id, ballot.approver_id)


async def _refused(executor: Executor, key: ColumnElement[bool], ballot: Ballot, *, allow_self: bool) -> Exception:
    return refusals.cannot_decide(
        await standing(executor, key), approver_id=ballot.approver_id, self_refused=not allow_self
    )
