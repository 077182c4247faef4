"""The middleware: no tool runs unless it is judged, approved and recorded."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from functools import partial
from typing import Any, Literal

from fastmcp.exceptions import DisabledError, NotFoundError, ToolError
from fastmcp.server.dependencies import get_http_request
from fastmcp.server.middleware import CallNext, MiddlewareContext
from fastmcp.tools import ToolResult
from mcp_types import CallToolRequestParams

from agent_gateway_store.audit.calls import HIDDEN, CallStart, argument_names
from agent_gateway_store.errors import ApprovalError, GatewayStoreError, InvalidApiKeyError
from agent_gateway_store.integrations.fastmcp.asking import (
    acquire,
    ask,
    note_outcome,
    page_request,
    pending_answer,
    take_answer,
)
from agent_gateway_store.integrations.fastmcp.callbacks import CallbackError, call_back, failure
from agent_gateway_store.integrations.fastmcp.pinning import CallChangedError, PinningMiddleware, pinned, unpinned
from agent_gateway_store.integrations.fastmcp.record import (
    CallRecord,
    Identify,
    NameServer,
    Sanitize,
    origin_of,
    running,
    tool_span,
)
from agent_gateway_store.integrations.fastmcp.resolution import RESERVED, VERSION, ResolvedTool, resolve
from agent_gateway_store.integrations.guard import AWAY, BROKEN, CallPendingError, Policy, Verdict
from agent_gateway_store.keys.format import key_in
from agent_gateway_store.models.audit import Decision, ExecutionStatus
from agent_gateway_store.models.keys import CallerIdentity
from agent_gateway_store.models.values import ToolCall
from agent_gateway_store.store import GatewayStore

_WITHHELD = "The call could not be recorded, so its result is withheld: tell the operator."
_REPLACED = "The tool changed while the call waited, so it was not run: call again."
_OTHER_CALLER = "The caller's key or role changed while the call waited, so it was not run: call again."
_logger = logging.getLogger("agent_gateway_store.integrations")


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
        self._store, self._policy, self._sanitize = store, policy, sanitize
        self._identify = identify or self._verify_http_key
        self._server, self._approval_timeout_s = server, approval_timeout_s
        if on_pending not in ("return", "wait"):
            raise ValueError(f'on_pending must be "return" or "wait", not {on_pending!r}.')
        self._waits, self._approval_wait_s = on_pending == "wait", approval_wait_s

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
        has_seen_page = session is not None and take_answer(session)
        call = ToolCall(server=_own_name(context), tool=message.name, arguments=message.arguments or {})
        record = CallRecord(call, origin_of(context))
        record.shown = argument_names(record.call)
        with tool_span(record.call.tool, context):
            return await self._call(record, context, call_next, has_seen_page=has_seen_page)

    async def _call(
        self,
        record: CallRecord,
        context: MiddlewareContext[CallToolRequestParams],
        call_next: CallNext[CallToolRequestParams, ToolResult],
        *,
        has_seen_page: bool,
    ) -> ToolResult:
        session = context.fastmcp_context
        try:
            resolved, token = await self._release(record, context)
            return await self._run(record, resolved, token, context, call_next)
        except CallPendingError as exc:
            page = None
            # Once a call: a person is not sent there again every `approval_wait_s` seconds. And only where that loses
            # neither what the client answered to the tool nor, in a call inside a call, the outer tool.
            if session is not None and not has_seen_page and record.is_plain:
                page = page_request(session, exc, self._store.settings.console_url)
            return page or pending_answer(exc)
        finally:
            if not record.is_silent:
                await self._write(record)

    async def _release(
        self, record: CallRecord, context: MiddlewareContext[CallToolRequestParams]
    ) -> tuple[ResolvedTool, str | None]:
        """Return, once the call may run, the tool that will run and the token of its approval if it has one."""
        try:
            return await self._judge(record, context)
        except (ToolError, CallPendingError) as refusal:
            record.explain("refused", str(refusal))
            raise
        except (NotFoundError, DisabledError):
            record.refused("unknown_tool", "There is no such tool.")
            raise
        except (InvalidApiKeyError, ApprovalError) as exc:
            record.refused("invalid_api_key" if isinstance(exc, InvalidApiKeyError) else "not_approved", str(exc))
            raise ToolError(str(exc)) from exc
        except GatewayStoreError as exc:
            _logger.error("%s: %s", type(exc).__name__, exc)
            record.refused("store_unavailable", AWAY)
            raise ToolError(AWAY) from exc
        except Exception as exc:
            # Not the text of an error, which may hold what a callback received: raw arguments.
            _logger.error("Request %s: %s", record.request_id, exc if isinstance(exc, CallbackError) else failure(exc))
            record.refused("failure", BROKEN)
            raise ToolError(BROKEN) from None
        except BaseException:
            if not record.is_left:
                record.refused("cancelled", "The call was cancelled before it ran.")
            raise

    async def _judge(
        self, record: CallRecord, context: MiddlewareContext[CallToolRequestParams]
    ) -> tuple[ResolvedTool, str | None]:
        server = await self._name(context)
        record.call = record.call.model_copy(update={"server": server})
        record.caller = caller = await self._caller(context)
        resolved = await self._resolve(context, context.message, server)
        record.call = resolved.call
        record.shown = await self._shown(record.call)
        verdict: Verdict = await call_back("policy", self._policy, caller, _copy(record.call), returns=Verdict)
        record.verdict, record.rule, record.reason = verdict, verdict.rule, verdict.reason
        if verdict.decision == Decision.APPROVAL_REQUIRED:
            approvals, required = self._store.for_org(caller.org_id).approvals, verdict.required_approvals
            before_use = partial(self._require_unchanged, record, resolved, context, server)
            if self._waits:
                timeout_s = self._approval_timeout_s
                token = await ask(
                    approvals, record, caller, required=required, timeout_s=timeout_s, before_use=before_use
                )
                return resolved, token
            wait_s = self._approval_wait_s
            bind = resolved.schema_hash
            await acquire(approvals, record, caller, required=required, bind=bind, wait_s=wait_s, before_use=before_use)
            return resolved, None
        if verdict.decision != Decision.ALLOW:
            raise ToolError(verdict.reason)
        self._store.database.check_owner()
        if self._store.settings.audit_mode == "strict":
            await self._store.ping()
        record.decision = Decision.ALLOW
        return resolved, None

    async def _caller(self, context: MiddlewareContext[Any]) -> CallerIdentity:
        caller: CallerIdentity = await call_back("identify", self._identify, context, returns=CallerIdentity)
        return caller

    async def _name(self, context: MiddlewareContext[Any]) -> str:
        if callable(self._server):
            return str(await call_back("server", self._server, context, returns=str))
        return _own_name(context) if self._server is None else self._server

    async def _resolve(
        self, context: MiddlewareContext[Any], message: CallToolRequestParams, server: str
    ) -> ResolvedTool:
        if context.fastmcp_context is None:
            raise RuntimeError("FastMCP gave no context, so the tool that would run cannot be determined.")
        with unpinned():
            return await resolve(context.fastmcp_context, message, server=server)

    async def _require_unchanged(
        self, record: CallRecord, resolved: ResolvedTool, context: MiddlewareContext[Any], server: str
    ) -> None:
        record.decision = Decision.DENY
        if await self._caller(context) != record.caller:
            raise ToolError(_OTHER_CALLER)
        try:
            now = await self._resolve(context, resolved.message, server)
            is_same = (now.call, now.code) == (resolved.call, resolved.code)
        except (NotFoundError, DisabledError, ToolError):
            is_same = False
        if not is_same:
            raise ToolError(_REPLACED)
        record.decision = Decision.APPROVAL_REQUIRED

    async def _shown(self, call: ToolCall) -> dict[str, Any]:
        shown = dict(await call_back("sanitize", self._sanitize, _copy(call), returns=Mapping))
        for name in RESERVED & call.arguments.keys():
            shown.setdefault(name, HIDDEN)
        if VERSION in call.arguments:
            # No secret, since callers choose it among the versions of the tool; and approvers need it.
            shown[VERSION] = call.arguments[VERSION]
        return shown

    async def _run(
        self,
        record: CallRecord,
        resolved: ResolvedTool,
        token: str | None,
        context: MiddlewareContext[CallToolRequestParams],
        call_next: CallNext[CallToolRequestParams, ToolResult],
    ) -> ToolResult:
        assert record.caller is not None  # noqa: S101  `_judge` has set it
        org_id, approval_id, is_end_known = record.caller.org_id, record.approval_id, True
        start = CallStart()
        record.was_run = True
        try:
            with pinned(resolved.hops, once=approval_id is not None) as pins, running(record.request_id, org_id):
                result = await call_next(context.copy(message=resolved.message))
            # An extension may answer for a tool that goes on in the background; how that ends is not known here.
            is_end_known = isinstance(result, ToolResult)
            if is_end_known:
                record.execution_status = ExecutionStatus.TOOL_ERROR if result.is_error else ExecutionStatus.SUCCESS
                record.output_hash = self._store.hash_args(result.model_dump(mode="json", exclude={"meta"}))
        except BaseException as exc:
            # Once the tool has begun, an error of these classes comes from a call that it made itself.
            if isinstance(exc, CallChangedError) and not pins.has_begun:
                record.refused("changed", str(exc))
            elif isinstance(exc, NotFoundError | DisabledError) and not pins.has_begun:
                record.refused("unknown_tool", "There is no such tool.")
            else:
                record.execution_status = start.status_of(exc)
            raise
        finally:
            if approval_id is not None and is_end_known:
                approvals = self._store.for_org(org_id).approvals
                await note_outcome(approvals, record, token=token, approval_id=approval_id)
        return result

    async def _write(self, record: CallRecord) -> None:
        # A host's own identity may name no organisation; the call may have run all the same.
        org_id = record.caller.org_id if record.caller is not None else ""
        store = self._store.for_org(org_id) if org_id else self._store
        try:
            event = record.event(store)
            write = store.audit.event_writer.write_ended if record.was_run else store.audit.write
            await write(event)
        except GatewayStoreError as exc:
            _logger.error("Request %s: %s: %s", record.request_id, type(exc).__name__, exc)
            raise ToolError(_WITHHELD if record.was_run else AWAY) from exc


def _copy(call: ToolCall) -> ToolCall:
    """Return a copy for a callback, which may change it; the call that runs stays the call that was hashed."""
    return call.model_copy(deep=True)


def _own_name(context: MiddlewareContext[Any]) -> str:
    return context.fastmcp_context.fastmcp.name if context.fastmcp_context is not None else "unknown"
