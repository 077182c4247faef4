"""The public API as a type checker sees it. mypy reads this file in strict mode; nobody runs it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from contextlib import aclosing, closing
from datetime import timedelta
from typing import Any, assert_type
from uuid import UUID

from pydantic import SecretStr
from sqlalchemy.ext.asyncio import AsyncSession

from agent_gateway_store import (
    ApiKey,
    ApprovalManager,
    ApprovalNotifier,
    ApprovalRequest,
    ApprovalResult,
    ApprovalScope,
    ApprovalStatus,
    AuditEvent,
    AuditLogger,
    AuditQuery,
    CallerIdentity,
    Decision,
    GatewayStore,
    IssuedKey,
    Notice,
    Page,
    StoreSettings,
    SyncGatewayStore,
    ToolCall,
    TrustLevel,
    WriteOutcome,
    errors,
    hookimpl,
)
from agent_gateway_store.hooks.specs import Notifier
from agent_gateway_store.models.values import PendingApproval
from agent_gateway_store.plugins.apprise import AppriseNotifier
from agent_gateway_store.plugins.slack import SlackCallback, SlackNotifier, SlackReply
from agent_gateway_store.plugins.webhook import Received, WebhookNotifier, WebhookReceiver, WebhookSettings
from agent_gateway_store.results import Stats
from agent_gateway_store.storage.cache import get_json, get_redis, set_json
from agent_gateway_store.storage.database import get_db
from agent_gateway_store.testing import MovableClock, RecordingNotifier, make_notice


async def asynchronous(event: AuditEvent, request: ApprovalRequest, session: AsyncSession) -> None:
    async with GatewayStore("sqlite:///gateway.db", redis_url="", settings=StoreSettings(), plugins=[]) as store:
        assert_type(store, GatewayStore)
        assert_type(store.for_org("acme"), GatewayStore)

        issued = await store.keys.issue("dev-agent", role="developer", trust_level=TrustLevel.MEDIUM)
        assert_type(issued, IssuedKey)
        assert_type(issued.plaintext, SecretStr)
        assert_type(await store.keys.verify(issued.plaintext), CallerIdentity)
        assert_type(await store.keys.rotate("dev-agent", overlap=timedelta(hours=1)), IssuedKey)
        assert_type(await store.keys.list(), Page[ApiKey])

        assert_type(await store.audit.write(event), WriteOutcome)
        assert_type(await store.audit.write_many([event]), Counter[WriteOutcome])
        assert_type(await store.audit.record(event, session=session), WriteOutcome)
        assert_type(await store.audit.get(1), AuditEvent | None)
        assert_type(await store.audit.get_by_request_id("r"), AuditEvent | None)
        page = await store.audit.list_by_decision(Decision.DENY, limit=5)
        assert_type(page, Page[AuditEvent])
        assert_type(page[0].decision, Decision)
        assert_type(page.next_cursor, str | None)

        call = ToolCall(server="files", tool="delete", arguments={"path": "/tmp/x"})
        token = await store.approvals.issue_token(request, call=call)
        assert_type(token, str)
        result = await store.approvals.approve(token, approver_id="approver-1", note="ok")
        assert_type(result, ApprovalResult)
        assert_type(result.status, ApprovalStatus)
        assert_type(result.approval_id, UUID)
        await store.approvals.deny(approval_id=result.approval_id, approver_id="approver-2")
        assert_type(await store.approvals.consume_token(token, caller_id="dev-agent", tool_call=call), ApprovalResult)
        scope = ApprovalScope.OUTPUT_RELEASE
        await store.approvals.consume_token(token, caller_id="dev-agent", tool_call=call, scope=scope)
        assert_type(await store.approvals.release_output(token, caller_id="dev-agent"), Any)
        assert_type(await store.approvals.list_requests(status="PENDING"), Page[ApprovalRequest])
        assert_type(await store.approvals.expire_stale(), int)


async def standing_alone(event: AuditEvent, request: ApprovalRequest) -> None:
    async for session in get_db():
        assert_type(await AuditLogger(session).write(event), WriteOutcome)
        assert_type(await AuditQuery(session).list_recent(limit=3), Page[AuditEvent])
        async for client in get_redis():
            manager = ApprovalManager(session, client)
            assert_type(await manager.issue_token(request), str)
            if client is not None:
                await set_json(client, "key", {"a": 1}, ttl=60)
                await get_json(client, "key")
    await ApprovalNotifier().notify_pending(request)


def blocking(event: AuditEvent, request: ApprovalRequest, call: ToolCall) -> None:
    with SyncGatewayStore("sqlite:///gateway.db", auto_migrate=True) as store:
        assert_type(store, SyncGatewayStore)
        assert_type(store.for_org("acme"), SyncGatewayStore)
        assert_type(store.settings, StoreSettings)
        assert_type(store.audit.write(event), WriteOutcome)
        assert_type(store.audit.list_by_caller("dev-agent", limit=5, offset=5), Page[AuditEvent])
        assert_type(store.keys.issue("dev-agent", role="developer"), IssuedKey)
        token = store.approvals.issue_token(request)
        assert_type(token, str)
        assert_type(store.approvals.wait_for_decision(token, timeout_s=1), ApprovalResult)
        assert_type(store.approvals.consume_token(token, caller_id="dev-agent", tool_call=call), ApprovalResult)
        assert_type(store.approvals.release_output(token, caller_id="dev-agent"), Any)
        store.migrate()
    try:
        store.open().close()
    except errors.ApprovalAlreadyDecidedError as error:
        assert_type(error.approver_id, str | None)


async def kit(notifier: RecordingNotifier, clock: MovableClock) -> None:
    told: Notifier = notifier
    await told.notify_pending(make_notice())
    assert_type(await notifier.wait_for(2, event="pending"), list[Notice])
    clock.move(timedelta(hours=1))


async def bundled(store: GatewayStore, body: bytes, headers: Mapping[str, str]) -> None:
    endpoint = WebhookSettings().receivers["webhook"]
    notifiers: list[Notifier] = [AppriseNotifier(), SlackNotifier(), WebhookNotifier(endpoint)]
    assert_type(await SlackCallback(store.approvals, store.plugins).handle(body, headers), SlackReply)
    assert_type(WebhookReceiver(["whsec_"]).verify(body, headers), Received | None)
    assert_type(await notifiers[0].notify_decision(make_notice("decision")), None)


@hookimpl
def gateway_store_veto_decision(request: PendingApproval, decision: str) -> str | None:
    return f"not {request.tool_call.tool}" if decision == "APPROVED" else None


async def queries(store: GatewayStore, twin: SyncGatewayStore) -> None:
    assert_type(await store.audit.search(caller_id="a", decision=["DENY"], since="24h"), Page[AuditEvent])
    assert_type(await store.audit.stats("caller_id", bucket="1h"), Stats)
    async for event in store.audit.follow(tool_name="t"):
        assert_type(event, AuditEvent)
    for event in twin.audit.stream(min_risk_score=0.5):
        assert_type(event, AuditEvent)
    async with aclosing(store.audit.stream()) as events:
        assert_type(await anext(events), AuditEvent)
    with closing(twin.audit.follow()) as followed:
        assert_type(next(followed), AuditEvent)
    page = await store.audit.changes()
    assert_type(await store.audit.changes(page.next_cursor), Page[AuditEvent])
    assert_type((await store.audit.export("events.jsonl")).rows, int)
    assert_type(await store.approvals.history("id"), Page[dict[str, Any]])
    await store.audit.search(callerid="a")  # type: ignore[call-arg]
    await store.approvals.search(status=5)  # type: ignore[arg-type]


def wrong_uses_are_found(store: SyncGatewayStore, event: AuditEvent) -> None:
    store.audit.write("event")  # type: ignore[arg-type]
    store.audit.write(event, event)  # type: ignore[call-arg]
    store.keys.issue("dev-agent")  # type: ignore[call-arg]
    store.approvals.no_such_method()  # type: ignore[attr-defined]
