"""What the gateway adds to a call: FastMCP's middleware beside the same proxy alone, `acquire` beside a token."""

from __future__ import annotations

import statistics
import time
from typing import Any
from uuid import uuid4

from fastmcp import Client, FastMCP
from fastmcp.server import create_proxy

from agent_gateway_store import (
    ApprovalRequest,
    CallerIdentity,
    Decision,
    GatewayStore,
    StoreSettings,
    ToolCall,
    TrustLevel,
)
from agent_gateway_store.integrations.fastmcp import GatewayMiddleware, Verdict
from benchmarks.approvals import CALLERS, Work, in_turns
from benchmarks.report import Figure

# The goals of the project: what may be added to the median of an allowed call, and of CPU in the gateway's process.
ADDED_MS, ADDED_CPU_MS = 3.0, 1.0
CALLER = CallerIdentity(caller_id="agent-1", role="developer", trust_level=TrustLevel.MEDIUM, environment="bench")
_ALLOWED = Verdict(decision=Decision.ALLOW, rule="reads", reason="Reads are allowed.")


async def measure(url: str, redis_url: str, *, repeat: int, scale: float) -> list[Figure]:
    """Measure on PostgreSQL and Redis; each side in turn with the other."""
    added = Figure("FastMCP middleware, allowed call, added", "ms", "3 ms", 1, more_is_better=False)
    cpu = Figure("FastMCP middleware, allowed call, added CPU", "ms", "1 ms", 1, more_is_better=False)
    acquired = Figure(f"acquire of an approved call, {CALLERS} callers", "calls/s", "consume_token", 0.67)
    settings = StoreSettings(approval_max_pending=1_000_000)
    async with GatewayStore(url, redis_url=redis_url, settings=settings, auto_migrate=True) as store:
        for _ in range(repeat):
            await _middleware(store, added, cpu, max(20, int(600 * scale)))
            await _acquire(store, acquired, max(CALLERS, int(1_000 * scale)))
    return [added, cpu, acquired]


def _proxy(*middleware: Any) -> FastMCP[Any]:
    backend: FastMCP[Any] = FastMCP("files")

    @backend.tool
    async def read_file(path: str) -> str:
        return path

    server: FastMCP[Any] = FastMCP("gateway", middleware=list(middleware))
    server.mount(create_proxy(backend, name="files"))
    return server


async def _middleware(store: GatewayStore, added: Figure, cpu: Figure, count: int) -> None:
    gateway = GatewayMiddleware(store, lambda _caller, _call: _ALLOWED, identify=lambda _context: CALLER)
    seconds: list[list[float]] = [[], []]
    used: list[list[float]] = [[], []]
    async with Client(_proxy(gateway)) as ours, Client(_proxy()) as bare:
        # Ten calls of each warm imports, statements and connections.
        for turn in range(count + 10):
            for side, client in enumerate((ours, bare)):
                start, before = time.perf_counter(), time.process_time()
                await client.call_tool("read_file", {"path": f"/srv/{turn}"})
                if turn >= 10:
                    seconds[side].append(time.perf_counter() - start)
                    used[side].append(time.process_time() - before)
    for figure, samples, goal in ((added, seconds, ADDED_MS), (cpu, used, ADDED_CPU_MS)):
        with_it, without = (statistics.median(side) * 1000 for side in samples)
        figure.facts = {"calls": count, "ms with it": with_it, "ms without": without}
        figure.ours.append(with_it - without)
        figure.limit.append(goal)


async def _acquire(store: GatewayStore, figure: Figure, count: int) -> None:
    approvals = store.approvals

    def ask(number: int) -> ApprovalRequest:
        call = ToolCall(server="files", tool="delete_file", arguments={"path": f"/srv/{number}"})
        caller = f"agent-{number % 100}-{run}"
        return ApprovalRequest(request_id=uuid4().hex, caller_id=caller, tool_call=call, risk_explanation="deletes")

    run = uuid4().hex
    requests = [ask(number) for number in range(count)]
    tokens = []
    for request in requests:
        asked = await approvals.acquire(request)
        await approvals.approve(approval_id=asked.approval_id, approver_id="alice")
        token = await approvals.issue_token(copy := request.model_copy(update={"request_id": uuid4().hex}))
        await approvals.approve(token, "alice")
        tokens.append((token, copy))

    async def acquire(request: ApprovalRequest) -> None:
        assert (await approvals.acquire(request)).status == "USED"

    async def consume(named: tuple[str, ApprovalRequest]) -> None:
        await approvals.consume_token(named[0], caller_id=named[1].caller_id, tool_call=named[1].tool_call)

    ours: Work = (acquire, requests)
    await in_turns(figure, ours, (consume, tokens), CALLERS)
