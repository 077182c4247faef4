"""Sign in and out."""

from __future__ import annotations

import re

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import HTMLResponse, Response

from agent_gateway_store.console import pages
from agent_gateway_store.console.sessions import COOKIE, address_of, is_right
from agent_gateway_store.errors import InvalidApiKeyError

# A page of the console, and no other site: browsers read // and a backslash as the beginning of a host.
_OWN_PATH = re.compile(r"/(?:approvals|audit|charts)(?:[/?][\w\-./?=&%+:~*]*)?", re.ASCII)


def login_page(request: Request, *, status: int = 200, error: str = "") -> HTMLResponse:
    """Return the form to sign in."""
    following = _own_path(request.query_params.get("next", ""))
    return pages.page(request, "login.html", code=status, error=error, following=following)


async def show_login(request: Request) -> Response:
    """`GET /login`."""
    return login_page(request)


async def login(request: Request) -> Response:
    """`POST /login`: a new session in any case; the one of a cookie that came with it ends."""
    console = pages.console_of(request)
    address = address_of(request)
    if console.sessions.is_limited(address):
        response = login_page(request, status=429, error="Too many keys were refused: wait a minute, then try again.")
        response.headers["Retry-After"] = "60"
        return response
    form = await pages.form_of(request)
    try:
        session_id = await console.sessions.sign_in(form.get("key", ""), address=address)
    except InvalidApiKeyError:
        refused = "This key was not accepted. It must be valid, and its role one that may use the console."
        return login_page(request, status=403, error=refused)
    await _end(request)
    answer = pages.to(request, _own_path(form.get("next", "")) or "/approvals")
    answer.set_cookie(COOKIE, session_id, **_cookie(request))  # type: ignore[arg-type]
    return answer


async def logout(request: Request) -> Response:
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
    return path if _OWN_PATH.fullmatch(path) and "//" not in path else ""
