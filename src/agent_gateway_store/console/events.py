"""Server-sent events: a page is notified that its inbox has changed, and reads itself again."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncIterator

from cachetools import TTLCache
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse

from agent_gateway_store import clock
from agent_gateway_store.console import pages
from agent_gateway_store.console.inbox import PAGE
from agent_gateway_store.console.sessions import Session
from agent_gateway_store.errors import GatewayStoreError
from agent_gateway_store.models.values import ApprovalStatus

# Chosen: a new request is on the screen within two seconds, at half a read a second for each organisation.
LOOK_S = 2.0
# The browser comes back by itself, and only then is its session checked: so soon a revoked key ends the stream.
_STREAM_S = 30.0
_ORGANISATIONS = 10_000


class Watch:
    """What the inbox of each organisation looks like, read once for all the pages that are open in this process."""

    def __init__(self) -> None:
        self._seen: TTLCache[str, tuple[str, int]] = TTLCache(_ORGANISATIONS, LOOK_S * 0.9, timer=clock.monotonic)
        self._lock = asyncio.Lock()

    async def look(self, session: Session) -> tuple[str, int]:
        """Return a word that changes with the inbox, and how many wait on its first page."""
        async with self._lock:
            found = self._seen.get(session.org_id)
            if found is None:
                waiting = await session.store.approvals.search(status=ApprovalStatus.PENDING, limit=PAGE)
                text = "".join(f"{each.approval_id}{each.version}" for each in waiting)
                found = self._seen[session.org_id] = hashlib.sha256(text.encode()).hexdigest()[:16], len(waiting)
        return found


async def events(request: Request) -> Response:
    """`GET /events`."""
    session = await pages.session_of(request)
    known = request.headers.get("last-event-id", "")
    return StreamingResponse(_stream(request.app.state.watch, session, known), media_type="text/event-stream")


async def _stream(watch: Watch, session: Session, known: str) -> AsyncIterator[str]:
    yield f"retry: {LOOK_S * 1000:.0f}\n\n"
    end = clock.monotonic() + _STREAM_S
    while clock.monotonic() < end:
        try:
            word, waiting = await watch.look(session)
        except GatewayStoreError:
            # The browser tries again until the database is back.
            return
        if word != known:
            # The first word only says where the page stands: it was read a moment ago.
            yield f"id: {word}\nevent: {'inbox' if known else 'hello'}\ndata: {waiting}\n\n"
            known = word
        await asyncio.sleep(LOOK_S)
