"""Notices arrive whatever dies: the gateway's process, a worker beside others, the database; and nobody is told twice
for no reason."""

from __future__ import annotations

import asyncio
import logging
import os
import random
import signal
import subprocess
from collections import Counter, defaultdict
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from agent_gateway_store import GatewayStore, StoreSettings, clock
from builders import make_request
from forks import forks
from integration.outbox_process import File
from proofs.harness import migrated
from servers import PostgresServer

pytestmark = pytest.mark.system

PROGRAM = Path(__file__).with_name("outbox_process.py")


@pytest.fixture(autouse=True)
def _no_bundled_notifier(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setenv("AGENT_GATEWAY_STORE_LOAD_PLUGINS", "")
    caplog.set_level(logging.CRITICAL, logger="agent_gateway_store")


@pytest.fixture(params=["sqlite", "postgres"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """The URL of an empty, migrated database."""
    if request.param == "sqlite":
        return migrated(f"sqlite:///{tmp_path}/outbox.db")
    create: Callable[[], str] = request.getfixturevalue("migrated_postgres_database")
    return create()


def quiet(**fields: object) -> StoreSettings:
    return StoreSettings(notification_worker=False, **fields)  # type: ignore[arg-type]


def lines(*paths: Path) -> list[list[str]]:
    return [line.split() for path in paths if path.exists() for line in path.read_text().splitlines()]


@pytest.mark.parametrize("rounds", [3, pytest.param(100, marks=pytest.mark.slow)])
async def test_kill_9_loses_no_notice(url: str, tmp_path: Path, rounds: int) -> None:
    """Killed after a commit, while sending or just after: what was committed arrives, under one delivery id."""
    told = tmp_path / "told"
    for number in range(rounds):
        moment = ("committed", "sending", "sent")[number % 3]
        command = [str(PROGRAM), "die", url, str(told), moment]
        process = forks().run(command, cwd=tmp_path, env=os.environ, timeout=60)
        assert process.returncode == -signal.SIGKILL, process.stderr
    clock.move(timedelta(minutes=5))  # the leases of the dead have ended
    async with GatewayStore(url, redis_url="", plugins=[File(told)], settings=quiet()) as store:
        left = len(await store.notifications.list("DUE", limit=10_000))
        assert await store.notifications.run(once=True) == left >= rounds
        rows = await store.notifications.list(limit=10_000)
        asked = await store.approvals.list_requests(limit=10_000)

    assert {row.status for row in rows} == {"DELIVERED"}
    ids = defaultdict(set)
    for delivery_id, approval_id, event in lines(told):
        ids[approval_id, event].add(delivery_id)
    decided = {str(each.approval_id) for each in asked if each.status != "PENDING"}
    assert {key for key in ids if key[1] == "pending"} == {(str(each.approval_id), "pending") for each in asked}
    assert {key[0] for key in ids if key[1] == "decision"} == decided
    assert all(len(each) == 1 for each in ids.values())
    assert {str(row.delivery_id) for row in rows} == {each for found in ids.values() for each in found}


@pytest.mark.parametrize("count", [200, pytest.param(10_000, marks=pytest.mark.slow)])
async def test_two_workers_share_one_outbox(url: str, tmp_path: Path, count: int) -> None:
    async with GatewayStore(url, redis_url="", plugins=[File(tmp_path / "none")], settings=quiet()) as store:
        waiting = iter(range(count))

        async def issue() -> None:
            for _ in waiting:
                await store.approvals.issue_token(make_request())

        await asyncio.gather(*(issue() for _ in range(16)))
        files = [tmp_path / "one", tmp_path / "two"]
        command = [forks().programs / "python", PROGRAM, "work", url]
        pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        workers = [subprocess.Popen([*command, file], text=True, **pipes) for file in files]
        for worker in workers:
            assert worker.stdout is not None
            assert worker.stdin is not None
            assert await asyncio.to_thread(worker.stdout.readline) == "open\n"
        for worker in workers:
            worker.stdin.write("\n")  # type: ignore[union-attr]
            worker.stdin.flush()  # type: ignore[union-attr]
        said = [await asyncio.to_thread(worker.communicate) for worker in workers]
        shares = [int(out) for out, _ in said]
        delivered = await store.notifications.list("DELIVERED", limit=count + 1)

    assert sum(shares) == count
    assert min(shares) > 0
    assert {row.attempts for row in delivered} == {1}
    assert Counter(line[0] for line in lines(*files)) == Counter(str(row.delivery_id) for row in delivered)
    assert len(delivered) == count


async def test_a_worker_outlives_its_database(tmp_path: Path) -> None:
    """PostgreSQL is killed while the worker sends, and comes back: the worker goes on by itself, and all arrive."""
    told = tmp_path / "told"
    with PostgresServer(durable=True) as server:
        url = server.url
        async with GatewayStore(url, redis_url="", plugins=[File(told)], settings=quiet(), auto_migrate=True) as store:
            asked = [make_request() for _ in range(100)]
            for request in asked:
                await store.approvals.issue_token(request)
        settings = StoreSettings(notification_poll_seconds=0.1, notification_concurrency=1)
        async with GatewayStore(url, redis_url="", plugins=[File(told)], settings=settings) as store:
            while not lines(told):
                await asyncio.sleep(0.001)
            server.kill()
            await asyncio.sleep(random.uniform(0.2, 0.6))
            server.start()
            clock.move(timedelta(minutes=5))  # what was claimed as the server died is free again
            async with asyncio.timeout(30):
                while await store.notifications.list("DUE"):
                    await asyncio.sleep(0.1)
            rows = await store.notifications.list(limit=1000)

    assert {row.status for row in rows} == {"DELIVERED"}
    ids = defaultdict(set)
    for delivery_id, approval_id, _ in lines(told):
        ids[approval_id].add(delivery_id)
    assert ids == {str(row.approval_id): {str(row.delivery_id)} for row in rows}
    assert ids.keys() == {str(request.approval_id) for request in asked}
