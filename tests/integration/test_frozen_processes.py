"""A process that is frozen while others work in its place goes on later, and takes nothing of theirs back."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import tempfile
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path
from typing import Any

import pytest

import servers
from agent_gateway_store import GatewayStore, StoreSettings
from agent_gateway_store.archive import Archive, files, manifest
from agent_gateway_store.errors import StoreUnavailableError
from agent_gateway_store.plugins.file_sink import FileSink, append
from agent_gateway_store.retention import approvals, erase
from agent_gateway_store.testing import wait_until
from builders import make_event, make_request
from forks import forks

pytestmark = pytest.mark.system

PROCESS = Path(__file__).parent / "frozen_process.py"
OLD = datetime(2025, 3, 1, 12, tzinfo=UTC)
END_HOLDER = """
SELECT count(pg_terminate_backend(pid)) FROM pg_locks JOIN pg_database ON pg_database.oid = pg_locks.database
WHERE locktype = 'advisory' AND granted AND datname = current_database()
"""
Work = Callable[[GatewayStore, Path], Awaitable[Any]]


async def prune(store: GatewayStore, archive: Path) -> None:
    await store.retention.prune("400d", by="ops", archive=archive)


async def erase_another(store: GatewayStore, archive: Path) -> None:
    await store.retention.erase("r-2", reason="r", by="dpo", archive=archive)


async def prune_approvals(store: GatewayStore, archive: Path) -> None:
    await store.retention.prune_approvals(timedelta(0), by="ops", archive=archive, below_floor=True)


async def fill(store: GatewayStore) -> None:
    """Write three old events with a secret each and a new one, and deny an approval."""
    await store.audit.write_many(
        make_event(request_id=f"r-{n}", timestamp=OLD, sanitized_args={"path": f"secret-{n}"}) for n in range(3)
    )
    await store.audit.write(make_event(request_id="newest"))
    await store.approvals.deny(await store.approvals.issue_token(make_request()), "alice")
    await store.evidence.seal()


@contextmanager
def frozen(*arguments: object) -> Iterator[Callable[[], str]]:
    """Start a process, and yield once it has stopped itself; what is given lets it go on, and returns its errors."""
    with tempfile.TemporaryFile("w+") as errors, Path(os.devnull).open("r+") as nothing:
        files = (nothing.fileno(), nothing.fileno(), errors.fileno())
        process = forks().start([str(PROCESS), *map(str, arguments)], Path.cwd(), os.environ, *files)

        def go_on() -> str:
            process.send_signal(signal.SIGCONT)
            process.result(60)
            errors.seek(0)
            return errors.read()

        try:
            wait_until(lambda: servers.state_of(process.pid)[0] == "T", timeout_s=60)
            yield go_on
        finally:
            process.kill()


async def end_locks(url: str) -> None:
    """End the connections that hold a lock, as a server that restarts does."""
    async with servers.connected(url) as driver:
        assert await driver.fetchval(END_HOLDER) == 1


@pytest.mark.parametrize(
    ("work", "at", "other"),
    [
        ("prune", "clean-up", prune),
        ("prune", "append", prune),
        ("erase", "write", erase_another),
        ("erase", "append", erase_another),
        ("erase", "clean-up", prune),
        ("approvals", "append", prune_approvals),
    ],
)
async def test_nobody_else_works_on_the_archive_of_a_frozen_process(
    work: str,
    at: str,
    other: Work,
    migrated_postgres_database: Callable[[], str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Others are told so in a sentence. Once it has gone on, each event is there once, and what was erased is not."""
    monkeypatch.setattr(manifest, "_WAIT_S", 0.3)
    url, archive = migrated_postgres_database(), tmp_path / "archive"
    async with GatewayStore(url, redis_url="", settings=StoreSettings(audit_seal_seconds=0)) as store:
        await fill(store)
        if work == "erase":
            await prune(store, archive)
        with frozen(work, at, url, archive) as go_on:
            await end_locks(url)
            with pytest.raises(StoreUnavailableError, match="Another process works on the archive"):
                await other(store, archive)
            # Readers need no lock.
            assert Archive(archive).verify().ok
            await asyncio.to_thread(go_on)
        await other(store, archive)

        kept = [event.request_id async for event in store.audit.stream() if event.timestamp == OLD]
        archived = [event.request_id for event in Archive(archive).events()]
        is_erasing = work == "erase" and other is erase_another
        assert len(kept) + len(archived) == 3
        if other is not erase_another:
            assert len(await store.approvals.list_requests()) == (work != "approvals")
        found = await store.evidence.verify(archive=archive)
        assert found.ok, found.findings
        texts = [str(event.sanitized_args) for event in Archive(archive).events()]
        assert not is_erasing or not any("secret-2" in text for text in texts)
    assert not [path for path in archive.rglob("*") if path.is_file() and path.stat().st_mode & 0o077]


@pytest.mark.parametrize("work", ["send", "witness"])
async def test_nothing_is_taken_out_of_a_file_behind_whom_a_frozen_process_goes_on(work: str, tmp_path: Path) -> None:
    """Half a line of a killed process, or what a full disk took, is cut off by nobody once others have written."""
    path = tmp_path / "log.jsonl"
    torn = '{"request_id": "half' if work == "send" else ""
    path.write_text(f"{{}}\n{torn}")

    async def write(name: str) -> None:
        if work == "send":
            await FileSink(path).send([make_event(request_id=name)])
        else:
            append(path, f"{name}\n".encode())

    with frozen(work, "truncate", "", path) as go_on:
        with pytest.raises(OSError, match="Another process writes to the file: wait for it or end it"):
            await write("refused")
        assert await asyncio.to_thread(go_on) == ""
    await write("after")

    lines = path.read_text().splitlines()
    written = [json.loads(line)["request_id"] for line in lines[1:]] if work == "send" else lines[1:]
    assert lines[0] == "{}"
    assert written == (["frozen", "after"] if work == "send" else ["after"])


@pytest.mark.parametrize("work", ["erase", "approvals", "prune"])
async def test_whoever_lost_the_lock_goes_no_further(
    work: str, migrated_postgres_database: Callable[[], str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where the archive is on a file system without locks: the rows stay, and the files."""
    url, archive = migrated_postgres_database(), tmp_path / "archive"
    module, name, function = {
        "erase": (erase, "rewrite_approvals", erase.rewrite_approvals),
        "approvals": (approvals, "write_approvals", approvals.write_approvals),
        "prune": (files, "write_events", files.write_events),
    }[work]

    def losing(*arguments: Any) -> Any:
        asyncio.run(end_locks(url))
        return function(*arguments)

    async with GatewayStore(url, redis_url="", settings=StoreSettings(audit_seal_seconds=0)) as store:
        await fill(store)
        await prune(store, archive)
        await store.audit.write(make_event(request_id="late", timestamp=OLD))
        await store.audit.write(make_event())
        before = (archive / manifest.NAME).read_text()
        monkeypatch.setattr(module, name, losing)
        working: dict[str, Callable[[], Awaitable[Any]]] = {
            "erase": partial(store.retention.erase, "newest", reason="r", by="dpo", archive=archive),
            "approvals": partial(prune_approvals, store, archive),
            "prune": partial(prune, store, archive),
        }
        with pytest.raises(StoreUnavailableError):
            await working[work]()
        assert (archive / manifest.NAME).read_text() == before
        assert len(await store.approvals.list_requests()) == 1
        for name in ("newest", "late"):
            event = await store.audit.get_by_request_id(name)
            assert event is not None
            assert event.sanitized_args
