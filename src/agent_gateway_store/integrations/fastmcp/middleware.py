"""The middleware: no tool runs unless it is judged, approved and recorded."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Awaitable, Callable, MutableMapping
from contextlib import asynccontextmanager
from functools import partial
from typing import Any, Literal

from fastmcp.exceptions import DisabledError, NotFoundError, ToolError
from fastmcp.server.context import Context
from fastmcp.server.dependencies import get_http_request
from fastmcp.server.middleware import CallNext, MiddlewareContext
from fastmcp.tools import ToolResult
from fastmcp.tools.base import InputRequiredToolResult
from mcp_types import CallToolRequestParams, ElicitRequest, ElicitRequestURLParams, InputRequiredResult
from mcp_types.version import MODERN_PROTOCOL_VERSIONS

from agent_gateway_store.audit.calls import HIDDEN, argument_names
from agent_gateway_store.clock import utc_now
from agent_gateway_store.errors import GatewayStoreError, InvalidApiKeyError
from agent_gateway_store.integrations.callbacks import CallRefusedError, Policy, Sanitize, call_back
from agent_gateway_store.integrations.calls import AWAY, AskedCall, CallPendingError, finish, refusal_text
from agent_gateway_store.integrations.fastmcp.origin import origin_fields, outer_call, running, tool_span
from agent_gateway_store.integrations.fastmcp.pinning import CallChangedError, PinningMiddleware, pinned, unpinned
from agent_gateway_store.integrations.fastmcp.resolution import (
    INPUT_RESPONSES,
    REQUEST_STATE,
    RESERVED,
    VERSION,
    ResolvedTool,
    resolve,
)
from agent_gateway_store.integrations.guard import CallGuard, ReleasedCall
from agent_gateway_store.keys.format import key_in
from agent_gateway_store.models.approval import ApprovalRequest, ApprovalResult
from agent_gateway_store.models.audit import Decision
from agent_gateway_store.models.keys import CallerIdentity, TrustLevel
from agent_gateway_store.models.values import ApprovalStatus, ToolCall
from agent_gateway_store.store import GatewayStore

Identify = Callable[[MiddlewareContext[Any]], CallerIdentity | Awaitable[CallerIdentity]]
NameServer = Callable[[MiddlewareContext[Any]], str | Awaitable[str]]

_UNKNOWN = "unknown"
_UNKNOWN_TOOL = "There is no such tool."
_WITHHELD = "The call could not be recorded, so its result is withheld: tell the operator."
_REPLACED = "The tool changed while the call waited, so it was not run: call again."
_OTHER_CALLER = "The caller's key or role changed while the call waited, so it was not run: call again."
_logger = logging.getLogger("agent_gateway_store.integrations")
_PAGE = "agent_gateway_store_approval"
# What a callback raises to refuse a call, beside errors of the store.
_REFUSALS = (ToolError, NotFoundError, DisabledError)
_call_back = partial(call_back, refusals=_REFUSALS)


class _GoesOnError(Exception):
    """An extension answered for a tool that goes on in the background; how that ends is not known here."""

    def __init__(self, result: Any) -> None:
        self.result = result


@asynccontextmanager
async def _refusals() -> AsyncIterator[None]:
    """Raise what FastMCP and callbacks refuse a call by as a `CallRefusedError`."""
    try:
        yield
    except ToolError as exc:
        raise CallRefusedError(str(exc)) from exc
    except (NotFoundError, DisabledError) as exc:
        raise CallRefusedError(_UNKNOWN_TOOL, rule="gateway.unknown_tool") from exc


class _Guard(CallGuard):
    """Shows approvers, beside what `sanitize` returns, which version runs, and that the call brings answers."""

    _refusals = _REFUSALS

    async def _prepare(self, asked: AskedCall) -> None:
        await super()._prepare(asked)
        arguments = asked.call.arguments
        hidden = dict.fromkeys(RESERVED & arguments.keys(), HIDDEN)
        # No secret, since callers choose it among the versions of the tool; and approvers need it.
        version = {name: arguments[name] for name in hidden if name == VERSION}
        asked.event["sanitized_args"] = {**hidden, **asked.event["sanitized_args"], **version}


class _WaitingGuard(_Guard):
    """Asks for an approval of one call, waits for it, and cancels it once nobody waits any more."""

    async def _acquire(self, asked: AskedCall, request: ApprovalRequest, bind: str, *, wait_s: float) -> ApprovalResult:
        approvals, caller_id = asked.store.approvals, asked.caller.caller_id
        token = await approvals.issue_token(request, call=asked.call)
        is_open = True
        try:
            decided = await approvals.wait_for_decision(token, timeout_s=wait_s)
            is_open = decided.status in (ApprovalStatus.PENDING, ApprovalStatus.APPROVED)
            if decided.status is ApprovalStatus.PENDING:
                text = f"Nobody decided about this call within {wait_s:g} seconds, so it was not run: call again later."
                raise await asked.refusal(text, Decision.APPROVAL_REQUIRED)
            if decided.status is ApprovalStatus.EXPIRED:
                raise await asked.refusal(refusal_text(decided), Decision.APPROVAL_REQUIRED)
            if decided.status is not ApprovalStatus.APPROVED:
                raise await asked.refusal(refusal_text(decided), approver_id=decided.approver_id)
            if asked.before_use is not None:
                await asked.before_use()
            used = await approvals.consume_token(token, caller_id=caller_id, tool_call=asked.call)
            is_open = False
            return used
        finally:
            if is_open:
                await finish(approvals.cancel(token, caller_id, "Nobody waits for it any more.", channel="fastmcp"))


class GatewayMiddleware(PinningMiddleware):
    """Judges each tool call, asks a human where the policy says so, runs it, and writes one audit event.

    It judges, shows and records the tool that really runs: aliases, mounts and transforms are followed to the tool's
    own server and name, with the values that the caller sent; `@version`, `@input_responses` and `@request_state` are
    added to its arguments if there are any. That tool then runs, or nothing. Add this middleware last, so that nothing
    after it changes an approved call.
    It fails closed. Nothing runs, and the caller receives a `ToolError` of one sentence, if the caller is not known, if
    the tool that would run cannot be determined or would run as a background task, if a callback raises, or if the
    store does not answer. With AUDIT_MODE=strict the database must answer before a tool runs, and a result whose event
    cannot be written is withheld. The tool and the callbacks receive raw arguments; the store receives their hash.

    Args:
        store: Opened and closed by the host, in the lifespan of the server.
        policy: Called with the caller and the call; returns the `Verdict`. Each callback may be sync or async.
        identify: Returns the caller, given the context of the middleware; asked again before an approved call runs.
            None verifies the API key in `Authorization: Bearer` or `X-API-Key` of the HTTP request; stdio has no such
            request.
        sanitize: Returns the arguments that approvers and the audit log may see. Default: their names only. The
            version is always shown, and always that there are answers.
        server: Name of this server in the record, or what returns it for one call, given the context of the
            middleware; None takes the name of the FastMCP server. Mounted servers keep their own names, each of which
            must be unique.
        on_pending: "return": a call that nobody has approved answers, after `approval_wait_s`, that it is pending; the
            same call again, hours later and over another connection, runs once it is approved. With CONSOLE_URL, a
            client that can open pages for its user is first asked to open the one of the approval. "wait": it waits
            `approval_timeout_s` for a human, and then its approval is cancelled, as when the client goes away.
        approval_wait_s: Seconds; below the time after which clients give a call up.
        approval_timeout_s: Seconds.
    """

    judges_calls = True

    def __init__(
        self,
        store: GatewayStore,
        policy: Policy,
        *,
        identify: Identify | None = None,
        sanitize: Sanitize = argument_names,
        server: str | NameServer | None = None,
        on_pending: Literal["return", "wait"] = "return",
        approval_wait_s: float = 20.0,
        approval_timeout_s: float = 300.0,
    ) -> None:
        super().__init__()
        if on_pending not in ("return", "wait"):
            raise ValueError(f'on_pending must be "return" or "wait", not {on_pending!r}.')
        self._store, self._identify, self._server = store, identify or self._verify_http_key, server
        kind, wait_s = (_WaitingGuard, approval_timeout_s) if on_pending == "wait" else (_Guard, approval_wait_s)
        self._guard = kind(store, policy, sanitize=sanitize, approval_wait_s=wait_s)

    async def _verify_http_key(self, _context: MiddlewareContext[Any]) -> CallerIdentity:
        try:
            headers = get_http_request().headers
        except RuntimeError:
            raise InvalidApiKeyError from None
        return await self._store.keys.verify(key_in(headers))

    async def on_call_tool(
        self,
        context: MiddlewareContext[CallToolRequestParams],
        call_next: CallNext[CallToolRequestParams, ToolResult],
    ) -> ToolResult:
        """Run one tool call, or refuse it.

        Raises:
            ToolError: It was refused, or could not be recorded. Errors of the tool itself are passed on unchanged.
            NotFoundError: There is no such tool.
        """
        message, session = context.message, context.fastmcp_context
        has_seen_page = session is not None and _take_answer(session)
        call = ToolCall(server=_own_name(context), tool=message.name, arguments=message.arguments or {})
        unknown = CallerIdentity(
            caller_id=_UNKNOWN,
            role=_UNKNOWN,
            trust_level=TrustLevel.UNTRUSTED,
            environment=self._store.settings.environment,
            org_id=self._store.org_id or "default",
        )
        asked = self._guard.begin(call, unknown, timestamp=utc_now(), **origin_fields(context))
        with tool_span(message.name, context):
            try:
                async with asked.refusing(), _refusals():
                    resolved = await self._resolved(asked, context)
                    released = await self._guard.judge(asked, bind=lambda: resolved.schema_hash)
            except CallPendingError as exc:
                is_plain = outer_call() is None and not {INPUT_RESPONSES, REQUEST_STATE} & asked.call.arguments.keys()
                page = None
                # Once a call: a person is not sent there again every `approval_wait_s` seconds. And only where that
                # loses neither what the client answered to the tool nor, in a call inside a call, the outer tool.
                if session is not None and not has_seen_page and is_plain:
                    page = _page_request(session, exc, self._store.settings.console_url)
                return page or _pending_answer(exc)
            except CallRefusedError as exc:
                if isinstance(exc.__cause__, NotFoundError | DisabledError) and str(exc) != AWAY:
                    raise exc.__cause__ from None
                raise ToolError(str(exc)) from exc.__cause__
            return await self._run(asked, released, resolved, context, call_next)

    async def _resolved(self, asked: AskedCall, context: MiddlewareContext[CallToolRequestParams]) -> ResolvedTool:
        """Find out who calls and what would run, and let the call on its way say so."""
        _set_parent(asked)
        server = await self._name(context)
        asked.call = asked.call.model_copy(update={"server": server})
        asked.caller = await self._caller(context)
        _set_parent(asked)
        self._store.database.check_owner()
        resolved = await _resolve(context, context.message, server)
        asked.call = resolved.call

        async def require_unchanged() -> None:
            if await self._caller(context) != asked.caller:
                raise CallRefusedError(_OTHER_CALLER)
            try:
                now = await _resolve(context, resolved.message, server)
                is_same = (now.call, now.code) == (resolved.call, resolved.code)
            except _REFUSALS:
                is_same = False
            if not is_same:
                raise CallRefusedError(_REPLACED)

        asked.before_use = require_unchanged
        return resolved

    async def _caller(self, context: MiddlewareContext[Any]) -> CallerIdentity:
        caller: CallerIdentity = await _call_back("identify", self._identify, context, returns=CallerIdentity)
        return caller

    async def _name(self, context: MiddlewareContext[Any]) -> str:
        if callable(self._server):
            return str(await _call_back("server", self._server, context, returns=str))
        return _own_name(context) if self._server is None else self._server

    async def _run(
        self,
        asked: AskedCall,
        released: ReleasedCall,
        resolved: ResolvedTool,
        context: MiddlewareContext[CallToolRequestParams],
        call_next: CallNext[CallToolRequestParams, ToolResult],
    ) -> ToolResult:
        behind: list[GatewayStoreError] = []

        async def tool() -> ToolResult:
            request_id, org_id = asked.event["request_id"], asked.caller.org_id
            try:
                with pinned(resolved.hops, once=released.is_approved) as pins, running(request_id, org_id):
                    result = await call_next(context.copy(message=resolved.message))
            except (CallChangedError, NotFoundError, DisabledError) as exc:
                # Once the tool has begun, an error of these classes comes from a call that it made itself.
                if not pins.has_begun:
                    released.take_back(str(exc) if isinstance(exc, CallChangedError) else _UNKNOWN_TOOL)
                raise
            except GatewayStoreError as exc:
                behind.append(exc)
                raise
            if not isinstance(result, ToolResult):
                raise _GoesOnError(result)
            assert released.outcome is not None  # noqa: S101
            released.outcome.output_hash = self._store.hash_args(result.model_dump(mode="json", exclude={"meta"}))
            return result

        try:
            return await released.run(tool, is_error=lambda result: result.is_error, open_ends=(_GoesOnError,))
        except _GoesOnError as exc:
            result: ToolResult = exc.result
            return result
        except GatewayStoreError as exc:
            if exc in behind:
                raise
            _logger.error("Request %s: %s: %s", asked.event["request_id"], type(exc).__name__, exc)
            raise ToolError(_WITHHELD if released.outcome is not None else AWAY) from exc


def _own_name(context: MiddlewareContext[Any]) -> str:
    return context.fastmcp_context.fastmcp.name if context.fastmcp_context is not None else _UNKNOWN


def _set_parent(asked: AskedCall) -> None:
    # An id of another organisation stays there.
    outer = outer_call()
    is_own = outer is not None and outer.org_id == asked.caller.org_id
    asked.event["parent_request_id"] = outer.request_id if outer is not None and is_own else None


async def _resolve(context: MiddlewareContext[Any], message: CallToolRequestParams, server: str) -> ResolvedTool:
    if context.fastmcp_context is None:
        raise RuntimeError("FastMCP gave no context, so the tool that would run cannot be determined.")
    with unpinned():
        return await resolve(context.fastmcp_context, message, server=server)


def _pending_answer(pending: CallPendingError) -> ToolResult:
    """Return what the client receives: an error in words, and the same for programs."""
    facts = {**pending.facts, "next": "call again with the same arguments"}
    return ToolResult(content=str(pending), structured_content=facts, is_error=True)


def _take_answer(context: Context) -> bool:
    """Return whether the client comes back from `_page_request`, and hide from the tool that it does.

    The answer releases nothing: somebody may have opened the page, and the approval is acquired anew.
    """
    answers = context.input_responses
    if answers is None or _PAGE not in answers or context.request_context is None:
        return False
    # No public name of FastMCP leads to the raw request, from which the tool and a proxy read the answers.
    params = context.request_context._srctx.params
    if isinstance(params, MutableMapping):
        params.pop("inputResponses", None)
    return True


def _page_request(context: Context, pending: CallPendingError, console_url: str | None) -> ToolResult | None:
    """Return the result that asks the client to open the approval's page; None if it cannot."""
    request = context.request_context
    if console_url is None or request is None or request.protocol_version not in MODERN_PROTOCOL_VERSIONS:
        return None
    capabilities = context.session.client_capabilities
    if capabilities is None or capabilities.elicitation is None or capabilities.elicitation.url is None:
        return None
    url = f"{console_url}/approvals/{pending.approval.approval_id}"
    asked = ElicitRequest(params=ElicitRequestURLParams(message=str(pending), url=url))
    return InputRequiredToolResult(InputRequiredResult(input_requests={_PAGE: asked}))
