"""Decide: one voice each, the database picks the winner."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from agent_gateway_store.approval import refusals
from agent_gateway_store.approval.rows import Name, request_of, standing
from agent_gateway_store.approval.statements import APPROVE, APPROVE_LAST, COUNT_APPROVALS, TAKE, VOTE, Key
from agent_gateway_store.encoding.sanitize import Scrubber, storable_key
from agent_gateway_store.models.approval import VoteDecision
from agent_gateway_store.storage.database import AnyConnection
from agent_gateway_store.storage.statements import Statement

__all__ = ["Ballot", "approve", "end"]


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

    @property
    def values(self) -> dict[str, Any]:
        """The parameters that this ballot gives."""
        return {
            "p_approver_id": self.approver_id,
            "p_note": self.note,
            "p_channel": self.channel,
            "p_decision": self.says,
        }


async def approve(connection: AnyConnection, name: Name, ballot: Ballot, *, allow_self: bool) -> Mapping[str, Any]:
    """Cast a vote to approve, and approve where it is the last one needed; does not commit.

    Returns:
        The row as it then stands: APPROVED, or PENDING while voices are missing.

    Raises:
        ApprovalError: As `ApprovalManager.approve` says; what was written must be rolled back.
    """
    values = name.values | ballot.values | {"p_allow_self": allow_self}
    row = await APPROVE[name.by].first(connection, values)
    if row is not None:
        await _vote(connection, row, ballot)
        return row
    # Taking the row first makes voters wait for each other; each then counts what is really there.
    row = await TAKE[name.by].first(connection, values)
    if row is None:
        raise await _refused(connection, name, ballot, allow_self=allow_self)
    await _vote(connection, row, ballot)
    counted = await COUNT_APPROVALS.first(connection, {"p_approval_id": row["approval_id"]})
    if counted is not None and counted["approvals"] < row["required_approvals"]:
        return row
    decided = await APPROVE_LAST[name.by].first(connection, values)
    if decided is None:
        raise await _refused(connection, name, ballot, allow_self=allow_self)
    return decided


async def end(
    connection: AnyConnection, name: Name, ballot: Ballot, moves: Mapping[Key, Statement]
) -> Mapping[str, Any]:
    """Deny or cancel by this one voice; does not commit. Returns the row.

    Args:
        connection: In a transaction.
        name: Which approval.
        ballot: Who says so.
        moves: `DENY` or `CANCEL`.

    Raises:
        ApprovalError: As `ApprovalManager.deny` says; what was written must be rolled back.
    """
    row = await moves[name.by].first(connection, name.values | ballot.values)
    if row is None:
        raise await _refused(connection, name, ballot, allow_self=True)
    await _vote(connection, row, ballot)
    return row


async def _vote(connection: AnyConnection, row: Mapping[str, Any], ballot: Ballot) -> None:
    values = ballot.values | {"p_approval_id": row["approval_id"], "p_org_id": row["org_id"]}
    is_first = await VOTE.first(connection, values) is not None
    if not is_first and ballot.says is not VoteDecision.CANCELLED:
        raise refusals.already_voted(request_of(row).approval_id, ballot.approver_id)


async def _refused(connection: AnyConnection, name: Name, ballot: Ballot, *, allow_self: bool) -> Exception:
    return refusals.cannot_decide(
        await standing(connection, name), approver_id=ballot.approver_id, self_refused=not allow_self
    )
