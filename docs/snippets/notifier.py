"""How-to: write a notifier."""

# --8<-- [start:plugin]
from collections.abc import Sequence
from pathlib import Path

from agent_gateway_store import Notice, StoreSettings, hookimpl


class FileNotifier:
    """Appends a line to a file."""

    name = "file"

    def __init__(self, path: Path) -> None:
        self._path = path

    async def notify_pending(self, notice: Notice) -> None:
        self._append(f"{notice.caller_id} wants {notice.tool_call.tool}: {notice.risk_explanation}")

    async def notify_decision(self, notice: Notice) -> None:
        self._append(f"{notice.tool_call.tool}: {notice.status} by {notice.approver_id}")

    def _append(self, line: str) -> None:
        with self._path.open("a", encoding="utf-8") as file:
            file.write(f"{line}\n")


@hookimpl
def gateway_store_register_notifiers(settings: StoreSettings) -> Sequence[FileNotifier]:
    """Contribute the notifier."""
    return [FileNotifier(Path(f"notices-{settings.environment}.txt"))]


# --8<-- [end:plugin]

import asyncio
import sys

from agent_gateway_store import ApprovalRequest, GatewayStore, ToolCall

my_plugin = sys.modules[__name__]


async def main() -> None:
    # --8<-- [start:try]
    async with GatewayStore(plugins=[FileNotifier(Path("notices.txt"))]) as store:  # a notifier, or a module with hooks
        # --8<-- [end:try]
        assert store.plugins.records[0].state == "active"
        await ask(store)
    assert Path("notices.txt").read_text().startswith("dev-agent wants delete_file")

    async with GatewayStore(plugins=[my_plugin]) as store:
        # --8<-- [start:records]
        for record in store.plugins.records:
            print(record.name, record.state, record.hooks, record.error)
        # --8<-- [end:records]
        assert store.plugins.records[0].hooks == ("gateway_store_register_notifiers",)
        await ask(store)
    assert "DENIED by alice" in Path("notices-dev.txt").read_text()


async def ask(store: GatewayStore) -> None:
    call = ToolCall(server="files", tool="delete_file", arguments={"path": "old.log"})
    token = await store.approvals.issue_token(
        ApprovalRequest(request_id="r-1", caller_id="dev-agent", tool_call=call, risk_explanation="Deletes a file.")
    )
    await store.approvals.deny(token, approver_id="alice")


asyncio.run(main())
