"""Acquire the permission to run a call: one standing approval for each call of a caller, used up by one run."""

from __future__ import annotations

import asyncio
import secrets
from datetime import datetime
from functools import partial
from typing import Any
from uuid import UUID, uuid4

from agent_gateway_store.approval import queries
from agent_gateway_store.approval.changes import Changes
from agent_gateway_store.approval.issuing import Issued, insert, require_room
from agent_gateway_store.approval.outbox_rows import Change, notice_of
from agent_gateway_store.approval.queries import ApprovalRef, StoredApproval, result_of
from agent_gateway_store.approval.statements import (
    CANCEL_ACQUIRED,
    EXPIRE_ACQUIRED,
    LAST_USE,
    READ_ACQUIRED,
    RECENTLY_DENIED,
    USE_ACQUIRED,
)
from agent_gateway_store.encoding.canonical import hash_json
from agent_gateway_store.errors import ApprovalError
from agent_gateway_store.models.approval import ApprovalResult
from agent_gateway_store.models.base import repaired
from agent_gateway_store.models.values import ApprovalStatus
from agent_gateway_store.settings import StoreSettings
from agent_gateway_store.storage.database import AnyConnection
from agent_gateway_store.storage.errors import retry_conflicts
from agent_gateway_store.storage.filters import number
from agent_gateway_store.storage.sequences import require_next_id_on

# Each try that fails saw another caller change the approval between two statements; ten in a row is no accident.
_TRIES = 10


def acquire_values(values: dict[str, Any], *, bind: str, settings: StoreSettings) -> dict[str, Any]:
    """Return the parameters by which a call is acquired, from those that `issue_values` gives.

    Each asking replaces those that name the approval, because one request object may be asked with many times.
    """
    call = [values["p_org_id"], values["p_caller_id"], values["p_tool_call_hash"], bind]
    return {
        **values,
        "p_acquire_key": hash_json(call),
        # Without it, the decision sets until when the approval can be used.
        "p_use_before": values["p_use_before"] or values["p_expires_at"],
        "p_since_s": -settings.approval_denial_seconds,
    }


class _DeniedMeanwhileError(Exception):
    def __init__(self, denied: StoredApproval) -> None:
        self.denied = denied


class Acquiring:
    """Uses, finds or asks for the approval of a call."""

    def __init__(self, changes: Changes) -> None:
        self._changes = changes

    async def acquire(self, values: dict[str, Any], *, wait_s: float) -> ApprovalResult:
        """Acquire by what `acquire_values` gives; the rest as for `ApprovalManager.acquire`."""
        # The ids under which it was asked for.
        tried: set[UUID] = set()
        found = await self._waited_for(values, tried, number("wait_s", wait_s))
        # A copy, which tasks that wait for one approval do not share.
        return found.model_copy(update={"is_new": found.approval_id in tried})

    async def _waited_for(self, values: dict[str, Any], tried: set[UUID], wait_s: float) -> ApprovalResult:
        loop = asyncio.get_running_loop()
        end = loop.time() + wait_s
        found = await self._changes.waiting.through_outage(lambda: self._acquire(values, tried), end)
        if found.status is not ApprovalStatus.PENDING or wait_s <= 0:
            return found
        ref = ApprovalRef.by_id(found.approval_id, values["p_org_id"])
        read = partial(queries.get_result, self._changes.transactions, ref, None)
        key = str(found.approval_id)
        decided = await self._changes.waiting.wait(values["p_org_id"], key, read, timeout_s=end - loop.time())
        if decided.status in (ApprovalStatus.PENDING, ApprovalStatus.DENIED):
            return decided
        return await self._changes.waiting.through_outage(lambda: self._acquire(values, tried), end)

    async def _acquire(self, values: dict[str, Any], tried: set[UUID]) -> ApprovalResult:
        for _ in range(_TRIES):
            found = await self._use_or_find(values)
            if found is None:
                # Another at each try: that of an earlier one may be used, cancelled or expired since.
                approval_id = uuid4()
                tried.add(approval_id)
                # Nobody receives the token: the column must hold something that nobody can guess.
                named = {"p_approval_id": approval_id, "p_token": secrets.token_urlsafe(32)}
                changes, found = await self._ask(values | named)
                for change in changes:
                    await self._changes.publish(change)
            if found is not None:
                return result_of(found.request, None)
        async with self._changes.transactions.connection("autocommit") as connection:
            await require_next_id_on(connection, "approval_requests")
        raise ApprovalError("Others changed the approval of this call again and again meanwhile: call again.")

    @retry_conflicts
    async def _use_or_find(self, values: dict[str, Any]) -> StoredApproval | None:
        async with self._changes.transactions.connection("autocommit") as connection:
            row = await USE_ACQUIRED.first(connection, values)
            if row is None:
                row = await READ_ACQUIRED.first(connection, values)
        if row is None:
            return None
        found = StoredApproval.from_row(row)
        if found.request.status is ApprovalStatus.USED:
            self._changes.waiting.note_change()
        return found

    async def _ask(self, values: dict[str, Any]) -> tuple[list[Change], StoredApproval | None]:
        """Close what stands and may not be used, and ask anew; None if another caller was faster."""
        try:
            changes, issued = await self._close_and_insert(values)
        except _DeniedMeanwhileError as exc:
            return [], exc.denied
        if issued is None:
            return changes, None
        self._changes.waiting.note_change()
        self._changes.outbox.send(notice_of(issued.approval.request, "pending"), issued.leased)
        return changes, issued.approval

    @retry_conflicts
    async def _close_and_insert(self, values: dict[str, Any]) -> tuple[list[Change], Issued | None]:
        async with self._changes.transactions.connection("transaction") as connection:
            await _require_not_denied(connection, values)
            rows = await EXPIRE_ACQUIRED.rows(connection, values) + await CANCEL_ACQUIRED.rows(connection, values)
            changes = await self._changes.enqueue(connection, list(map(StoredApproval.repaired, rows)))
            used = await LAST_USE.first(connection, values)
            issued = await insert(connection, values | _explained(values, used), self._changes.outbox)
            if issued is None:
                await require_room(connection, values)
            else:
                # The one that stood may have been denied since: a new statement sees it, and the insert is rolled back.
                await _require_not_denied(connection, values)
            return changes, issued


async def _require_not_denied(connection: AnyConnection, values: dict[str, Any]) -> None:
    row = await RECENTLY_DENIED.first(connection, values)
    if row is not None:
        raise _DeniedMeanwhileError(StoredApproval.repaired(row))


def _explained(values: dict[str, Any], used: dict[str, Any] | None) -> dict[str, Any]:
    """Return the explanation with what approvers must know of the last use, if its outcome is unknown."""
    if used is None:
        return {}
    known = repaired(used)
    if known["outcome"] is not None:
        return {}
    at: datetime | None = known["used_at"]
    when = "at a time that cannot be read" if at is None else f"at {at:%Y-%m-%d %H:%M:%S} UTC"
    earlier = f"It was approved and used before, {when}: it still runs, or its outcome is unknown."
    return {"p_risk_explanation": f"{values['p_risk_explanation']} {earlier}".strip()}
