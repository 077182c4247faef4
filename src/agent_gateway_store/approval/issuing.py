"""Ask for an approval: a new row, or the one that the same call already has, if it is pending on the same terms."""

from __future__ import annotations

import asyncio
import hashlib
import logging
import secrets
from collections.abc import Mapping
from typing import Any, NamedTuple
from uuid import UUID

from sqlalchemy.exc import IntegrityError

from agent_gateway_store._concurrency import BackgroundTasks
from agent_gateway_store.approval.changes import Changes
from agent_gateway_store.approval.outbox_rows import Change, Outbox, insert_with_deliveries, notice_of
from agent_gateway_store.approval.queries import StoredApproval
from agent_gateway_store.approval.statements import (
    CANCEL_OTHER_TERMS,
    COUNT_PENDING,
    EXPIRE_SAME_CALL,
    LOCK_CALL,
    REISSUE,
    SAME_CALL,
    WITHDRAW,
)
from agent_gateway_store.encoding.canonical import hash_json
from agent_gateway_store.encoding.sanitize import MAX_KEY_BYTES, Scrubber
from agent_gateway_store.errors import (
    ApprovalError,
    ApprovalMismatchError,
    GatewayStoreError,
    TooManyPendingError,
)
from agent_gateway_store.models.approval import ApprovalRequest, hash_tool_call
from agent_gateway_store.models.delivery import Leased
from agent_gateway_store.models.values import ApprovalStatus, ToolCall
from agent_gateway_store.storage.database import AnyConnection, dialect_of
from agent_gateway_store.storage.errors import is_refused, retry_conflicts
from agent_gateway_store.storage.sequences import require_next_id_on

_logger = logging.getLogger("agent_gateway_store.approvals")
_TRIES = 3  # the approval in the way may be swept or decided while it is asked for again


class Issued(NamedTuple):
    """The approval that was asked for; not `is_new`: the pending one of the same call, under the new token."""

    approval: StoredApproval
    is_new: bool
    leased: Leased


def issue_values(
    request: ApprovalRequest,
    *,
    call: ToolCall | None,
    org_id: str | None,
    ttl_s: float,
    max_pending: int,
    hash_key: str | None,
) -> dict[str, Any]:
    """Return the parameters by which `request` is asked, scrubbed; it begins PENDING whatever it says.

    Raises:
        ApprovalMismatchError: The request names another organisation than the store is bound to, or its `output_hash`
            is not that of its `output_payload`.
    """
    # Whoever decides must see where the call goes on.
    scrubber = Scrubber(marks_cuts=True)
    shown = request.tool_call
    tool_call_hash = request.tool_call_hash if call is None else None
    payload = scrubber.json("output_payload", request.output_payload)
    return {
        "p_approval_id": request.approval_id,
        "p_token": request.token or secrets.token_urlsafe(32),
        "p_request_id": scrubber.text("request_id", request.request_id, limit=MAX_KEY_BYTES),
        "p_caller_id": scrubber.text("caller_id", request.caller_id, limit=MAX_KEY_BYTES),
        "p_org_id": _organisation(request, org_id),
        "p_tool_call": ToolCall(
            server=scrubber.text("server", shown.server),
            tool=scrubber.text("tool", shown.tool),
            arguments=scrubber.json("arguments", shown.arguments),
        ),
        "p_tool_call_hash": tool_call_hash or hash_tool_call(call or shown, key=hash_key),
        "p_risk_explanation": scrubber.text("risk_explanation", request.risk_explanation),
        "p_expires_at": request.expires_at,
        "p_ttl_s": ttl_s,
        "p_use_before": request.use_before,
        "p_scope": request.scope,
        "p_output_payload": payload,
        "p_output_hash": _output_hash(request, payload, hash_key),
        "p_required_approvals": request.required_approvals,
        "p_acquire_key": None,
        "p_max_pending": max_pending,
    }


def _organisation(request: ApprovalRequest, bound: str | None) -> str:
    own = Scrubber().text("org_id", request.org_id, limit=MAX_KEY_BYTES)
    if bound is None or own == bound:
        return own
    if "org_id" in request.model_fields_set:
        raise ApprovalMismatchError(
            "The approval belongs to another organisation than this store: use `store.for_org` of its own.",
            approval_id=request.approval_id,
        )
    return bound


def _output_hash(request: ApprovalRequest, stored: Any, hash_key: str | None) -> str | None:
    given = request.output_hash and Scrubber().text("output_hash", request.output_hash)
    if stored is None:
        return given
    # Of the payload as it is stored, for that is what can be checked when it is released.
    actual = hash_json(stored, key=hash_key)
    if given and given.lower() != actual:
        raise ApprovalMismatchError(
            "The output_hash is not that of the output_payload as it is stored: leave it out, and it is computed.",
            approval_id=request.approval_id,
        )
    return actual


async def insert(connection: AnyConnection, values: dict[str, Any], outbox: Outbox) -> Issued | None:
    """Insert the row and those of its notice; None if another approval is in the way."""
    row, leased = await insert_with_deliveries(connection, values, outbox)
    return None if row is None else Issued(StoredApproval.from_row(row), True, leased)


def _lock_of(values: Mapping[str, Any]) -> int:
    name = "\0".join(values[f"p_{each}"] for each in SAME_CALL)
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], signed=True)  # a bigint


