"""Every refusal as JSON: `{"error": ..., "detail": one sentence, "request_id": ...}`."""

from __future__ import annotations

import logging
import re

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from agent_gateway_store import errors
from agent_gateway_store.integrations.fastapi import http_exception_of
from fastapi_gateway.tools import InvalidArgumentsError, SandboxError, ToolError, UnknownToolError

__all__ = ["RefusalError", "install_handlers", "refusal_of"]

_WORD_START = re.compile("(?<!^)(?=[A-Z])")
_logger = logging.getLogger("fastapi_gateway")


class RefusalError(Exception):
    """The gateway does not do what was asked.

    Attributes:
        status: HTTP status.
        error: What went wrong, as a word that programs compare.
        detail: The same as a sentence for humans.
    """

    def __init__(self, status: int, error: str, detail: str, headers: dict[str, str] | None = None) -> None:
        super().__init__(detail)
        self.status, self.error, self.detail, self.headers = status, error, detail, headers or {}


# The first class that matches counts, so derived classes come before their bases.
_KINDS: tuple[tuple[type[Exception], int, str], ...] = (
    (UnknownToolError, 404, "unknown_tool"),
    (InvalidArgumentsError, 422, "invalid_arguments"),
    (SandboxError, 403, "path_refused"),
    (ToolError, 422, "tool_failed"),
)


def refusal_of(exc: Exception) -> RefusalError:
    """Return the refusal for `exc`; an unknown error is a 500 without details."""
    if isinstance(exc, RefusalError):
        return exc
    if isinstance(exc, HTTPException) and isinstance(exc.__cause__, errors.GatewayStoreError):
        exc = exc.__cause__  # as the dependencies and routes of the store's integration raise it
    if isinstance(exc, errors.GatewayStoreError):
        return _refusal_of_store(exc)
    for kind, status, error in _KINDS:
        if isinstance(exc, kind):
            return RefusalError(status, error, str(exc))
    if isinstance(exc, RequestValidationError):
        return RefusalError(422, "malformed_request", _what_is_wrong(exc))
    if isinstance(exc, HTTPException):
        return RefusalError(exc.status_code, "http_error", f"{exc.detail}.".replace("..", "."), dict(exc.headers or {}))
    return RefusalError(500, "internal_error", "The gateway failed: tell its operator the request id.")


def _refusal_of_store(exc: errors.GatewayStoreError) -> RefusalError:
    if isinstance(exc, errors.ApprovalNotApprovedError) and exc.status in ("DENIED", "CANCELLED"):
        return RefusalError(403, f"approval_{exc.status.lower()}", str(exc))
    if isinstance(exc, errors.AuditUnavailableError):
        return RefusalError(503, "audit_unavailable", "The call could not be recorded, so its result is withheld.")
    answer = http_exception_of(exc)
    word = (
        "store_unavailable"
        if answer.status_code == 503
        else _WORD_START.sub("_", type(exc).__name__.removesuffix("Error"))
    )
    return RefusalError(answer.status_code, word.lower(), answer.detail, dict(answer.headers or {}))


def _what_is_wrong(exc: RequestValidationError) -> str:
    """Say where and what, never the input itself: it may hold a secret."""
    error = exc.errors()[0]
    where = ".".join(map(str, error["loc"]))
    return f"The request is wrong at {where}: {error['msg']}."


async def _answer(request: Request, exc: Exception) -> JSONResponse:
    refusal = refusal_of(exc)
    if refusal.status >= 500 and isinstance(exc, errors.GatewayStoreError):
        _logger.error("%s: %s", type(exc).__name__, exc)
    record = getattr(request.state, "call", None)
    body = {"error": refusal.error, "detail": refusal.detail.encode("utf-8", "replace").decode()}
    headers = dict(refusal.headers)
    if record is not None:
        body["request_id"] = headers["X-Request-Id"] = record.request_id
    return JSONResponse(body, refusal.status, headers, media_type="application/problem+json")


def install_handlers(app: FastAPI) -> None:
    """Have every error of `app` answered in this shape."""
    for kind in (RefusalError, errors.GatewayStoreError, ToolError, RequestValidationError, HTTPException, Exception):
        app.add_exception_handler(kind, _answer)
