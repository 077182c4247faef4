"""Opening a store while another task, or another event loop, opens, migrates or closes it."""

from __future__ import annotations

import asyncio
import sys
import threading
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any
from uuid import uuid4

import pytest
from contract_helpers import BOTH, on_backend

import agent_gateway_store.store as store_module
import servers
from agent_gateway_store import GatewayStore, StoreSettings, SyncGatewayStore, errors, hookimpl
from agent_gateway_store.evidence.sealer import Sealer
from agent_gateway_store.storage.database import get_db
from agent_gateway_store.testing import RecordingNotifier
from builders import CALL, make_event, make_request

pytest_generate_tests = on_backend("postgres")


def open_slowly(
    monkeypatch: pytest.MonkeyPatch, begun: asyncio.Event | threading.Event, goes_on: asyncio.Event
) -> None:
    """Let stores that open say that they have begun, and go on when they are told to."""
    real = store_module.AuditWriter.open

    async def slow(writer: Any) -> None:
        begun.set()
        await goes_on.wait()
        await real(writer)

    monkeypatch.setattr(store_module.AuditWriter, "open", slow)


async def test_a_task_that_opens_at_the_same_time_keeps_the_store_open(
    database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, begun, goes_on = GatewayStore(database_url, redis_url=""), asyncio.Event(), asyncio.Event()
    open_slowly(monkeypatch, begun, goes_on)
    first = asyncio.create_task(store.open())
    await begun.wait()
    second = asyncio.create_task(store.open())
    await asyncio.sleep(0)
    first.cancel()
    await asyncio.wait([first])
    goes_on.set()
    await second

    assert await store.audit.write(make_event()) == "STORED"
    await store.close()


async def test_another_loop_is_refused_while_the_store_opens(
    database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As once it is open; whoever was first works on, and the other one may open it after its end."""
    store, begun, goes_on = GatewayStore(database_url, redis_url=""), threading.Event(), asyncio.Event()

    async def refused() -> None:
        for act in (store.open, store.close, store.migrate):
            with pytest.raises(errors.StoreNotOpenError, match="another event loop"):
                await asyncio.wait_for(act(), 20)

    async def opened() -> None:
        async with store:
            assert await store.audit.write(make_event()) == "STORED"

    open_slowly(monkeypatch, begun, goes_on)
    opening = asyncio.create_task(store.open())
    await asyncio.to_thread(begun.wait)
    await asyncio.to_thread(servers.run, refused())
    monkeypatch.undo()
    goes_on.set()
    await opening
    assert await store.audit.write(make_event()) == "STORED"
    await store.close()

    await asyncio.to_thread(servers.run, opened())


async def test_a_migration_that_ends_while_the_store_opens_lets_no_other_loop_in(
    database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor does it close the connections of whoever opens the store; once that one has closed it, others may come."""
    store, begun, goes_on = GatewayStore(database_url, redis_url=""), asyncio.Event(), asyncio.Event()

    async def refused() -> None:
        with pytest.raises(errors.StoreNotOpenError, match="another event loop"):
            await asyncio.wait_for(store.open(), 20)

    open_slowly(monkeypatch, begun, goes_on)
    opening = asyncio.create_task(store.open())
    await begun.wait()
    await store.migrate()
    await asyncio.to_thread(servers.run, refused())
    goes_on.set()
    await opening
    monkeypatch.undo()
    assert await store.audit.write(make_event()) == "STORED"
    await asyncio.to_thread(servers.run, refused())
    await store.close()

    async def opened() -> None:
        async with store:
            assert len(await store.audit.list_recent()) == 1

    await asyncio.to_thread(servers.run, opened())


async def test_a_store_that_could_not_be_opened_may_be_opened_in_another_loop(database_url: str) -> None:
    store = GatewayStore(database_url, redis_url="", auto_migrate=False)
    async with GatewayStore(database_url, redis_url="") as other:
        async with other.database.write() as connection:
            await connection.exec_driver_sql("ALTER TABLE agent_gateway_store_version RENAME TO hidden")
        with pytest.raises(errors.GatewayStoreError):
            await store.open()
        async with other.database.write() as connection:
            await connection.exec_driver_sql("ALTER TABLE hidden RENAME TO agent_gateway_store_version")

    async def opened() -> None:
        async with store:
            assert await store.audit.write(make_event()) == "STORED"

    await asyncio.to_thread(servers.run, opened())


async def test_migrating_in_one_loop_and_opening_in_another(postgres_database: Callable[[], str]) -> None:
    store = GatewayStore(postgres_database())

    async def work() -> int:
        async with store:
            return len(await store.keys.list())

    await asyncio.to_thread(servers.run, store.migrate())

    assert await asyncio.to_thread(servers.run, work()) == 0


class Hooked(RecordingNotifier):
    """A notifier that audit events pass by."""

    @hookimpl
    def gateway_store_before_audit_write(self, event: Any) -> None:
        """Change nothing."""

    @hookimpl
    def gateway_store_audit_written(self, events: Any) -> None:
        """Keep nothing."""


async def use(store: GatewayStore) -> None:
    approvals, keys, retention, caller = store.approvals, store.keys, store.retention, uuid4().hex
    await store.audit.write(make_event())
    await store.audit.write_many([make_event(), make_event()])
    await store.audit.search(caller_id="dev-agent")
    await store.evidence.seal()
    await retention.hold(caller, reason="r", by="legal")
    await retention.release_hold(caller, by="legal")
    await retention.prune("400d", by="legal", discard=True)
    await retention.prune_approvals("400d", by="legal", discard=True)
    issued = await keys.issue(caller, role="developer")
    await asyncio.gather(*(keys.verify(issued.plaintext) for _ in range(2)))
    await keys.rotate(caller)
    # More than there are connections to Redis.
    asked, *others = await asyncio.gather(*(approvals.issue_token(make_request()) for _ in range(40)))
    waiting = [asyncio.create_task(approvals.wait_for_decision(asked, timeout_s=20)) for _ in range(2)]
    await asyncio.gather(*map(approvals.check_token, others))
    await approvals.approve(asked, "alice")
    await asyncio.gather(*waiting)
    await approvals.consume_token(asked, caller_id="dev-agent", tool_call=CALL)
    await store.notifications.run(once=True)
    await store.sinks.list()


@pytest.mark.system
@BOTH
async def test_a_store_that_is_opened_again_works_in_its_new_loop(
    database_url: str, redis_setting: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Whatever tasks waited for in the loop before: each other, the database, Redis, or the last seal of its close."""
    settings = StoreSettings(redis_timeout_seconds=5, audit_seal_seconds=0.01)
    store = GatewayStore(database_url, redis_url=redis_setting, settings=settings, plugins=[Hooked()])
    real, seals = Sealer.seal, asyncio.Event()

    async def slow(sealer: Sealer, *, wait: bool = True, anew: bool = False) -> Any:
        if not wait:
            seals.set()
            await asyncio.sleep(0.1)
        return await real(sealer, wait=wait, anew=anew)

    async def work() -> None:
        nonlocal seals
        seals = asyncio.Event()
        async with store:
            await asyncio.gather(*(use(store) for _ in range(2)))
            seals.clear()
            await seals.wait()

    monkeypatch.setattr(Sealer, "seal", slow)
    for _ in range(2):
        await asyncio.to_thread(servers.run, work())

    assert caplog.text == ""


@pytest.mark.parametrize(
    ("module", "function", "part"),
    [("gevent.monkey", "is_module_patched", "socket"), ("eventlet.patcher", "is_monkey_patched", "thread")],
)
async def test_a_process_whose_threads_are_patched_is_refused(
    database_url: str, monkeypatch: pytest.MonkeyPatch, module: str, function: str, part: str
) -> None:
    """However a store is opened; where the library is imported and has patched nothing of that, it works."""
    patched = {part}
    monkeypatch.setitem(sys.modules, module, SimpleNamespace(**{function: patched.__contains__}))
    monkeypatch.setenv("DATABASE_URL", database_url)
    blocking, store = SyncGatewayStore(), GatewayStore()

    async def from_sync(act: Callable[[], object]) -> None:
        await asyncio.to_thread(act)

    opening = (store.open, store.migrate, lambda: from_sync(blocking.open), lambda: from_sync(blocking.migrate))
    for act in (*opening, lambda: anext(get_db())):
        with pytest.raises(
            errors.StoreNotOpenError, match=f"{module.split('.')[0]} has patched .*: open it in a process"
        ):
            await act()
    patched.clear()
    async with store:
        await from_sync(lambda: blocking.open().close())


async def test_where_no_asyncio_runs_a_store_says_so(store: GatewayStore) -> None:
    closed, refused = GatewayStore("sqlite://"), list[str]()

    def elsewhere() -> None:
        for act in (closed.open, closed.migrate, store.open, store.keys.list, lambda: anext(get_db())):
            with pytest.raises(errors.StoreNotOpenError, match="No event loop of asyncio runs here") as caught:
                act().__await__().send(None)
            refused.append(str(caught.value))

    await asyncio.to_thread(elsewhere)

    assert len(refused) == 5
