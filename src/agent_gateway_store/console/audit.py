"""The audit log: search with every filter, one event with what belongs to it, and its evidence."""

from __future__ import annotations

import re
from datetime import timedelta
from functools import partial
from typing import Any
from urllib.parse import urlencode

from anyio import to_thread
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from agent_gateway_store import _text
from agent_gateway_store.console import pages
from agent_gateway_store.console.sessions import Session
from agent_gateway_store.errors import ApprovalNotFoundError, LogMismatchError, UnreadableRowError
from agent_gateway_store.evidence import Evidence
from agent_gateway_store.models.approval import (
    APPROVAL_HASH,
    ApprovalRequest,
    hash_approval,
    is_blank_approval,
    is_of_call,
)
from agent_gateway_store.models.audit import AuditEvent, Decision, ExecutionStatus, OutputDecision

_PAGE = 50
_TEXTS = ("text", "caller_id", "tool_name", "mcp_server", "risk_label", "min_risk_score", "since", "until")
_IDS = (
    *("request_id", "session_id", "trace_id", "parent_request_id", "approver_id", "approval_id", "key_id"),
    *("environment", "raw_args_hash", "org_id"),
)
_CHOICES: dict[str, list[str]] = {
    "decision": list(Decision),
    "execution_status": list(ExecutionStatus),
    "output_decision": list(OutputDecision),
}
FILTERS = (*_TEXTS, *_IDS, *_CHOICES)
# These take one value; of the others a URL may hold several, of which any may match.
_SINGLE = frozenset({"text", "min_risk_score", "since", "until"})
# Chosen: what one sees of a session before and after an event; the whole session is one click away.
_NEIGHBOURS = 5
# Chosen: of a call that was asked for more often than this under one request id, the latest.
_ASKED = 20
# Search gives the newest first, so what comes right after an event is the end of the shortest span that holds some.
_SPANS = (timedelta(minutes=1), timedelta(hours=1), timedelta(days=1), timedelta(days=365))
_SPAN_EVENTS = 200
_ASKED_ONLY = "Asked under the same request id, not proved to be of this call."
_ERASED = "What the approval said was erased."
_NO_HASH = "The event names this approval without its hash: nothing proves that it was decided as it stands here."
_OTHER_HASH = "The event holds another hash: the approval or a vote was changed after the call. Download the evidence."


async def search(request: Request) -> Response:
    """`GET /audit?...&cursor=`: what is wrong with a filter stands above the form, which keeps it."""
    session = await pages.session_of(request)
    given = _given(request)
    cursor = request.query_params.get("cursor") or None
    try:
        for name in request.query_params:
            if name not in (*FILTERS, "cursor"):
                raise ValueError(f"There is no filter {_text.code_text(name)}.")
        events = await session.store.audit.search(limit=_PAGE, cursor=cursor, **_filters(given))
        said, code = "", 200
    except ValueError as exc:
        events, said, code = None, str(exc), 400
    pairs = [(name, value) for name, values in given.items() for value in values]
    return pages.page(
        request,
        "audit.html",
        code=code,
        said=said,
        events=events or [],
        given=given,
        pairs=pairs,
        texts=_TEXTS,
        ids=_IDS,
        choices=_CHOICES,
        more=None if events is None or not events.next_cursor else urlencode([*pairs, ("cursor", events.next_cursor)]),
        first=urlencode(pairs) if cursor else None,
        replica_note=await pages.replica_note(session),
    )


def _given(request: Request) -> dict[str, list[str]]:
    values = {name: [each for each in request.query_params.getlist(name) if each] for name in FILTERS}
    return {name: found for name, found in values.items() if found}


def _filters(given: dict[str, list[str]]) -> dict[str, Any]:
    """Return the filters of `search`. Raises ValueError for a value of no filter."""
    filters: dict[str, Any] = {}
    for name, values in given.items():
        if name in _SINGLE and len(values) > 1:
            raise ValueError(f"{name} is given more than once.")
        filters[name] = values[0] if name in _SINGLE else values
    if "min_risk_score" in filters:
        try:
            filters["min_risk_score"] = float(filters["min_risk_score"])
        except ValueError:
            raise ValueError("min_risk_score must be a number.") from None
    return filters


