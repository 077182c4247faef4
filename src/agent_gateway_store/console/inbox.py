"""The inbox: what waits for a decision, one approval with all that is needed to decide, the decision, and changes."""

from __future__ import annotations

import asyncio
import hashlib
import signal
from collections.abc import AsyncIterator
from functools import partial
from typing import Any

from anyio import to_thread
from cachetools import TTLCache
from markupsafe import Markup
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse

from agent_gateway_store import _text, clock, errors
from agent_gateway_store._concurrency import SingleFlight
from agent_gateway_store.console import pages
from agent_gateway_store.console.sessions import Session, address_of, is_right, logger
from agent_gateway_store.models.approval import ApprovalRequest
from agent_gateway_store.models.audit import AuditEvent
from agent_gateway_store.models.values import ApprovalStatus
from agent_gateway_store.results import Page

# Chosen: a page that a person reads, and the neighbours of one approval that fit beside it.
PAGE, _BESIDE = 50, 8
# What was decided about the same tool; longer ago it says little about today.
_BEFORE = "30d"
_DECIDED = [ApprovalStatus.APPROVED, ApprovalStatus.DENIED, ApprovalStatus.USED]
# Characters; the limit of a form leaves room for them.
_NOTE = 20_000
# Chosen: a page that listens shows a new request within four seconds, at half a read a second for each organisation.
LOOK_S = 2.0
# The browser comes back by itself, and only then is its session checked: so soon a revoked key ends the stream.
_STREAM_S = 30.0
_ORGANISATIONS = 10_000
CHANNEL = "console"


async def inbox(request: Request) -> Response:
    """`GET /approvals?status=&cursor=`."""
    session = await pages.session_of(request)
    status = request.query_params.get("status", ApprovalStatus.PENDING)
    if status != "ALL" and status not in list(ApprovalStatus):
        raise HTTPException(400, "There is no such status.")
    cursor = request.query_params.get("cursor") or None
    narrowed = None if status == "ALL" else status
    found = await session.store.approvals.search(status=narrowed, limit=PAGE, cursor=cursor)
    return pages.page(
        request,
        "inbox.html",
        cards=[await _card(request, each) for each in found],
        status=status,
        statuses=[*ApprovalStatus, "ALL"],
        cursor=cursor,
        next_cursor=found.next_cursor,
        version=_word_of(found),
        replica_note=None if narrowed == ApprovalStatus.PENDING else await pages.replica_note(session),
    )


def _word_of(found: Page[ApprovalRequest]) -> str:
    """Return a word that changes with what a list shows, and not with the time that is left."""
    # Whatever is changed in an approval raises its version; only that it has expired is seen without one.
    seen = [f"{each.approval_id} {each.version} {each.status}" for each in found]
    return hashlib.sha256(f"{seen} {found.next_cursor is None}".encode()).hexdigest()[:16]


async def _card(request: Request, asked: ApprovalRequest) -> Markup:
    """Return an approval as the inbox shows it."""
    base, cards = pages.base_of(request), pages.console_of(request).cards
    key = (base, asked.approval_id, asked.version, asked.status)
    if (card := cards.get(key)) is None:
        # In a thread: one caller may ask with arguments of 256 kB as often as a page has room for.
        card = await to_thread.run_sync(partial(pages.fragment, "_card.html", base=base, asked=asked))
        cards[key] = card
    return card


async def approval(request: Request) -> Response:
    """`GET /approvals/{approval_id}`."""
    return await _approval_page(request, await pages.session_of(request))


async def _approval_page(
    request: Request, session: Session, *, status: int = 200, said: str = "", note: str = ""
) -> Response:
    found = await session.store.approvals.get(approval_id=request.path_params["approval_id"])
    values = {
        "asked": found,
        "history": await session.store.approvals.history(found.approval_id),
        "said": said,
        "note": note,
        "needs_note": session.store.settings.console_require_note,
        "is_own": found.caller_id == session.caller_id and not session.store.settings.allow_self_approval,
        **await _surroundings(session, found),
    }
    # In a thread, as a card: it holds whole what callers may have made as long as can be stored.
    return await to_thread.run_sync(partial(pages.page, request, "approval.html", code=status, **values))


async def _surroundings(session: Session, found: ApprovalRequest) -> dict[str, Any]:
    """Return what helps to judge: why it was stopped, what the caller did lately, what was decided about this tool."""
    call = found.tool_call
    before = await session.search_approvals(
        tool_name=call.tool, mcp_server=call.server, status=_DECIDED, since=_BEFORE, limit=_BESIDE + 1
    )
    return {
        "events": await _stopped(session, found),
        "counts": await session.log.stats(by="decision", caller_id=found.caller_id, since="24h"),
        "recent": await session.log.search(caller_id=found.caller_id, since="24h", limit=_BESIDE),
        "before": [each for each in before if each.approval_id != found.approval_id][:_BESIDE],
    }


async def _stopped(session: Session, found: ApprovalRequest) -> list[AuditEvent]:
    """Return the events about this call, oldest first: another one may have used its request id before."""
    call, search = found.tool_call, session.log.search
    cited = await search(approval_id=found.approval_id, limit=_BESIDE)
    asked = await search(
        request_id=found.request_id,
        caller_id=found.caller_id,
        mcp_server=call.server,
        tool_name=call.tool,
        limit=_BESIDE,
    )
    return sorted({each.id: each for each in (*cited, *asked)}.values(), key=lambda each: each.id or 0)[:_BESIDE]


