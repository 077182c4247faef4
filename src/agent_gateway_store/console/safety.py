"""What holds for every request: no form is too large or from elsewhere, every answer carries the headers."""

from __future__ import annotations

import asyncio
from urllib.parse import urlsplit, urlunsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

# Bytes: a note of 20,000 characters, as an approval takes at most on a page, in three bytes each, of which a form makes
# nine (`%E4%BD%A0`), and the other fields.
MAX_BODY = 200_000
# Seconds that a form may take to arrive. Chosen: a whole one at the speed of a bad phone line.
BODY_S = 30.0
_HEADERS = {
    "Cache-Control": "no-store",
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "
        "form-action 'self'; base-uri 'none'; frame-ancestors 'none'"
    ),
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Permissions-Policy": "camera=(), geolocation=(), microphone=(), payment=(), usb=()",
    # Not no-referrer, with which browsers send `Origin: null` with our own forms.
    "Referrer-Policy": "same-origin",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
}
_READING = ("GET", "HEAD", "OPTIONS")
_PORTS = {"http": 80, "https": 443}
_FORM = "application/x-www-form-urlencoded"


class Safety:
    """Guards an application, whose origin browsers know; None: it is the scheme and host of each request."""

    def __init__(self, app: ASGIApp, *, origin: str | None) -> None:
        self._app = app
        self._origin = origin

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        async def send_guarded(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in _HEADERS.items():
                    headers.setdefault(name, value)
                if (target := headers.get("location")) is not None:
                    headers["location"] = _path_of(target)
            await send(message)

        refusal = self._refusal(scope)
        if refusal is None and scope["method"] not in _READING:
            try:
                async with asyncio.timeout(BODY_S):
                    body = await _read(receive)
            except TimeoutError:
                # The rest is not waited for; HTTP/2 knows no such header.
                close = {"Connection": "close"} if scope["http_version"].startswith("1") else {}
                refusal = PlainTextResponse("The form took too long to arrive: send it again.", 408, close)
            else:
                if body is None:
                    refusal = PlainTextResponse("The form is too large, or not whole.", 413)
                else:
                    receive = _Again(body, receive)
        await (refusal or self._app)(scope, receive, send_guarded)

    def _refusal(self, scope: Scope) -> PlainTextResponse | None:
        if scope["method"] in _READING:
            return None
        headers = Headers(scope=scope)
        origin, site = headers.get("origin"), headers.get("sec-fetch-site", "same-origin")
        here = self._origin or f"{scope['scheme']}://{headers.get('host', '')}"
        if site not in ("same-origin", "none") or (origin is not None and origin != here):
            return PlainTextResponse("This form was sent from another site.", 403)
        if headers.get("content-type", "").partition(";")[0].strip().lower() not in (_FORM, ""):
            return PlainTextResponse("Send a form.", 415)
        length = headers.get("content-length", "0")
        if not length.isdecimal() or int(length[:20]) > MAX_BODY:
            return PlainTextResponse("The form is too large.", 413)
        return None


class _Again:
    """Gives a body that was read already, then what the server says next."""

    def __init__(self, body: bytes, receive: Receive) -> None:
        self._message: Message | None = {"type": "http.request", "body": body, "more_body": False}
        self._receive = receive

    async def __call__(self) -> Message:
        message, self._message = self._message, None
        return message or await self._receive()


async def _read(receive: Receive) -> bytes | None:
    """Return the body; None as soon as it is too large, whatever its headers said, or ends before it is whole."""
    body = bytearray()
    while True:
        message = await receive()
        if message["type"] != "http.request":
            return None
        body += message.get("body", b"")
        if len(body) > MAX_BODY:
            return None
        if not message.get("more_body"):
            return bytes(body)


def _path_of(target: str) -> str:
    """Return a redirect without a host: Starlette takes that of the Host header, which is not where browsers are."""
    parts = urlsplit(target)
    return urlunsplit(("", "", f"/{parts.path.lstrip('/')}", parts.query, ""))


def origin_of(url: str | None) -> str | None:
    """Return scheme and host of a URL as a browser writes them in the Origin header."""
    if url is None:
        return None
    parts = urlsplit(url.lower())
    # Without the port that the scheme has anyway.
    return f"{parts.scheme}://{parts.netloc.removesuffix(f':{_PORTS[parts.scheme]}')}"
