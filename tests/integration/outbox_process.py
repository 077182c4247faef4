"""A gateway's process that asks for approvals and dies, or a worker's that sends what is due. Run by the proofs.

`die URL FILE MOMENT` asks until it kills itself with SIGKILL: `committed`, before the notice of a committed approval is
sent; `sending`, in the notifier before it told anybody; `sent`, in the notifier just after. `work URL FILE` sends what
is due and ends. Each notice that arrives is a line of FILE: delivery id, approval id, event.
"""

from __future__ import annotations

import asyncio
import os
import random
import signal
import sys
from pathlib import Path
from uuid import uuid4

from agent_gateway_store import ApprovalRequest, GatewayStore, Notice, StoreSettings, ToolCall
from agent_gateway_store.delivery import DeliveryWorker


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


class File:
    """Appends what it is told to a file; with a moment it kills its process at one of the next notices."""

    name = "file"

    def __init__(self, path: str | Path, moment: str = "") -> None:
        self.path, self.moment = path, moment
        self.left = random.randrange(1, 8)

    async def notify_pending(self, notice: Notice) -> None:
        self.left -= 1
        if self.moment == "sending" and self.left <= 0:
            die()
        with open(self.path, "a") as file:  # noqa: PTH123
            file.write(f"{notice.delivery_id} {notice.approval_id} {notice.event}\n")
        if self.moment == "sent" and self.left <= 0:
            die()

    async def notify_decision(self, notice: Notice) -> None:
        await self.notify_pending(notice)


async def ask_and_die(url: str, path: str, moment: str) -> None:
    post = File(path, moment)
    if moment == "committed":
        send = DeliveryWorker.send

        def dying(self: DeliveryWorker, notice: Notice, leased: object) -> None:
            post.left -= 1
            if post.left <= 0:
                die()
            send(self, notice, leased)  # type: ignore[arg-type]

        DeliveryWorker.send = dying  # type: ignore[method-assign,assignment]
    async with GatewayStore(url, redis_url="", plugins=[post]) as store:
        while True:
            request = ApprovalRequest(
                request_id=uuid4().hex,
                caller_id="agent",
                tool_call=ToolCall(server="files", tool="delete"),
                risk_explanation="gone for good",
            )
            token = await store.approvals.issue_token(request)
            await store.approvals.approve(token, "alice")
            await asyncio.sleep(0.01)


async def work(url: str, path: str) -> None:
    settings = StoreSettings(notification_worker=False)
    async with GatewayStore(url, redis_url="", plugins=[File(path)], settings=settings) as store:
        print("open", flush=True)
        await asyncio.to_thread(sys.stdin.readline)
        print(await store.notifications.run(once=True), flush=True)


if __name__ == "__main__":
    os.environ["AGENT_GATEWAY_STORE_LOAD_PLUGINS"] = ""
    job, *arguments = sys.argv[1:]
    asyncio.run({"die": ask_and_die, "work": work}[job](*arguments))