async def decide(request: Request) -> Response:
    """`POST /approvals/{approval_id}/decision`: 303 back to the approval; 409 names who was first."""
    session = await pages.session_of(request)
    form = await pages.form_of(request)
    approvals, note = session.store.approvals, form.get("note", "").replace("\r\n", "\n").strip()
    if not is_right(session, form.get("csrf", "")):
        foreign = "This form was not from your session: decide anew."
        return await _approval_page(request, session, status=403, said=foreign, note=note)
    verbs = {"approve": approvals.approve, "deny": approvals.deny}
    verb = form.get("decision", "")
    if verb not in verbs:
        raise HTTPException(400, "Choose: approve or deny.")
    if len(note) > _NOTE:
        long = f"A note has {_NOTE:,} characters at most."
        return await _approval_page(request, session, status=400, said=long, note=note)
    if session.store.settings.console_require_note and _text.is_blank(note):
        return await _approval_page(request, session, status=400, said="Say why: a decision needs a note here.")
    approval_id = request.path_params["approval_id"]
    try:
        result = await verbs[verb](approval_id=approval_id, approver_id=session.caller_id, note=note, channel=CHANNEL)
    except errors.ApprovalNotFoundError:
        raise
    except errors.ApprovalError as exc:
        if _is_repeated(exc, session, verb):
            return pages.to(request, f"/approvals/{approval_id}")
        reason = _text.sentence(str(exc))
        logger.info("%s could not %s %s: %s", _text.escape(session.caller_id), verb, exc.approval_id, reason)
        return await _approval_page(request, session, status=_status_of(exc), said=_reason(exc), note=note)
    logger.info(
        "%s decided to %s %s, from %s; it is %s.",
        _text.escape(session.caller_id),
        verb,
        result.approval_id,
        _text.escape(address_of(request)),
        result.status,
    )
    return pages.to(request, f"/approvals/{result.approval_id}")


def _is_repeated(error: errors.ApprovalError, session: Session, verb: str) -> bool:
    """True for the second click of somebody who decided the same."""
    if not isinstance(error, errors.ApprovalAlreadyDecidedError):
        return False
    same = {"approve": (ApprovalStatus.APPROVED, ApprovalStatus.USED), "deny": (ApprovalStatus.DENIED,)}
    return error.approver_id == session.caller_id and error.status in same[verb]


def _status_of(error: errors.ApprovalError) -> int:
    if isinstance(
        error, errors.ApprovalAlreadyDecidedError | errors.ApprovalAlreadyVotedError | errors.ApprovalExpiredError
    ):
        return 409
    return 403 if isinstance(error, errors.SelfApprovalError | errors.DecisionVetoedError) else 400


def _reason(error: errors.ApprovalError) -> str:
    if isinstance(error, errors.ApprovalAlreadyDecidedError) and error.approver_id:
        at = f" at {pages.utc_text(error.decided_at)} UTC" if error.decided_at else ""
        if error.status == ApprovalStatus.CANCELLED:
            again = "If it was asked again on other terms, it is among all that waits."
            return f"{error.approver_id} withdrew this request{at}. Your decision was not recorded. {again}"
        return f"{error.approver_id} was first: {error.status}{at}. Your decision was not recorded."
    return str(error)


class Watch:
    """What the inbox of each organisation looks like, read once for all the pages that are open in this process."""

    def __init__(self) -> None:
        self._seen: TTLCache[str, tuple[str, int]] = TTLCache(_ORGANISATIONS, LOOK_S * 0.9, timer=clock.monotonic)
        self._reads: SingleFlight[tuple[str, int]] = SingleFlight()

    async def look(self, session: Session) -> tuple[str, int]:
        """Return a word that changes with the inbox, and how many wait on its first page."""
        found = self._seen.get(session.org_id)
        return found or await self._reads.run(session.org_id, partial(self._read, session))

    async def _read(self, session: Session) -> tuple[str, int]:
        waiting = await session.store.approvals.search(status=ApprovalStatus.PENDING, limit=PAGE)
        found = self._seen[session.org_id] = _word_of(waiting), len(waiting)
        return found


async def events(request: Request) -> Response:
    """`GET /events`."""
    session = await pages.session_of(request)
    known = request.headers.get("last-event-id", "")
    # nginx would keep the stream until it ends, if this did not say otherwise.
    headers = {"X-Accel-Buffering": "no"}
    stream = _stream(request.app.state.watch, session, known)
    return StreamingResponse(stream, headers=headers, media_type="text/event-stream")


async def _stream(watch: Watch, session: Session, known: str) -> AsyncIterator[str]:
    yield f"retry: {LOOK_S * 1000:.0f}\n\n"
    end = clock.monotonic() + _STREAM_S
    while clock.monotonic() < end and not _is_stopping():
        try:
            word, waiting = await watch.look(session)
        except errors.GatewayStoreError:
            # The page listens again, every few seconds, until the database is back.
            return
        if word != known:
            # The first word only says where the page stands: it was read a moment ago.
            yield f"id: {word}\nevent: {'inbox' if known else 'hello'}\ndata: {waiting}\n\n"
            known = word
        await asyncio.sleep(LOOK_S)


def _is_stopping() -> bool:
    # uvicorn tells applications only when all answers have ended, or cancels them; its handler of signals knows before.
    server = getattr(signal.getsignal(signal.SIGTERM), "__self__", None)
    return getattr(server, "should_exit", False) is True
