"""Notify the notifiers about approvals."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from uuid import uuid4

from agent_gateway_store.approval.outbox_rows import notice_of
from agent_gateway_store.hooks.dispatch import DeliveryReport, Dispatcher
from agent_gateway_store.hooks.manager import Plugins
from agent_gateway_store.models.approval import ApprovalRequest, ApprovalResult
from agent_gateway_store.models.values import Notice, ToolCall
from agent_gateway_store.settings import StoreSettings


class ApprovalNotifier:
    """Hands notices to every notifier and event hook, each on its own, each within PLUGIN_TIMEOUT_SECONDS.

    Nothing here raises because of a plugin; the reports say what went wrong.

    Args:
        plugins: Plugins or notifiers, beside those that are installed.
        settings: Default: from the environment.
    """

    def __init__(self, *, plugins: Iterable[object] = (), settings: StoreSettings | None = None) -> None:
        self._dispatcher = Dispatcher(Plugins(plugins), settings or StoreSettings())

    async def notify_pending(self, request: ApprovalRequest) -> list[DeliveryReport]:
        """Send the notice that `request` waits for a decision. Returns one report per notifier."""
        return await self.send(notice_of(request, "pending"))

    async def notify_decision(self, result: ApprovalResult | ApprovalRequest) -> list[DeliveryReport]:
        """Send the notice of what became of an approval. Returns one report per notifier.

        Args:
            result: What `approve` or `deny` returned. It names neither the caller nor the call, so those are empty in
                the notice; the request as read from the store (`get`) fills them.
        """
        if isinstance(result, ApprovalRequest):
            return await self.send(notice_of(result, "decision"))
        return await self.send(
            Notice(
                event="decision",
                delivery_id=uuid4(),
                approval_id=result.approval_id,
                org_id="",
                request_id="",
                caller_id="",
                tool_call=ToolCall(server="", tool=""),
                risk_explanation="",
                expires_at=result.expires_at,
                status=result.status,
                approver_id=result.approver_id,
                note=result.note,
                decided_at=result.decided_at,
            )
        )

    async def send(self, notice: Notice) -> list[DeliveryReport]:
        """Hand `notice` to the notifiers and the event hooks, side by side. Returns one report per notifier."""
        reports, _ = await asyncio.gather(self._dispatcher.deliver_all(notice), self._dispatcher.emit(notice))
        return reports

    async def open(self) -> None:
        """Ask the plugins for their notifiers now, so that the first notice need not wait for them."""
        await self._dispatcher.open()

    async def close(self) -> None:
        """End the threads of the notifiers."""
        await self._dispatcher.aclose()
