"""Every refusal as JSON: `{"error": ..., "detail": one sentence, "request_id": ...}`."""

from __future__ import annotations

import logging

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from agent_gateway_store import errors
from fastapi_gateway.tools import InvalidArgumentsError, SandboxError, ToolError, UnknownToolError

__all__ = ["RefusalError", "install_handlers", "refusal_of"]

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


# The first class that fits counts, so the derived ones stand first.
_KINDS: tuple[tuple[type[Exception], int, str], ...] = (
    (errors.InvalidApiKeyError, 401, "invalid_api_key"),
    (errors.ApprovalNotFoundError, 404, "approval_not_found"),
    (errors.ApprovalMismatchError, 403, "approval_mismatch"),
    (errors.ApprovalExpiredError, 410, "approval_expired"),
    (errors.ApprovalAlreadyUsedError, 409, "approval_already_used"),
    (errors.ApprovalAlreadyDecidedError, 409, "approval_already_decided"),
    (errors.ApprovalAlreadyVotedError, 409, "approval_already_voted"),
    (errors.ApprovalNotApprovedError, 409, "approval_not_approved"),
    (errors.SelfApprovalError, 403, "self_approval"),
    (errors.DecisionVetoedError, 403, "decision_vetoed"),
    (errors.ApprovalError, 409, "approval_conflict"),
    (errors.InvalidCursorError, 400, "invalid_cursor"),
    (UnknownToolError, 404, "unknown_tool"),
    (InvalidArgumentsError, 422, "invalid_arguments"),
    (SandboxError, 403, "path_refused"),
    (ToolError, 422, "tool_failed"),
)


def refusal_of(exc: Exception) -> RefusalError:
    """Return the refusal that `exc` stands for; whatever is not known is a 500 that tells nothing."""
    if isinstance(exc, RefusalError):
        return exc
    if isinstance(exc, errors.ApprovalNotApprovedError) and exc.status in ("DENIED", "CANCELLED"):
        return RefusalError(403, f"approval_{exc.status.lower()}", str(exc))
    for kind, status, error in _KINDS:
        if isinstance(exc, kind):
            return RefusalError(status, error, str(exc), {"WWW-Authenticate": "Bearer"} if status == 401 else None)
    if isinstance(exc, errors.AuditUnavailableError):
        return RefusalError(503, "audit_unavailable", "The call could not be recorded, so its result is withheld.")
    if isinstance(exc, errors.GatewayStoreError):
        # The operator's hint (which server, which setting) goes to the log, not to the caller.
        return RefusalError(503, "store_unavailable", "The gateway cannot reach its records: try again later.")
    if isinstance(exc, RequestValidationError):
        return RefusalError(422, "malformed_request", _what_is_wrong(exc))
    if isinstance(exc, HTTPException):
        return RefusalError(exc.status_code, "http_error", f"{exc.detail}.".replace("..", "."), dict(exc.headers or {}))
    return RefusalError(500, "internal_error", "The gateway failed: tell its operator the request id.")


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
