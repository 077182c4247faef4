"""A process that erases, or prunes approvals, and is killed: `python erasing_process.py URL REDIS FOLDER WHAT STRIDE`.

WHAT: `table`, `archive` or `approvals`. It is killed before each statement in turn, before each command to Redis and
before each step of its files, and prints how often. The next process completes what it was at, and finds nothing left.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import Any
from unittest.mock import patch

# Run as a script, this module finds the others of the tests beside its folder.
sys.path.insert(0, str(Path(__file__).parent.parent))

import pyarrow.dataset  # noqa: F401  loaded once, before the forks
import redis.asyncio
from erasure_helpers import OLD, everything, secret_event, secrets_of, used_approval
from sealing_process import Countdown, kill_at_each_step

from agent_gateway_store import GatewayStore, StoreSettings, clock
from agent_gateway_store.archive import Archive
from agent_gateway_store.archive.manifest import NAME
from agent_gateway_store.errors import AuditEventNotFoundError
from agent_gateway_store.models.approval import ApprovalRequest
from agent_gateway_store.testing import RecordingNotifier
from builders import make_event

# Longer than the floor of retention.
LATER = timedelta(days=200)
APPROVALS = 3


class Folder:
    """Where the archive is, and what the process before was at."""

    def __init__(self, path: str) -> None:
        self.archive, self.state = Path(path) / "archive", Path(path) / "state.json"

    @property
    def given(self) -> Path | None:
        return self.archive if (self.archive / NAME).exists() else None


def opened(url: str, redis_url: str, **options: Any) -> GatewayStore:
    settings = StoreSettings(audit_seal_seconds=0, redis_timeout_seconds=5)
    return GatewayStore(url, redis_url=redis_url, settings=settings, **options)


async def settle(store: GatewayStore, folder: Folder, what: str, at: int) -> dict[str, Any]:
    """Store what is to be erased; return what the next process must know. In `archive` its id holds a hash."""
    mark, request_id = f"belongs-to-ada-{at}.", f"r-{at}"
    approval_id = await used_approval(store, request_id, mark)
    approval = await store.approvals.get(approval_id=approval_id)
    if what == "archive":
        await store.audit.write(make_event(request_id=request_id, timestamp=OLD))
    await store.audit.write(secret_event(mark, request_id=request_id, approval_id=approval_id))
    await store.audit.write(make_event(request_id=f"after-{at}"))
    await store.evidence.seal()
    if what == "archive":
        found = await store.audit.search(approval_id=approval_id)
        request_id = found[0].request_id
    secrets = [*await secrets_of(store, request_id, mark), str(approval.tool_call_hash)]
    secrets += [request_id] * (what == "archive")
    if what == "archive":
        clock.move(LATER)
        await store.retention.prune(OLD + timedelta(days=1), by="ops", archive=folder.archive)
        assert (await store.retention.prune_approvals("190d", by="ops", archive=folder.archive)).approvals == 1
        clock.reset()
    before = await everything(store, folder.given)
    assert all(secret in before for secret in secrets)
    return {"request_id": request_id, "secrets": secrets}


async def erase(store: GatewayStore, folder: Folder, request_id: str) -> None:
    await store.retention.erase(request_id, reason="GDPR 17", by="dpo", archive=folder.given)


async def erase_until_killed(url: str, redis_url: str, folder: Folder, what: str, at: int) -> None:
    """Complete what the process before was at; then store, erase, and die at a step of that."""
    async with opened(url, redis_url, plugins=[RecordingNotifier()]) as store:
        if folder.state.exists():
            told = json.loads(folder.state.read_text())
            await require_sound(store, folder)
            with suppress(AuditEventNotFoundError):
                # Of an id that holds a hash nothing is left to be found by, once it is erased.
                await erase(store, folder, told["request_id"])
            after = await everything(store, folder.given)
            assert [secret for secret in told["secrets"] if secret in after] == []
            await require_sound(store, folder)
        told = await settle(store, folder, what, at)
        folder.state.write_text(json.dumps(told))
    countdown, store = armed(opened(url, redis_url))
    async with store:
        countdown.left = at
        await erase(store, folder, told["request_id"])
        countdown.left = -1


async def prune_until_killed(url: str, redis_url: str, folder: Folder, _what: str, at: int) -> None:
    """Require that nothing was lost by the kill before; then ask for approvals, prune them, and die at a step."""
    asked = json.loads(folder.state.read_text()) if folder.state.exists() else []
    async with opened(url, redis_url, plugins=[RecordingNotifier()]) as store:
        await require_approvals(store, folder, asked)
        asked += [str(await used_approval(store, f"r-{at}-{number}")) for number in range(APPROVALS)]
        folder.state.write_text(json.dumps(asked))
    patch("agent_gateway_store.retention.approvals._BATCH_ROWS", 2).start()
    countdown, store = armed(opened(url, redis_url))
    async with store:
        clock.move(LATER)
        countdown.left = at
        await store.retention.prune_approvals("190d", by="ops", archive=folder.archive)
        countdown.left = -1


async def require_approvals(store: GatewayStore, folder: Folder, asked: list[str]) -> None:
    """Each approval is in the table or in the archive, there with its vote and notices, and once."""
    archived = archived_approvals(folder.archive)
    stored: list[ApprovalRequest] = [each async for each in store.approvals.stream()]
    assert set(asked) <= {str(each.approval_id) for each in stored} | set(archived)
    await require_sound(store, folder)


def archived_approvals(archive: Path) -> dict[str, Any]:
    """The approvals that the manifest names, by id; each must be there once, and whole."""
    found: dict[str, Any] = {}
    if (archive / NAME).exists():
        for entry in [json.loads(line) for line in (archive / NAME).read_text().splitlines()]:
            for line in (archive / entry["file"]).read_text().splitlines():
                record = json.loads(line)
                assert record["approval"]["approval_id"] not in found
                found[record["approval"]["approval_id"]] = record
                assert len(record["votes"]) == 1
                assert {notice["status"] for notice in record["notices"]} == {"DELIVERED"}
    return found


async def require_sound(store: GatewayStore, folder: Folder) -> None:
    found = await store.evidence.verify(archive=folder.given)
    assert found.ok, found.findings
    assert folder.given is None or Archive(folder.archive).verify().ok


def armed(store: GatewayStore) -> tuple[Countdown, GatewayStore]:
    """Count the statements, commands and files of this process from now on."""
    countdown = Countdown()
    countdown.watch(store)
    countdown.watch_files()
    client: Any = redis.asyncio.Redis
    client.execute_command = countdown.counting(client.execute_command)
    return countdown, store


def main(url: str, redis_url: str, path: str, what: str, stride: str) -> None:
    folder = Folder(path)
    run: Callable[..., Any] = prune_until_killed if what == "approvals" else erase_until_killed
    kill_at_each_step(lambda _, at: run(url, redis_url, folder, what, at), url, int(stride))


if __name__ == "__main__":
    main(*sys.argv[1:])
