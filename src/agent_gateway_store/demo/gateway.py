"""The gateway of the demo: decides about each tool call, asks for approval, runs the tool, audits it.

Its tools work on real files of one folder. For dashboards it can be given a load: its calls at a given rate for a given
time, with its figures sent by OTLP.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any
from uuid import uuid4

from pydantic import SecretStr

from agent_gateway_store._concurrency import BackgroundTasks
from agent_gateway_store.errors import (
    ApiKeyExistsError,
    ApprovalAlreadyUsedError,
    InvalidApiKeyError,
    StoreUnavailableError,
)
from agent_gateway_store.models.approval import ApprovalRequest, ApprovalResult
from agent_gateway_store.models.audit import AuditEvent, Decision, ExecutionStatus, RedactionFlag
from agent_gateway_store.models.keys import CallerIdentity, TrustLevel
from agent_gateway_store.models.values import ApprovalStatus, ToolCall
from agent_gateway_store.store import GatewayStore

SERVER = "files"
FILES = {
    "customers.csv": "id,name\n1,Ada\n2,Grace\n",
    "notes.txt": "Delete the old export, keep the customers.\n",
    "old-export.csv": "id,name\n1,Ada\n",
}
_SECRETS = ("password", "secret", "token", "access_code")
_MASK = "***"
APPROVER = "alice"
# Seconds. The approver below decides within 50 milliseconds; more than this means that something is broken.
_PATIENCE_S = 5.0
_RULES = {
    "list_files": ("allow-reading", Decision.ALLOW, 0.0),
    "read_file": ("allow-reading", Decision.ALLOW, 0.1),
    "hash_file": ("allow-reading", Decision.ALLOW, 0.0),
    "delete_file": ("ask-before-deleting", Decision.APPROVAL_REQUIRED, 0.8),
}
INSTALL = (
    "No figures leave this process: run `pip install 'agent-gateway-store[otel]' opentelemetry-sdk "
    "opentelemetry-exporter-otlp-proto-http`, and set OTEL_EXPORTER_OTLP_ENDPOINT where the collector is not on this "
    "machine."
)
# Chosen: of a store that cannot keep up calls are left out rather than heaped up.
_MOST_UNDER_WAY = 50
# Chosen: a dashboard shows the first figures within seconds.
_EXPORT_MS = 5_000
_READING = (
    {"tool": "list_files"},
    {"tool": "read_file", "name": "notes.txt"},
    {"tool": "hash_file", "name": "notes.txt"},
)


class Toolbox:
    """Tools on the files of `folder`, which is filled with three files first: its methods, by their names."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        for name, content in FILES.items():
            (folder / name).write_text(content, encoding="utf-8")

    def list_files(self) -> list[str]:
        return sorted(path.name for path in self.folder.iterdir())

    def read_file(self, name: str, access_code: str | None = None) -> str:
        return self._path(name).read_text(encoding="utf-8")

    def hash_file(self, name: str) -> str:
        return hashlib.sha256(self._path(name).read_bytes()).hexdigest()

    def delete_file(self, name: str) -> str:
        self._path(name).unlink()
        return f"deleted {name}"

    def _path(self, name: str) -> Path:
        path = (self.folder / name).resolve()
        if path.parent != self.folder.resolve():
            raise PermissionError("outside the folder")
        return path


