"""The errors of the store as HTTP responses."""

from __future__ import annotations

import logging
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from typing import Any

from fastapi import FastAPI, HTTPException, Request, WebSocket, status
from fastapi.exception_handlers import http_exception_handler
from fastapi.exceptions import RequestValidationError
from fastapi.routing import APIRoute
from starlette.responses import Response
from starlette.websockets import WebSocketState

from agent_gateway_store import errors
from agent_gateway_store._text import sentence
from agent_gateway_store.encoding.sanitize import Scrubber
from agent_gateway_store.telemetry import remote_parent, span

# Seconds: as long as the breaker of Redis and the pool of PostgreSQL need to find out that a server is back.
RETRY_AFTER_S = 5
# The first class that matches counts, so derived classes come before their bases.
_STATUSES: tuple[tuple[type[errors.GatewayStoreError], int], ...] = (
    (errors.InvalidApiKeyError, 401),
    (errors.ApprovalNotFoundError, 404),
    (errors.ApprovalExpiredError, 410),
    (errors.ApprovalMismatchError, 403),
    (errors.SelfApprovalError, 403),
    (errors.DecisionVetoedError, 403),
    (errors.ApprovalError, 409),
    (errors.ApiKeyNotFoundError, 404),
    (errors.AuditEventNotFoundError, 404),
    (errors.ApiKeyExistsError, 409),
    (errors.InvalidCursorError, 400),
    (errors.StoreUnavailableError, 503),
    (errors.StoreNotOpenError, 503),
    (errors.SchemaOutOfDateError, 503),
)
_HEADERS = {401: {"WWW-Authenticate": "Bearer"}, 503: {"Retry-After": str(RETRY_AFTER_S)}}
_CLOSE_CODES = {500: status.WS_1011_INTERNAL_ERROR, 503: status.WS_1013_TRY_AGAIN_LATER}
# RFC 6455, 5.5: a control frame has at most 125 bytes, of which the code takes two.
_MAX_REASON_BYTES = 123
_GENERAL = {
    500: "The gateway failed: tell its operator.",
    503: "The gateway cannot reach its records: try again later.",
}
_logger = logging.getLogger("agent_gateway_store.integrations")


def http_exception_of(error: errors.GatewayStoreError) -> HTTPException:
    """Return `error` as an exception of FastAPI, which responds with `{"detail": sentence}`.

    401 (with `WWW-Authenticate`) for an API key, 404, 409 and 410 for an approval that is not found, decided or used
    already, or expired, 403 for one that is not for this caller, call or approver, 400 for a cursor, 503 (with
    `Retry-After`) for a store that cannot answer, 500 for the rest. Below 500 the sentence is the error's own. From 500
    on it is a general one: which server and which setting failed is for the operator only.
    """
    code = next((code for kind, code in _STATUSES if isinstance(error, kind)), 500)
    detail = _GENERAL.get(code) or sentence(str(error))
    return HTTPException(code, detail, _HEADERS.get(code))


@contextmanager
def http_errors() -> Iterator[None]:
    """Raise the errors of the store as exceptions of FastAPI, whether or not the application has our handlers."""
    try:
        yield
    except errors.GatewayStoreError as exc:
        raise _logged(exc) from exc


class StoreRoute(APIRoute):
    """A route whose answer 422 names the fields and repeats no value of the request.

    FastAPI's own answer holds the values, and fails with 500 where one is a NaN or has a lone surrogate.
    """

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """Return what handles a request, with its errors of validation answered as `detail: [{type, loc, msg}]`."""
        handle = super().get_route_handler()

        async def handle_named(request: Request) -> Response:
            try:
                with span(
                    f"{request.method} {self.path_format}",
                    parent=remote_parent(request.headers),
                    http__request__method=request.method,
                    http__route=self.path_format,
                ):
                    return await handle(request)
            except RequestValidationError as exc:
                wrong = [{name: error[name] for name in ("type", "loc", "msg")} for error in exc.errors()]
                # The name of an unknown field is the caller's, too.
                raise HTTPException(422, Scrubber().json("detail", wrong)) from None

        return handle_named


def _logged(error: errors.GatewayStoreError) -> HTTPException:
    answer = http_exception_of(error)
    if answer.status_code in _GENERAL:
        _logger.error("%s: %s", type(error).__name__, sentence(str(error)))
    return answer


async def _answer(connection: Any, exc: Exception) -> Any:
    # Starlette's signature says Exception; the handler is installed for this class alone.
    assert isinstance(exc, errors.GatewayStoreError)  # noqa: S101
    answer = _logged(exc)
    if isinstance(connection, WebSocket) and connection.application_state is not WebSocketState.CONNECTING:
        code = _CLOSE_CODES.get(answer.status_code, status.WS_1008_POLICY_VIOLATION)
        reason = str(answer.detail).encode()[:_MAX_REASON_BYTES].decode(errors="ignore")
        if connection.application_state is WebSocketState.CONNECTED:
            await connection.close(code, reason)
        return None
    # Before it is accepted, a WebSocket is answered as a request.
    return await http_exception_handler(connection, answer)


def install_error_handlers(app: FastAPI) -> None:
    """Let `app` respond by `http_exception_of` to every error of the store that an endpoint does not catch.

    An open WebSocket is closed, its reason the sentence: 1013 where the status would be 503, 1011 for 500, 1008 for the
    rest.
    """
    app.add_exception_handler(errors.GatewayStoreError, _answer)
