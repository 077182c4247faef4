"""For gateways on FastAPI: one store for the application, its callers, and the approvals over HTTP. Extra: `fastapi`.

Every dependency can be replaced in tests by `app.dependency_overrides`, under `get_store`, `get_caller` and
`get_caller_store`.
"""

# Without postponed annotations: FastAPI must see the dependency that `approvals_router` receives.
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterator, Mapping
from contextlib import AbstractAsyncContextManager, asynccontextmanager, contextmanager, nullcontext
from datetime import datetime
from typing import Annotated, Any, Literal
from uuid import UUID

from pydantic import BaseModel, ConfigDict, Field, computed_field

from agent_gateway_store import errors
from agent_gateway_store._text import CUT_CALL, sentence
from agent_gateway_store.encoding.sanitize import Scrubber
from agent_gateway_store.keys.format import key_in
from agent_gateway_store.models.approval import ApprovalScope, CastVote
from agent_gateway_store.models.keys import CallerIdentity
from agent_gateway_store.models.values import ApprovalStatus, ApproverId, FrozenModel, ToolCall
from agent_gateway_store.store import GatewayStore
from agent_gateway_store.telemetry import remote_parent, span

with errors.needs_extra("agent_gateway_store.integrations.fastapi", extra="fastapi"):
    from fastapi import APIRouter, Depends, FastAPI, HTTPException, Query, Request, Security, WebSocket, status
    from fastapi.exception_handlers import http_exception_handler
    from fastapi.exceptions import RequestValidationError
    from fastapi.routing import APIRoute
    from fastapi.security import APIKeyHeader, HTTPBearer
    from starlette.requests import HTTPConnection
    from starlette.responses import Response
    from starlette.websockets import WebSocketState

__all__ = [
    "ApprovalView",
    "Approver",
    "CallerDep",
    "CallerStoreDep",
    "DecisionView",
    "StoreDep",
    "approvals_router",
    "get_caller",
    "get_caller_store",
    "get_store",
    "http_exception_of",
    "install_error_handlers",
    "lifespan",
]

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
_NAME = "agent_gateway_store"

Lifespan = Callable[[FastAPI], AbstractAsyncContextManager[Any]]
# A note has at most 2,000 characters, which are 12,000 bytes if all of them are escapes; four times that is plenty.
_MAX_BODY_BYTES = 65_536
_FROM_ATTRIBUTES = ConfigDict(from_attributes=True)


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


def lifespan(store: GatewayStore | None = None, *, inner: Lifespan | None = None) -> Lifespan:
    """Return a lifespan for `FastAPI(lifespan=...)` that keeps one store open while the application runs.

    Each worker process opens its own. The store is closed after the response to the last request, and writes out its
    audit log.

    Args:
        store: Opened at start-up and closed at the end; None makes `GatewayStore()` from the environment.
        inner: The application's own lifespan. It starts once the store is open and ends before the store is closed;
            the state that it yields is passed on.

    Raises:
        GatewayStoreError: At start-up, as `GatewayStore.open` does; the server then does not start.
    """

    @asynccontextmanager
    async def opened(app: FastAPI) -> AsyncIterator[Mapping[str, Any]]:
        async with store or GatewayStore() as running:
            setattr(app.state, _NAME, running)
            async with inner(app) if inner is not None else nullcontext() as state:
                # Mounted applications have a state of their own, and share this one.
                yield {**(state or {}), _NAME: running}

    return opened


def get_store(connection: HTTPConnection) -> GatewayStore:
    """Return the store that `lifespan` opened; a dependency.

    Raises:
        StoreNotOpenError: The application was built without `lifespan`, or has not started.
    """
    shared: Mapping[str, Any] = connection.scope.get("state", {})
    store: GatewayStore | None = getattr(connection.app.state, _NAME, None) or shared.get(_NAME)
    if store is None:
        raise errors.StoreNotOpenError("The application has no store: build it with `FastAPI(lifespan=lifespan())`.")
    return store


StoreDep = Annotated[GatewayStore, Depends(get_store)]


# They only describe the API in OpenAPI: of two headers they would read the first, where `key_in` refuses both. And
# FastAPI's own want a `Request`, which a WebSocket does not have.
class _Bearer(HTTPBearer):
    async def __call__(self, _connection: HTTPConnection) -> None:
        """Read nothing."""


class _ApiKey(APIKeyHeader):
    async def __call__(self, _connection: HTTPConnection) -> None:
        """Read nothing."""


async def get_caller(
    connection: HTTPConnection,
    store: StoreDep,
    _bearer: Annotated[None, Security(_Bearer(scheme_name="HTTPBearer"))],
    _api_key: Annotated[None, Security(_ApiKey(name="X-API-Key", scheme_name="APIKeyHeader"))],
) -> CallerIdentity:
    """Return the owner of the API key in `Authorization: Bearer` or `X-API-Key`; a dependency, of WebSockets, too.

    The headers of a WebSocket are those of its handshake: a caller that is not accepted is answered before it opens.

    Raises:
        HTTPException: 401, always the same one, if there is not exactly one key or it is not accepted; 503 if the
            store cannot answer. The store's error is its cause.
    """
    with http_errors():
        return await store.keys.verify(key_in(connection.headers))