def _sanitise(arguments: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Return the arguments that may be stored, and the names of those that were masked."""
    masked = [name for name in arguments if name in _SECRETS]
    return {name: _MASK if name in masked else value for name, value in arguments.items()}, masked


@dataclass
class Gateway:
    """Runs the tool calls of one caller; `decisions` are the approver's, by the tool's argument `name`."""

    store: GatewayStore
    key: SecretStr
    caller: CallerIdentity
    tools: Toolbox
    session_id: str = field(default_factory=lambda: uuid4().hex[:12])
    decisions: dict[str, ApprovalResult] = field(default_factory=dict)
    replay_refused: bool = False

    async def call(self, tool: str, **arguments: Any) -> Any:
        """Decide about a tool call, run it if it is allowed, and audit it in either case."""
        started = time.perf_counter()
        request_id = f"{self.session_id}-{uuid4().hex[:8]}"
        rule, decision, risk = _RULES[tool]
        event, output = self._event(request_id, tool, arguments), None
        event |= {"matched_policy_rule": rule, "risk_score": risk, "decision": decision}
        event["deterministic_rationale"] = f"{tool} falls under the rule {rule}"
        answer, token = None, ""
        if decision is Decision.APPROVAL_REQUIRED:
            answer, token = await self._ask(request_id, tool, arguments)
            event["approver_id"] = answer.approver_id
        if answer is not None and answer.status is not ApprovalStatus.APPROVED:
            reason = answer.note or f"the approval is {answer.status}"
            event |= {"decision": Decision.DENY, "deterministic_rationale": reason}
        else:
            output, status = await self._run(tool, arguments, token)
            output_hash = hashlib.sha256(json.dumps(output).encode()).hexdigest()
            event |= {"execution_status": status, "output_hash": output_hash}
        event["latency_ms"] = (time.perf_counter() - started) * 1000
        if await self.store.audit.write(AuditEvent(**event)) != "STORED":
            raise StoreUnavailableError("The demo's audit event was not stored: check the database.")
        return output

    async def _ask(self, request_id: str, tool: str, arguments: Mapping[str, Any]) -> tuple[ApprovalResult, str]:
        raw = ToolCall(server=SERVER, tool=tool, arguments=dict(arguments))
        request = ApprovalRequest(
            request_id=request_id,
            caller_id=self.caller.caller_id,
            tool_call=raw.model_copy(update={"arguments": _sanitise(arguments)[0]}),
            risk_explanation="A deleted file cannot be brought back.",
        )
        token = await self.store.approvals.issue_token(request, call=raw)
        answer = await self.store.approvals.wait_for_decision(token, timeout_s=_PATIENCE_S)
        self.decisions[str(arguments.get("name"))] = answer
        return answer, token

    async def _run(self, tool: str, arguments: Mapping[str, Any], token: str) -> tuple[Any, ExecutionStatus]:
        call = ToolCall(server=SERVER, tool=tool, arguments=dict(arguments))
        if token:
            await self.store.approvals.consume_token(token, caller_id=self.caller.caller_id, tool_call=call)
        try:
            output, status = await asyncio.to_thread(getattr(self.tools, tool), **arguments), ExecutionStatus.SUCCESS
        except OSError as exc:
            output, status = type(exc).__name__, ExecutionStatus.TOOL_ERROR
        if token:
            await self.store.approvals.record_outcome(token, str(status))
            await self._replay(token, call)
        return output, status

    async def _replay(self, token: str, call: ToolCall) -> None:
        try:
            await self.store.approvals.consume_token(token, caller_id=self.caller.caller_id, tool_call=call)
        except ApprovalAlreadyUsedError:
            self.replay_refused = True

    def _event(self, request_id: str, tool: str, arguments: Mapping[str, Any]) -> dict[str, Any]:
        kept, masked = _sanitise(arguments)
        return {
            "request_id": request_id,
            "session_id": self.session_id,
            "caller_id": self.caller.caller_id,
            "caller_role": self.caller.role,
            "key_id": self.caller.key_id,
            "environment": self.caller.environment,
            "policy_version": "demo",
            "mcp_server": SERVER,
            "tool_name": tool,
            "raw_args_hash": self.store.hash_args(arguments),
            "sanitized_args": kept,
            "redaction_flags": [RedactionFlag(field=f"sanitized_args.{name}", reason="SECRET") for name in masked],
            "risk_labels": ["DESTRUCTIVE"] if tool == "delete_file" else [],
        }


async def _decide(store: GatewayStore, session_id: str) -> None:
    """Play a human until cancelled: of what waits in a session old exports may be deleted, and nothing else."""
    while True:
        for request in await store.approvals.list_requests(ApprovalStatus.PENDING):
            if not request.request_id.startswith(session_id):
                continue
            name = request.tool_call.arguments.get("name", "")
            if name.startswith("old-"):
                decide, note = store.approvals.approve, "an old export"
            else:
                decide, note = store.approvals.deny, f"{name} is still needed"
            await decide(approver_id=APPROVER, note=note, approval_id=request.approval_id, channel="demo")
        # Short beside the patience of the gateway, so that the demo takes about a second.
        await asyncio.sleep(0.05)


@asynccontextmanager
async def at_work(store: GatewayStore, caller_id: str) -> AsyncIterator[Gateway]:
    """Give the gateway of a caller, with files of its own and an approver who decides meanwhile."""
    key = await new_key(store, caller_id, role="developer", trust_level=TrustLevel.MEDIUM, environment="demo")
    with tempfile.TemporaryDirectory(prefix="gateway-demo-") as folder:
        gateway = Gateway(store, key, await store.keys.verify(key), Toolbox(Path(folder)))
        approving = asyncio.create_task(_decide(store, gateway.session_id))
        try:
            yield gateway
        finally:
            approving.cancel()
            with suppress(asyncio.CancelledError):
                await approving


async def new_key(store: GatewayStore, caller_id: str, **options: Any) -> SecretStr:
    """Return a new key of a caller, whose key of an earlier run ends with it; `options` are those of `keys.issue`."""
    try:
        return (await store.keys.issue(caller_id, **options)).plaintext
    except ApiKeyExistsError:
        return (await store.keys.rotate(caller_id, timedelta())).plaintext


def export_figures() -> Callable[[], None] | None:
    """Send spans and metrics as the SDK's variables say; return what sends the last of them, None without the SDK."""
    try:
        from opentelemetry import metrics, trace
        from opentelemetry.exporter.otlp.proto.http.metric_exporter import OTLPMetricExporter
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.metrics import MeterProvider
        from opentelemetry.sdk.metrics.export import PeriodicExportingMetricReader
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ImportError:
        return None
    traces = TracerProvider()
    traces.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
    meters = MeterProvider([PeriodicExportingMetricReader(OTLPMetricExporter(), export_interval_millis=_EXPORT_MS)])
    trace.set_tracer_provider(traces)
    metrics.set_meter_provider(meters)

    def end() -> None:
        meters.shutdown()
        traces.shutdown()

    return end


async def load(store: GatewayStore, caller_id: str, *, seconds: float, rate: float) -> dict[str, Any]:
    """Make `rate` calls a second for `seconds` seconds; return how many were made, failed, and were left out."""
    under_way = BackgroundTasks()
    counts = {"calls": 0, "failed": 0, "left_out": 0}
    loop = asyncio.get_running_loop()

    def end(task: asyncio.Task[None]) -> None:
        counts["failed"] += not task.cancelled() and task.exception() is not None

    async with at_work(store, caller_id) as gateway:
        begun_at = loop.time()
        for number in range(round(seconds * rate)):
            await asyncio.sleep(begun_at + number / rate - loop.time())
            if loop.time() - begun_at >= seconds:
                break
            if len(under_way) >= _MOST_UNDER_WAY:
                counts["left_out"] += 1
                continue
            counts["calls"] += 1
            under_way.start(_call(gateway, number)).add_done_callback(end)
        await under_way.join()
        # The callbacks of the last ones.
        await asyncio.sleep(0)
    return {**counts, "seconds": round(loop.time() - begun_at, 3)}


async def _call(gateway: Gateway, number: int) -> None:
    """Make one call: in twenty one that is approved, one that is denied, and one with a wrong key."""
    await gateway.store.keys.verify(gateway.key)
    match number % 20:
        case 5:
            name = f"old-{number}.csv"
            (gateway.tools.folder / name).touch()
            await gateway.call("delete_file", name=name)
        case 10:
            await gateway.call("delete_file", name="customers.csv")
        case 15:
            with suppress(InvalidApiKeyError):
                await gateway.store.keys.verify("agw_wrong")
        case _:
            await gateway.call(**_READING[number % len(_READING)])
