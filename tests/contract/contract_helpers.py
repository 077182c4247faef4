"""What several contract tests need: approvals to begin with, counts of what goes to SQL, waits, a forked child."""

from __future__ import annotations

import asyncio
import inspect
import multiprocessing
import os
import threading
import time
import warnings
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from multiprocessing.context import ForkProcess
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import event, text

from agent_gateway_store import AuditEvent, GatewayStore, Notice, StoreSettings, WriteOutcome, errors
from agent_gateway_store.storage import statements
from agent_gateway_store.store import parts_of
from agent_gateway_store.testing import RecordingNotifier
from builders import CALL, make_request
from forks import forks

SOON_S = 10.0
"""More than a message takes on a busy machine, and less than a task that waits for a decision waits at most."""
BOTH = pytest.mark.parametrize("redis_setting", ["no-redis", "redis"], indirect=True)
"""Run without and with Redis: for what is read through it, or told through it."""
WITH_REDIS = pytest.mark.parametrize("redis_setting", ["redis"], indirect=True)
EACH = pytest.mark.parametrize(
    ("database_url", "redis_setting"), [("sqlite", "no-redis"), ("postgres", "redis")], indirect=True
)
"""Run on each database, once without and once with Redis."""
POSTGRES = pytest.mark.parametrize("database_url", ["postgres"], indirect=True)
"""For what goes the same way on either database."""

BY_TOKEN: list[Callable[[GatewayStore, str], Awaitable[Any]]] = [
    lambda store, token: store.approvals.check_token(token),
    lambda store, token: store.approvals.check_token(token, fresh=True),
    lambda store, token: store.approvals.approve(token, "approver-1"),
    lambda store, token: store.approvals.deny(token, "approver-1"),
    lambda store, token: store.approvals.cancel(token, "approver-1"),
    lambda store, token: store.approvals.consume_token(token, caller_id="dev-agent", tool_call=CALL),
    lambda store, token: store.approvals.release_output(token, caller_id="dev-agent"),
    lambda store, token: store.approvals.record_outcome(token, "done"),
    lambda store, token: store.approvals.wait_for_decision(token, timeout_s=0),
]
"""Every use of an approval that names it by its token."""


WAYS = ("write", "write_many", "record")
"""How an event comes into the log."""


async def approved(store: GatewayStore, **fields: Any) -> str:
    """Issue a request, approve it, and return its token."""
    token = await store.approvals.issue_token(make_request(**fields))
    await store.approvals.approve(token, "approver-1")
    return token


async def write_by(way: str, store: GatewayStore, event: AuditEvent) -> WriteOutcome:
    """Write an event in one of the ways."""
    if way == "write":
        return await store.audit.write(event)
    if way == "write_many":
        return next(iter(await store.audit.write_many([event])))
    async with store.database.sessions() as session, session.begin():
        return await store.audit.record(event, session=session)


async def column(store: GatewayStore, name: str, table: str) -> list[Any]:
    """Return what a column of a table holds, without the types of the models."""
    async with store.database.engine.connect() as connection:
        return list((await connection.execute(text(f"SELECT {name} FROM {table} ORDER BY id"))).scalars())


async def selected(store: GatewayStore, statement: str) -> list[tuple[Any, ...]]:
    """Return the rows of a statement."""
    async with store.database.read() as connection:
        return [tuple(row) for row in await connection.execute(text(statement))]


async def require_one_log(store: GatewayStore) -> int:
    """Positions are dense, every event has one, and everything verifies; return the size."""
    found = await selected(store, "SELECT position, event_id FROM audit_leaves ORDER BY position")
    events = await selected(store, "SELECT id FROM audit_events ORDER BY id")
    assert [position for position, _ in found] == list(range(len(found)))
    assert sorted((event_id,) for _, event_id in found) == events
    verified = await store.evidence.verify()
    assert (verified.ok, verified.checked, verified.unsealed) == (True, len(events), 0)
    return len(events)


async def until(condition: Callable[[], bool | Awaitable[bool]], timeout_s: float = 10) -> float:
    """Wait until the condition holds and return how many seconds that took; fail after `timeout_s`."""
    start = time.monotonic()
    while not (found := condition()) or (inspect.isawaitable(found) and not await found):
        assert time.monotonic() - start < timeout_s, "not within the time allowed"
        await asyncio.sleep(0.005)
    return time.monotonic() - start


async def idle(store: GatewayStore) -> None:
    """Wait until no connection is checked out: the subscription of a waiter may still be connecting when it returns."""
    await until(lambda: not store.database.engine.pool.checkedout(), 10)  # type: ignore[attr-defined]


async def hears(store: GatewayStore) -> None:
    """Wait until a store hears other processes, and has forgotten what it knew before."""
    await until(lambda: parts_of(store).pubsub.is_live)


def topics(store: GatewayStore) -> int:
    """How many approvals tasks of a store wait for."""
    return parts_of(store).pubsub.keys_subscribed


