"""Pages from templates: every text is shown with nothing hidden in it, and nothing of it becomes markup."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Hashable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import cache, partial
from importlib.resources import files
from typing import Any
from urllib.parse import parse_qsl, quote, urlencode

from cachetools import LRUCache, TTLCache
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import HTMLResponse, RedirectResponse, Response

from agent_gateway_store import _text
from agent_gateway_store.console.sessions import COOKIE, Session, Sessions
from agent_gateway_store.errors import StoreUnavailableError
from agent_gateway_store.results.cells import tone_of
from agent_gateway_store.store import GatewayStore

# Characters of a value that are read at a glance; above it is folded, whole, below a line that tells its length.
_FOLD, _PREVIEW = 1_500, 120
# Chosen: several thousand cards, or ten pages of the largest.
_CARDS_CHARS = 2**24
# A chart takes a quarter of a second of processor time, and a page shows four of them to everybody.
_CHARTS, _CHARTS_S = 64, 60.0
# Chosen: our largest form has four fields.
_FIELDS = 20
# Chosen: every page first reads three rows by their ids, and longer only a database that hangs lets people wait.
SESSION_S = 5.0
_STATIC = {"console.css": "text/css", "console.js": "text/javascript", "icon.svg": "image/svg+xml"}


@dataclass
class Console:
    """What every page works with: the store, which it may have to open itself, the sessions, and what was drawn."""

    store: GatewayStore
    sessions: Sessions
    owns_store: bool = False
    cards: LRUCache[Hashable, Markup] = field(default_factory=lambda: LRUCache(_CARDS_CHARS, getsizeof=len))
    charts: TTLCache[tuple[str, str], bytes] = field(default_factory=lambda: TTLCache(_CHARTS, _CHARTS_S))


def console_of(request: Request) -> Console:
    """Return the console that a request came to."""
    found: Console = request.app.state.console
    return found


async def session_of(request: Request) -> Session:
    """Return who is signed in. Raises HTTPException (401) if nobody is, and StoreUnavailableError."""
    try:
        async with asyncio.timeout(SESSION_S):
            session = await console_of(request).sessions.find(request.cookies.get(COOKIE))
    except TimeoutError as exc:
        raise StoreUnavailableError("The database did not answer in time: see whether it hangs.") from exc
    if session is None:
        raise HTTPException(401)
    request.state.session = session
    return session


async def form_of(request: Request) -> dict[str, str]:
    """Return the fields of a form, of two of one name the last. Raises HTTPException (400) if it is not a form."""
    try:
        text = (await request.body()).decode("ascii")
        return dict(parse_qsl(text, keep_blank_values=True, max_num_fields=_FIELDS))
    except ValueError:
        raise HTTPException(400, "This is not a form of the console.") from None


def base_of(request: Request) -> str:
    """Return the path under which the console is mounted, without a slash at its end."""
    root: str = request.scope.get("root_path", "")
    return quote(root.rstrip("/"))


def to(request: Request, path: str) -> RedirectResponse:
    """Redirect to a path of the console."""
    return RedirectResponse(base_of(request) + path, status_code=303)


def page(request: Request, template: str, *, code: int = 200, **values: Any) -> HTMLResponse:
    """Return a page; `code` is the status of the answer."""
    session, base = getattr(request.state, "session", None), base_of(request)
    given = {"base": base, "session": session, "replica_note": None, "static": f"{base}/static/{static_version()}"}
    return HTMLResponse(fragment(template, **(given | values)), status_code=code)


def fragment(template: str, **values: Any) -> Markup:
    """Return a part of a page."""
    return Markup(_environment().get_template(template).render(values))  # noqa: S704  templates escape


async def replica_note(session: Session) -> str | None:
    """Return how old what a page was read from may be, as a sentence; None: it was read from the primary."""
    database = session.store.database
    if database.replica is not database and (age_s := await database.replica.replica_age_s()) is not None:
        return f"Read from a replica, at most {age_s:.0f} s behind."
    if await database.is_replica_apart():
        return "Read from a server that is not a replica any more: what is new is missing here. Tell its operator."
    return None


def message(
    request: Request, title: str, text: str, *, status: int, retry: str | None = None, note: str = ""
) -> HTMLResponse:
    """Return a page that says one thing, and tries `retry` again by itself unless it shows a note for copying."""
    response = page(request, "message.html", code=status, title=title, text=text, retry=retry, note=note)
    if retry is not None:
        response.headers["Retry-After"] = "5"
    return response


@cache
def static_version() -> str:
    """Return a word that changes with our style or script, for their URLs."""
    digest = hashlib.sha256(b"".join(_static(name) for name in sorted(_STATIC)))
    return digest.hexdigest()[:12]


async def static(request: Request) -> Response:
    """Serve our style sheet and our script."""
    name = request.path_params["name"]
    if name not in _STATIC:
        raise HTTPException(404)
    # Under a name that changes with the content it may be kept for good: it holds nothing of the store.
    kept = {"Cache-Control": "public, max-age=31536000, immutable"}
    return Response(_static(name), media_type=_STATIC[name], headers=kept)


def _static(name: str) -> bytes:
    return files(__package__).joinpath("static", name).read_bytes()


@cache
def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader(__package__, "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=_visible,
    )
    environment.filters.update(
        utc=utc_text,
        iso=lambda value: value and value.astimezone(UTC).isoformat(timespec="milliseconds"),
        json=partial(_text.json_text, indent=2),
        folded=_folded,
        short=_short,
        lines=partial(_text.escape, keep="\n"),
        # The value that came with a form field: what is shown escaped would be sent back escaped.
        raw=lambda value: Markup.escape(str(value)),
        tone=lambda value: tone_of("status", str(value)) or "off",
        query=urlencode,
    )
    environment.globals.update(call_name=_text.call_name, cut_call=_text.CUT_CALL)
    return environment


def _visible(value: Any) -> Any:
    """Show what an expression of a template gives; None as nothing."""
    if value is None:
        return ""
    # `str` of a text that was shown already would lose that, and with it the line breaks that it keeps.
    if isinstance(value, _text.Shown) or hasattr(value, "__html__"):
        return value
    return _text.escape(str(value))


def utc_text(value: datetime | None) -> str:
    """Return an instant in UTC, to the second."""
    return "" if value is None else value.astimezone(UTC).strftime("%Y-%m-%d %H:%M:%S")


def _short(text: _text.Shown) -> _text.Shown:
    return text if len(text) <= _FOLD else _text.Shown(f"{text[:_FOLD]}…")


def _folded(value: Any) -> Mapping[str, Any]:
    """Return a value as text that is whole, and whether it is too long to be read at a glance."""
    text = value if isinstance(value, _text.Shown) else _text.json_text(value, indent=2)
    what = "what is stored of it," if _text.is_cut(value) else "all"
    preview = _text.Shown(text[:_PREVIEW])
    return {"text": text, "is_long": len(text) > _FOLD, "preview": preview, "length": len(text), "what": what}