CallerDep = Annotated[CallerIdentity, Depends(get_caller)]


def get_caller_store(store: StoreDep, caller: CallerDep) -> GatewayStore:
    """Return the store bound to the caller's organisation; a dependency."""
    return store.for_org(caller.org_id)


CallerStoreDep = Annotated[GatewayStore, Depends(get_caller_store)]


class Approver(FrozenModel):
    """An approver, as the application identifies them.

    Attributes:
        approver_id: As written to the record.
        org_id: The organisation whose approvals they see and decide.
    """

    approver_id: ApproverId
    org_id: str = Field(min_length=1)


class ApprovalView(BaseModel):
    """One approval as approvers see it; the fields are those of `ApprovalRequest`, and `warning`."""

    model_config = _FROM_ATTRIBUTES

    approval_id: UUID
    request_id: str
    caller_id: str
    tool_call: ToolCall
    risk_explanation: str
    created_at: datetime
    expires_at: datetime | None
    status: ApprovalStatus
    scope: ApprovalScope
    required_approvals: int
    approver_id: str | None
    decision_at: datetime | None
    approver_note: str
    used_at: datetime | None
    outcome: str | None
    output_hash: str | None
    votes: list[CastVote]

    @computed_field  # type: ignore[prop-decorator]  # mypy knows no decorated property
    @property
    def warning(self) -> str:
        """What an approver must know before deciding: that not all that would run can be seen. Else empty."""
        return CUT_CALL if self.tool_call.is_cut else ""


class ApprovalPage(BaseModel):
    """Approvals, newest first.

    Attributes:
        next_cursor: Gives the next page; None at the end.
    """

    items: list[ApprovalView]
    next_cursor: str | None


class DecisionBody(BaseModel):
    """The decision of an approver; `reject` and `decline` mean deny."""

    model_config = ConfigDict(extra="forbid", hide_input_in_errors=True)

    decision: Literal["approve", "deny", "reject", "decline"]
    note: str = Field(default="", max_length=2_000)


class DecisionView(BaseModel):
    """An approval after a decision; the fields are those of `ApprovalResult`."""

    model_config = _FROM_ATTRIBUTES

    approval_id: UUID
    status: ApprovalStatus
    approver_id: str | None
    note: str
    decided_at: datetime | None
    expires_at: datetime | None


def approvals_router(
    approver: Callable[..., Approver | Awaitable[Approver]], *, prefix: str = "/approvals"
) -> APIRouter:
    """Return a router by which approvers list, see and decide the approvals of their organisation.

    `GET /approvals?status=PENDING&limit=&cursor=`, `GET /approvals/{approval_id}`, and
    `POST /approvals/{approval_id}/decision` with `{"decision": "approve" | "deny", "note": ""}`. A decision needs a
    JSON body, which no form of another site can send. Errors of the store become responses by `http_exception_of`:
    404 for an unknown approval and for one of another organisation, 409 with the decision that was made before, 410
    after the deadline.

    Args:
        approver: A dependency of the application that returns the approver, or raises an `HTTPException`.
        prefix: Path of the list.
    """
    who_decides = Annotated[Approver, Depends(approver)]
    router = APIRouter(prefix=prefix, tags=["approvals"], route_class=StoreRoute, max_body_size=_MAX_BODY_BYTES)

    @router.get("", response_model=ApprovalPage)
    async def list_approvals(
        store: StoreDep,
        who: who_decides,
        status: ApprovalStatus | None = None,
        limit: Annotated[int, Query(ge=1, le=500)] = 50,
        cursor: str | None = None,
    ) -> dict[str, Any]:
        """List approvals of the approver's organisation, newest first."""
        with http_errors():
            page = await store.for_org(who.org_id).approvals.list_requests(status, limit, cursor)
        return {"items": page, "next_cursor": page.next_cursor}

    @router.get("/{approval_id}", response_model=ApprovalView)
    async def show_approval(store: StoreDep, who: who_decides, approval_id: str) -> Any:
        """Show one approval."""
        with http_errors():
            return await store.for_org(who.org_id).approvals.get(approval_id=approval_id)

    @router.post("/{approval_id}/decision", response_model=DecisionView)
    async def decide_approval(store: StoreDep, who: who_decides, approval_id: str, body: DecisionBody) -> Any:
        """Approve or deny, once."""
        approvals = store.for_org(who.org_id).approvals
        decide = approvals.approve if body.decision == "approve" else approvals.deny
        with http_errors():
            return await decide(approval_id=approval_id, approver_id=who.approver_id, note=body.note)

    return router