class GatedNotifier(RecordingNotifier):
    """Keeps a notice only once `gate` is set."""

    def __init__(self, gate: threading.Event) -> None:
        super().__init__()
        self._gate = gate

    async def notify_pending(self, notice: Notice) -> None:
        await self._keep(notice)

    async def notify_decision(self, notice: Notice) -> None:
        await self._keep(notice)

    async def _keep(self, notice: Notice) -> None:
        assert self._gate.wait(10)  # in the notifier's own thread
        self.notices.append(notice)


def seen(recorder: RecordingNotifier) -> list[tuple[str, str]]:
    """Event and status of each notice, sorted: notices may overtake each other."""
    return sorted((notice.event, str(notice.status)) for notice in recorder.notices)


@contextmanager
def counted_statements(store: GatewayStore, about: str = "") -> Iterator[list[str]]:
    """Collect the SQL statements that go through the store's engine, or past it to the driver, and name `about`."""
    collected: list[str] = []
    run = statements.CompiledStatement.run

    async def noting(compiled: statements.CompiledStatement, *args: Any) -> Any:
        note(None, None, compiled.text)
        return await run(compiled, *args)

    def note(_connection: Any, _cursor: Any, statement: str, *_: Any) -> None:
        if about in statement and not statement.startswith("BEGIN"):
            collected.append(statement)

    engine = store.database.engine.sync_engine
    event.listen(engine, "before_cursor_execute", note)
    statements.CompiledStatement.run = noting  # type: ignore[method-assign]
    try:
        yield collected
    finally:
        statements.CompiledStatement.run = run  # type: ignore[method-assign]
        event.remove(engine, "before_cursor_execute", note)


class Reads:
    """Counts how often a store acquires a connection to read approvals, and how many it has at once.

    Attributes:
        gate: Cleared, whoever has read stands still before the answer goes on.
        held: How many stand there.
    """

    def __init__(self, store: GatewayStore, monkeypatch: pytest.MonkeyPatch) -> None:
        self.number = self.at_once = self.most_at_once = self.held = 0
        self.gate = asyncio.Event()
        self.gate.set()
        self._connection = store.database.connection
        monkeypatch.setattr(store.database, "connection", self._counted)

    @asynccontextmanager
    async def _counted(self, access: Any) -> AsyncIterator[Any]:
        is_read = access == "read"
        self.number += is_read
        self.at_once += is_read
        self.most_at_once = max(self.most_at_once, self.at_once)
        try:
            async with self._connection(access) as connection:
                yield connection
        finally:
            self.at_once -= is_read
        if is_read:
            self.held += 1
            await self.gate.wait()
            self.held -= 1


@contextmanager
def no_thread_left() -> Iterator[None]:
    """Check that what is done leaves no thread behind, at the latest a moment later."""
    before = set(threading.enumerate())
    yield
    deadline = time.monotonic() + 5
    while (left := set(threading.enumerate()) - before) and time.monotonic() < deadline:
        time.sleep(0.005)
    # anyio keeps the threads that wait for files; they end with the process.
    assert {thread.name for thread in left} <= {"AnyIO worker thread"}


class RefusingSink:
    """A sink that refuses everything for good."""

    def __init__(self, name: str = "sink") -> None:
        self.name = name

    async def send(self, _events: object) -> None:
        raise errors.NotDeliveredError(self.name, is_permanent=True)


def run_script(name: str, *arguments: object, loads: Sequence[str] = ()) -> int:
    """Run a script of this folder, with the package loaded, and with the large libraries that are named; return the
    number that it prints."""
    forkers = forks(is_large=bool(loads))
    if loads:
        forkers.load(list(loads))
    environment = {**os.environ, "AGENT_GATEWAY_STORE_LOAD_PLUGINS": ""}
    command = [str(Path(__file__).with_name(name)), *map(str, arguments)]
    ended = forkers.run(command, cwd=Path.cwd(), env=environment, timeout=550)
    assert (ended.returncode, ended.stderr) == (0, "")
    print(name, ended.stdout.strip(), "kills")
    return int(ended.stdout or 0)


def forked(work: Callable[[], object]) -> ForkProcess:
    """Run `work` in a fork of this process; its exit code is 0 unless it raises."""
    child = multiprocessing.get_context("fork").Process(target=work)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # newer Pythons warn of forking beside threads
        child.start()
    return child


@pytest.fixture
async def store_sealed_by_hand(database_url: str) -> AsyncIterator[GatewayStore]:
    """An open store that seals when it is told to."""
    async with GatewayStore(database_url, redis_url="", settings=StoreSettings(audit_seal_seconds=0)) as opened:
        yield opened


def on_backend(name: str) -> Callable[[pytest.Metafunc], None]:
    """Return the `pytest_generate_tests` of a module whose subject is above the storage: one backend is enough."""

    def generate(metafunc: pytest.Metafunc) -> None:
        given = [mark.args[0] for mark in metafunc.definition.iter_markers("parametrize")]
        if "database_url" in metafunc.fixturenames and "database_url" not in given:
            # As a mark, so that it comes in place of the parameters of the fixture.
            metafunc.definition.add_marker(pytest.mark.parametrize("database_url", [name], indirect=True))

    return generate
