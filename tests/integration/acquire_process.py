"""Gateways that die in the middle of a call: `python -m integration.acquire_process`, with a line of JSON for each.

Each line is worked by a process of its own, forked from this one, which has imported everything and opened nothing. It
is killed by SIGKILL before its n-th statement, or at a named point; this one answers with the exit code.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

from agent_gateway_store import (
    ApprovalRequest,
    ApprovalStatus,
    CallerIdentity,
    Decision,
    GatewayStore,
    StoreSettings,
    ToolCall,
    TrustLevel,
    clock,
)
from agent_gateway_store.errors import ApprovalError
from contract.sealing_process import Countdown, fork, wait


async def run(store: GatewayStore, told: dict[str, Any], countdown: Countdown) -> None:
    """Acquire a call; where it may go, run it, with its intent before and its outcome after."""
    request, call = ApprovalRequest(**told["request"]), ToolCall(**told["call"])
    acquired = await store.approvals.acquire(request, call=call, bind=told["bind"])
    if acquired.status is not ApprovalStatus.USED:
        return
    reach("used", told, countdown)
    caller = CallerIdentity(
        caller_id=request.caller_id, role="developer", trust_level=TrustLevel.MEDIUM, environment="test"
    )
    recording = store.audit.call(
        call, caller, decision=Decision.APPROVAL_REQUIRED, approval_id=acquired.approval_id, intent=True
    )
    async with recording:
        with Path(told["ran"]).open("a") as ran:
            ran.write(f"{acquired.approval_id}\n")
        reach("ran", told, countdown)
    reach("recorded", told, countdown)
    await store.approvals.record_outcome(approval_id=acquired.approval_id, outcome="SUCCESS")


async def decide(store: GatewayStore, told: dict[str, Any], _countdown: Countdown) -> None:
    """Vote; a refusal changes nothing."""
    try:
        await getattr(store.approvals, told["move"])(approval_id=told["approval_id"], approver_id=told["who"])
    except ApprovalError:
        return


def reach(point: str, told: dict[str, Any], countdown: Countdown) -> None:
    if told["at"] == point:
        os.kill(os.getpid(), signal.SIGKILL)
    countdown.step(object())


def main() -> None:
    print("open", flush=True)
    for line in sys.stdin:
        told = json.loads(line)

        async def work(url: str, _number: int, told: dict[str, Any] = told) -> None:
            clock.move(timedelta(seconds=told["moved_s"]))
            settings = StoreSettings(**told["settings"], audit_seal_seconds=0)
            countdown, store = Countdown(), GatewayStore(url, redis_url=told["redis_url"], settings=settings)
            countdown.watch(store)
            async with store:
                countdown.left = told["at"] if isinstance(told["at"], int) else -1
                await (run if "request" in told else decide)(store, told, countdown)
                countdown.left = -1

        print(wait(fork(work, told["url"], 0)), flush=True)


if __name__ == "__main__":
    main()