async def _event_of(request: Request, session: Session) -> AuditEvent:
    text = request.path_params["event_id"]
    # Numbers of 18 digits fit a row's id.
    event = await session.store.audit.get(int(text)) if re.fullmatch("[0-9]{1,18}", text) else None
    if event is None:
        raise HTTPException(404, "There is no such event.")
    return event


async def event(request: Request) -> Response:
    """`GET /audit/{id}`."""
    session = await pages.session_of(request)
    found = await _event_of(request, session)
    fields = {name: getattr(found, name) for name in type(found).model_fields}
    approval, doubt = await _approval_of(session, found)
    values: dict[str, Any] = {
        "event": found,
        "fields": fields,
        "approval": approval,
        "doubt": doubt,
        "is_other": doubt == _OTHER_HASH,
        "neighbours": await _neighbours(session, found),
        "seal": await _seal_of(session, found),
    }
    # In a thread: what callers wrote may be as long as can be stored.
    return await to_thread.run_sync(partial(pages.page, request, "event.html", **values))


async def _approval_of(session: Session, found: AuditEvent) -> tuple[ApprovalRequest | None, str]:
    """Return an approval, and what speaks against its being the one of this call, as it was decided; "": nothing."""
    key = session.store.settings.hash_key
    if found.approval_id is not None:
        try:
            named = await session.store.approvals.get(approval_id=found.approval_id)
        except (ApprovalNotFoundError, UnreadableRowError):
            return None, ""
        if is_blank_approval(named.tool_call_hash, named.risk_explanation):
            return named, _ERASED
        if APPROVAL_HASH not in found.extra:
            return named, _NO_HASH
        return named, "" if found.extra[APPROVAL_HASH] == hash_approval(named, named.votes or ()) else _OTHER_HASH
    # Another call may have the same request id.
    asked = await session.search_approvals(
        request_id=found.request_id,
        caller_id=found.caller_id,
        mcp_server=found.mcp_server,
        tool_name=found.tool_name,
        limit=_ASKED,
    )
    fits = [(each, is_of_call(each, found, key=key.get_secret_value() if key else None)) for each in asked]
    proved = [each for each, fit in fits if fit]
    return next(iter(proved or [each for each, _ in fits]), None), "" if proved else _ASKED_ONLY


async def _neighbours(session: Session, found: AuditEvent) -> list[AuditEvent]:
    """Return the event among those of its session right before and after it, oldest first."""
    if not found.session_id:
        return []
    search_events, after = session.log.search, []
    before = await search_events(session_id=found.session_id, until=found.timestamp, limit=_NEIGHBOURS)
    for span in _SPANS:
        later = await search_events(
            session_id=found.session_id,
            since=found.timestamp,
            until=found.timestamp + span,
            limit=_SPAN_EVENTS,
        )
        after = list(later)
        if len(after) > 1:
            break
    row = sorted([*before, *after], key=lambda each: (each.timestamp, each.id or 0))
    place = next((index for index, each in enumerate(row) if each.id == found.id), 0)
    return row[max(0, place - _NEIGHBOURS) : place + _NEIGHBOURS + 1]


async def _seal_of(session: Session, found: AuditEvent) -> Evidence | None:
    """Return the evidence of an event that is sealed; None where it is not yet, or where the log lacks a hash."""
    try:
        proof = await session.store.evidence.prove(found.request_id)
    except LogMismatchError:
        return None
    return None if proof.checkpoint is None else proof


async def evidence(request: Request) -> Response:
    """`GET /audit/{id}/evidence.json`."""
    session = await pages.session_of(request)
    found = await _event_of(request, session)
    proof = await _seal_of(session, found)
    if proof is None:
        raise HTTPException(404, "There is no evidence of this event: it is not sealed.")
    name = f'attachment; filename="evidence-{found.id}.json"'
    return Response(proof.to_json(), media_type="application/json", headers={"Content-Disposition": name})
