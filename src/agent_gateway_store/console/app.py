"""The application: its routes, signing in and out, what an error looks like, and the store that it may have to open."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from urllib.parse import quote, unquote

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import HTMLResponse, PlainTextResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp
from uvicorn.middleware.proxy_headers import ProxyHeadersMiddleware

from agent_gateway_store import errors
from agent_gateway_store.console import audit, charts, inbox, pages, safety
from agent_gateway_store.console.sessions import COOKIE, Sessions, address_of, is_right, logger
from agent_gateway_store.store import GatewayStore

# Chosen: a load balancer asks every few seconds and gives up on an answer soon after.
_READY_S = 2.0
_ASK = Callable[[Request], Awaitable[Response]]
# A page of the console, and no other site: browsers read // and a backslash as the beginning of a host.
_OWN_PATH = re.compile(r"/(?:approvals|audit|charts)(?:[/?][\w\-./?=&%+:~*!$'(),;@]*)?", re.ASCII)


def build(store: GatewayStore) -> ASGIApp:
    """Return the console; see `create_console`."""
    settings = store.settings
    console = pages.Console(store, Sessions(store))

    @asynccontextmanager
    async def lifespan(_app: Starlette) -> AsyncIterator[None]:
        console.owns_store = True
        try:
            await store.open()
        except errors.GatewayStoreError as exc:
            logger.warning("The console waits for its database: %s", exc)
        yield
        await store.close()

    routes = [
        Route("/", _home),
        Route("/login", _show_login),
        Route("/login", _opened(_login), methods=["POST"]),
        Route("/logout", _opened(_logout), methods=["POST"]),
        Route("/approvals", _opened(inbox.inbox)),
        Route("/approvals/{approval_id}", _opened(inbox.approval)),
        Route("/approvals/{approval_id}/decision", _opened(inbox.decide), methods=["POST"]),
        Route("/audit", _opened(audit.search)),
        Route("/audit/{event_id}", _opened(audit.event)),
        Route("/audit/{event_id}/evidence.json", _opened(audit.evidence)),
        Route("/charts", _opened(charts.charts)),
        Route("/charts/{name}.svg", _opened(charts.chart)),
        Route("/events", _opened(inbox.events)),
        Route("/healthz", _alive),
        Route("/readyz", _ready),
        Route("/static/{version}/{name}", pages.static),
    ]
    handlers = {
        HTTPException: _refused,
        errors.ApprovalNotFoundError: _absent,
        errors.InvalidCursorError: _bad_cursor,
        errors.GatewayStoreError: _away,
    }
    app = Starlette(routes=routes, lifespan=lifespan, exception_handlers=handlers)  # type: ignore[arg-type]
    app.state.console, app.state.watch = console, inbox.Watch()
    guarded: ASGIApp = safety.Safety(app, origin=safety.origin_of(settings.console_url))
    proxies = [each.strip() for each in (settings.console_trusted_proxies or "").split(",") if each.strip()]
    return ProxyHeadersMiddleware(guarded, trusted_hosts=proxies) if proxies else guarded  # type: ignore[arg-type, return-value]


def _opened(page: _ASK) -> _ASK:
    """Return a page that first opens the store, which may have been away when the console started."""

    async def opened(request: Request) -> Response:
        console = pages.console_of(request)
        if console.owns_store:
            await console.store.open()
        return await page(request)

    return opened


async def _home(request: Request) -> Response:
    return pages.to(request, "/approvals")


async def _alive(_request: Request) -> Response:
    return PlainTextResponse("ok")


async def _ready(request: Request) -> Response:
    """Say whether database, schema and sealer are well; not what is wrong, as anybody may ask."""
    console = pages.console_of(request)
    try:
        async with asyncio.timeout(_READY_S):
            if console.owns_store:
                await console.store.open()
            await console.store.ping()
            if console.store.org_id is None:
                # The log is that of all organisations, and is not shown to a store of one.
                await console.store.evidence.checkpoint()
    except (errors.GatewayStoreError, TimeoutError) as exc:
        logger.warning("The console is not ready: %s", exc)
        return PlainTextResponse("not ready", 503)
    return PlainTextResponse("ready")


async def _refused(request: Request, exc: HTTPException, *, note: str = "") -> Response:
    if exc.status_code == 401:
        return await _to_login(request)
    titles = {400: "Not understood", 403: "Not allowed", 404: "Not found", 405: "Not allowed"}
    texts = {
        403: "This form is not from your session. Go back, and load the page again.",
        404: "There is no such page. What belongs to another organisation looks the same.",
    }
    is_ours = exc.detail and exc.detail not in ("Not Found", "Forbidden", "Method Not Allowed")
    text = exc.detail if is_ours else texts.get(exc.status_code, exc.detail)
    response = pages.message(request, titles.get(exc.status_code, "Refused"), text, status=exc.status_code, note=note)
    response.headers.update(exc.headers or {})
    return response


async def _to_login(request: Request) -> Response:
    if request.url.path.endswith("/events"):
        return PlainTextResponse("Sign in.", 401)
    if request.headers.get("sec-fetch-site") == "cross-site" and COOKIE not in request.cookies:
        # A link from a chat: a SameSite=Strict cookie comes only once the page itself asks again.
        return HTMLResponse('<!doctype html><title>Console</title><meta http-equiv="refresh" content="0">')
    path = request.url.path.removeprefix(pages.base_of(request))
    if path.endswith("/decision"):
        ended = "Your session had ended: nothing was recorded."
        note = (await pages.form_of(request)).get("note", "")
        return _login_page(request, path.removesuffix("/decision"), status=401, error=ended, note=note)
    query = f"?{request.url.query}" if request.url.query else ""
    following = f"?next={quote(path + query, safe='')}" if request.method == "GET" else ""
    return pages.to(request, f"/login{following}")


async def _absent(request: Request, _exc: Exception) -> Response:
    note = (await pages.form_of(request)).get("note", "") if request.method == "POST" else ""
    return await _refused(request, HTTPException(404, "There is no such approval."), note=note)


async def _bad_cursor(request: Request, _exc: Exception) -> Response:
    return await _refused(request, HTTPException(400, "This page of the list is gone: begin with the first one."))


async def _away(request: Request, exc: Exception) -> Response:
    """Say that the store cannot answer, and try again; what was sent by a form is not sent a second time."""
    logger.warning("The console has no database: %s", exc)
    if request.url.path.endswith("/events"):
        return PlainTextResponse("away", 503)
    text = "The database is away. This page tries again by itself."
    form = {}
    if request.method == "POST":
        text = "The database is away, and it is not known whether what you sent was recorded. Look again below."
        form = await pages.form_of(request)
    path = request.url.path.removeprefix(pages.base_of(request)).removesuffix("/decision")
    query = f"?{request.url.query}" if request.url.query else ""
    retry = "/approvals" if path == "/logout" else path + query
    if path == "/login":
        text = "The database is away, and you are not signed in. Try again below."
        retry = f"/login?next={quote(form.get('next', ''), safe='')}"
    return pages.message(request, "The database is away", text, status=503, retry=retry, note=form.get("note", ""))


def _login_page(
    request: Request, following: str, *, status: int = 200, error: str = "", note: str = ""
) -> HTMLResponse:
    """Return the form to sign in, which then leads to `following` if that is a path of the console."""
    return pages.page(request, "login.html", code=status, error=error, following=_own_path(following), note=note)


async def _show_login(request: Request) -> Response:
    """`GET /login`."""
    return _login_page(request, request.query_params.get("next", ""))


async def _login(request: Request) -> Response:
    """`POST /login`: a new session in any case; the one of a cookie that came with it ends."""
    console = pages.console_of(request)
    address, form = address_of(request), await pages.form_of(request)
    following = form.get("next", "")
    if console.sessions.is_limited(address):
        refused = "Too many keys were refused, or are being checked: wait a minute, then try again."
        response = _login_page(request, following, status=429, error=refused)
        response.headers["Retry-After"] = "60"
        return response
    try:
        session_id = await console.sessions.sign_in(form.get("key", ""), address=address)
    except errors.InvalidApiKeyError:
        refused = "This key was not accepted. It must be valid, and its role one that may use the console."
        return _login_page(request, following, status=403, error=refused)
    await _end(request)
    answer = pages.to(request, _own_path(following) or "/approvals")
    answer.set_cookie(COOKIE, session_id, **_cookie(request))  # type: ignore[arg-type]
    return answer


async def _logout(request: Request) -> Response:
    """`POST /logout`."""
    session = await pages.session_of(request)
    if not is_right(session, (await pages.form_of(request)).get("csrf", "")):
        raise HTTPException(403)
    await _end(request)
    answer = pages.to(request, "/login")
    answer.delete_cookie(COOKIE, **_cookie(request))  # type: ignore[arg-type]
    return answer


async def _end(request: Request) -> None:
    session_id = request.cookies.get(COOKIE)
    sessions = pages.console_of(request).sessions
    session = await sessions.find(session_id)
    if session is not None and session_id is not None:
        await sessions.end(session, session_id, address=address_of(request))


def _cookie(request: Request) -> dict[str, object]:
    url = pages.console_of(request).store.settings.console_url or ""
    is_secure = request.url.scheme == "https" or url.startswith("https://")
    path = pages.base_of(request) or "/"
    return {"path": path, "httponly": True, "samesite": "strict", "secure": is_secure}


def _own_path(path: str) -> str:
    is_inside = "//" not in path and ".." not in unquote(path.partition("?")[0])
    return path if _OWN_PATH.fullmatch(path) and is_inside else ""