async def require_room(connection: AnyConnection, values: Mapping[str, Any]) -> None:
    """Return if the caller may ask for one more approval.

    Raises:
        TooManyPendingError: As many as APPROVAL_MAX_PENDING wait for a decision.
    """
    pending = (await COUNT_PENDING.one(connection, values))["pending"]
    if pending >= values["p_max_pending"]:
        raise TooManyPendingError(values["p_caller_id"], pending)


def already_issued(values: Mapping[str, Any]) -> ApprovalError:
    """Return what to raise for a request that cannot be asked (again)."""
    approval_id: UUID = values["p_approval_id"]
    return ApprovalError(
        "This request (or its token) was issued before, and its approval is decided, has other terms or is another "
        "call's: build a new ApprovalRequest.",
        approval_id=approval_id,
    )


class Asking:
    """Asks for approvals, and withdraws a new one whose caller was cancelled before it had the token.

    Args:
        background: Where both run to their end. None: in the task of the caller, whose session no other task can use;
            nothing is withdrawn.
    """

    def __init__(self, changes: Changes, background: BackgroundTasks | None) -> None:
        self._changes, self._background = changes, background

    async def issue(self, values: dict[str, Any]) -> str:
        """Ask, and return the token; `values` and errors as for `issue_values` and `ApprovalManager.issue_token`."""
        if self._background is None:
            await self._ask(values)
        else:
            asking = self._background.start(self._ask(values))
            try:
                await asyncio.shield(asking)
            except asyncio.CancelledError:
                self._background.start(self._withdraw(asking, values))
                raise
        return str(values["p_token"])

    async def _withdraw(self, asking: asyncio.Task[Issued], values: dict[str, Any]) -> None:
        """Cancel what was asked, unless somebody has asked for it again or voted since."""
        try:
            issued = await asking
            if issued.is_new and (change := await self._cancel(values, issued)) is not None:
                await self._changes.publish(change)
        except ApprovalError:
            pass  # what was refused was not asked
        except GatewayStoreError as exc:
            _logger.warning("Approval %s may wait for nobody until it expires: %s", values["p_approval_id"], exc)

    @retry_conflicts
    async def _cancel(self, values: dict[str, Any], issued: Issued) -> Change | None:
        async with self._changes.transactions.connection("transaction") as connection:
            version = {"p_version": issued.approval.request.version}
            row = await WITHDRAW.first(connection, values | version)
            return (await self._changes.enqueue(connection, [StoredApproval.repaired(row)]))[0] if row else None

    async def _ask(self, values: dict[str, Any]) -> Issued:
        issued = await self._insert(values)
        self._changes.waiting.note_change()
        approval, token = issued.approval, str(values["p_token"])
        if issued.is_new:
            self._changes.outbox.send(notice_of(approval.request, "pending"), issued.leased)
        old = None if issued.is_new else await self._changes.cache.token_of(approval.request.approval_id)
        await self._changes.cache.put(approval, token, is_known=False)
        if old is not None and old != token:
            # It no longer names the approval, and its entry would go on answering for it.
            await self._changes.cache.drop(old)
        return issued

    async def _insert(self, values: dict[str, Any]) -> Issued:
        for _ in range(_TRIES):
            issued = await self._insert_or_reissue(values)
            if issued is not None:
                return issued
            changes, issued = await self._close_and_insert(values)
            for change in changes:
                await self._changes.publish(change)
            if issued is not None:
                return issued
        async with self._changes.transactions.connection("autocommit") as connection:
            await require_next_id_on(connection, "approval_requests")
        raise already_issued(values)

    @retry_conflicts
    async def _insert_or_reissue(self, values: dict[str, Any]) -> Issued | None:
        """Insert the approval, or give the pending one of the same call the new token.

        None: another one is in the way, of the same call on other terms, or overdue and not swept yet.
        """
        async with self._changes.transactions.connection("autocommit") as connection:
            issued = await insert(connection, values, self._changes.outbox)
            if issued is not None:
                return issued
            try:
                row = await REISSUE.first(connection, values)
            except IntegrityError as exc:
                if is_refused(exc):
                    raise
                # The token belongs to the approval of another call.
                raise already_issued(values) from None
        return None if row is None else Issued(StoredApproval.from_row(row), False, Leased({}, 0))

    @retry_conflicts
    async def _close_and_insert(self, values: dict[str, Any]) -> tuple[list[Change], Issued | None]:
        """Close what is overdue or has other terms, and insert; tasks that ask for one call take turns."""
        async with self._changes.transactions.connection("transaction") as connection:
            if dialect_of(connection) == "postgresql":
                # Without it each of many would cancel what another has just asked, and the slowest would give up.
                await LOCK_CALL.first(connection, {"p_lock": _lock_of(values)})
            rows = await EXPIRE_SAME_CALL.rows(connection, values) + await CANCEL_OTHER_TERMS.rows(connection, values)
            closed = list(map(StoredApproval.repaired, rows))
            changes = await self._changes.enqueue(connection, closed)
            issued = await insert(connection, values, self._changes.outbox)
            if issued is None and any(each.request.status is ApprovalStatus.CANCELLED for each in closed):
                # Nothing else can be in the way now: this request's own id or token is taken.
                await require_next_id_on(connection, "approval_requests")
                raise already_issued(values)
            if issued is None:
                await require_room(connection, values)
            return changes, issued
