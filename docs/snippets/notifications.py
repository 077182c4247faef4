"""How-to: notifications."""

import asyncio
import logging
from datetime import timedelta
from uuid import uuid4

from agent_gateway_store import ApprovalRequest, GatewayStore, Notice, ToolCall, errors

logging.getLogger("agent_gateway_store.hooks").setLevel(logging.CRITICAL)


class Pager:
    """Takes nothing at first."""

    name = "pager"

    def __init__(self) -> None:
        self.is_gone = True
        self.taken: list[Notice] = []

    async def notify_pending(self, notice: Notice) -> None:
        if self.is_gone:
            raise errors.NotDeliveredError("no such pager", is_permanent=True)
        self.taken.append(notice)

    async def notify_decision(self, notice: Notice) -> None:
        await self.notify_pending(notice)


async def look(store: GatewayStore) -> None:
    # --8<-- [start:look]
    for delivery in await store.notifications.list("DEAD"):
        print(delivery.notifier, delivery.event, delivery.attempts, delivery.last_error)

    for row in await store.notifications.counts():
        print(row["notifier"], row["waiting"], row["due"], row["dead"], row["is_loaded"])
    # --8<-- [end:look]

    # --8<-- [start:redrive]
    count = await store.notifications.redrive(notifier="pager")
    # --8<-- [end:redrive]
    assert count == 1

    # --8<-- [start:run]
    arrived = await store.notifications.run(once=True)
    # --8<-- [end:run]
    print(f"{arrived} arrived")

    # --8<-- [start:prune]
    await store.notifications.prune(older_than=timedelta(days=30))
    # --8<-- [end:prune]


async def main() -> None:
    pager = Pager()
    async with GatewayStore(plugins=[pager]) as store:
        call = ToolCall(server="files", tool="delete_file", arguments={"path": "old.log"})
        request = ApprovalRequest(
            request_id=uuid4().hex, caller_id="dev-agent", tool_call=call, risk_explanation="Deletes a file for good."
        )
        await store.approvals.issue_token(request)
        while not await store.notifications.list("DEAD", notifier="pager"):
            await asyncio.sleep(0.01)
        pager.is_gone = False
        await look(store)
        while not await store.notifications.list("DELIVERED", notifier="pager"):
            await asyncio.sleep(0.01)
    assert [notice.approval_id for notice in pager.taken] == [request.approval_id]


asyncio.run(main())
