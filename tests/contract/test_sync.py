"""`SyncGatewayStore`: the same store for code that blocks, from any thread, also beside a running loop."""

from __future__ import annotations

import asyncio
import gc
import itertools
import os
import resource
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
from contract_helpers import GatedNotifier, forked, no_thread_left, on_backend, seen

from agent_gateway_store import AuditEvent, SyncGatewayStore, WriteOutcome, errors
from agent_gateway_store.sync import Portal, twin_of
from builders import CALL, CALLER, make_event, make_request

pytest_generate_tests = on_backend("sqlite")


@pytest.fixture
def store(database_url: str) -> Iterator[SyncGatewayStore]:
    with SyncGatewayStore(database_url) as opened:
        yield opened


def test_main_job_without_await(store: SyncGatewayStore) -> None:
    issued = store.keys.issue("dev-agent", role="developer")
    assert store.keys.verify(issued.plaintext).role == "developer"
    assert store.audit.write(make_event(request_id="r-1")) == "STORED"
    assert store.audit.write_many(make_event() for _ in range(3)) == Counter({WriteOutcome.STORED: 3})
    assert store.audit.get_by_request_id("r-1").caller_id == "dev-agent"
    assert store.audit.counters.stored == 4
    token = store.approvals.issue_token(make_request())
    assert store.approvals.approve(token, "approver-1").status == "APPROVED"
    assert store.approvals.wait_for_decision(token, timeout_s=5).status == "APPROVED"
    assert store.approvals.consume_token(token, caller_id="dev-agent", tool_call=CALL).status == "USED"
    assert [row.status for row in store.approvals.list_requests()] == ["USED"]
    store.ping()


def test_several_threads_share_a_store(store: SyncGatewayStore) -> None:
    """Calls of many threads at once all land, and a race between threads has one winner."""
    token = store.approvals.issue_token(make_request())

    def work(number: int) -> str | None:
        store.audit.write(make_event(caller_id=f"agent-{number}"))
        try:
            return store.approvals.approve(token, f"approver-{number}").approver_id
        except errors.ApprovalAlreadyDecidedError as error:
            return error.approver_id

    with ThreadPoolExecutor(8) as pool:
        winners = set(pool.map(work, range(24)))

    assert len(winners - {None}) == len(winners) == 1
    assert len(store.audit.list_recent()) == 24


def test_not_open_says_so(database_url: str) -> None:
    store = SyncGatewayStore(database_url)
    uses: list[Callable[[], Any]] = [
        lambda: store.audit.write(make_event()),
        lambda: store.audit.counters,
        lambda: store.approvals.check_token("token"),
        lambda: store.keys.list(),
        lambda: store.for_org("acme").keys.list(),
        store.ping,
    ]

    for _ in range(2):
        for use in uses:
            with pytest.raises(errors.StoreNotOpenError, match="is not open"):
                use()
        with store as opened:
            assert opened is store
            assert store.open() is store
            assert store.keys.list() == []
        store.close()


def test_failed_opening_leaves_no_thread(tmp_path: Path) -> None:
    """A database that cannot be opened is told, and nothing runs on; the store can be tried again."""
    store = SyncGatewayStore(f"sqlite:///{tmp_path}/folder/gateway.db")
    with no_thread_left():
        for _ in range(2):
            with pytest.raises(errors.StoreUnavailableError, match="folder"):
                store.open()
        with pytest.raises(errors.StoreNotOpenError):
            store.keys.list()
        (tmp_path / "folder").mkdir()
        with store:
            assert store.keys.list() == []


def test_no_free_file_for_the_loop_is_told() -> None:
    def use() -> None:
        portal, limits = Portal(), resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (0, limits[1]))
        with pytest.raises(OSError, match="Too many open files"):
            portal.start()
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
        assert portal.start()
        portal.stop()

    child = forked(use)
    child.join(30)
    child.kill()

    assert child.exitcode == 0


def test_errors_come_through_unchanged(store: SyncGatewayStore) -> None:
    """Type, text, attributes and cause are those of the async store; the traceback leads to the place."""
    store.keys.issue("dev-agent", role="r")
    with pytest.raises(errors.ApiKeyExistsError, match="already has an API key") as caught:
        store.keys.issue("dev-agent", role="r")

    assert caught.value.caller_id == "dev-agent"
    with (
        pytest.raises(errors.StoreUnavailableError) as unavailable,
        SyncGatewayStore("sqlite:////dev/null/none.db", redis_url=""),
    ):
        pass
    assert unavailable.value.__cause__ is not None
    assert "keys/manager.py" in "".join(str(entry.path) for entry in caught.traceback)
    with pytest.raises(TypeError, match="no_such_argument"):
        store.keys.list(no_such_argument=1)  # type: ignore[call-arg]


def test_view_is_bound_to_its_organisation(store: SyncGatewayStore) -> None:
    acme = store.for_org("acme")
    acme.keys.issue("dev-agent", role="r")

    assert isinstance(acme, SyncGatewayStore)
    assert (acme.org_id, store.org_id, acme.settings) == ("acme", None, store.settings)
    assert [row.org_id for row in store.keys.list()] == ["acme"]
    assert store.for_org("globex").keys.list() == []
    assert acme.database is store.database
    assert acme.plugins is store.plugins


def test_migrating_before_opening(postgres_database: Callable[[], str]) -> None:
    store = SyncGatewayStore(postgres_database())
    with no_thread_left():
        store.migrate()
        with store:
            store.migrate()
            assert store.keys.list() == []


@contextmanager
def interrupted(after: Callable[[], bool]) -> Iterator[None]:
    """Press Ctrl-C in the main thread once `after` is true."""

    def press() -> None:
        while not after():
            time.sleep(0.002)
        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)

    thread = threading.Thread(target=press)
    thread.start()
    try:
        with pytest.raises(KeyboardInterrupt):
            yield
    finally:
        thread.join()


class Service:
    """A service to make a twin of."""

    def __init__(self) -> None:
        self.waits, self.cancelled, self.closed = threading.Event(), threading.Event(), threading.Event()

    async def wait(self) -> None:
        self.waits.set()
        try:
            await asyncio.Event().wait()
        finally:
            self.cancelled.set()

    async def numbers(self, count: int) -> AsyncIterator[int]:
        try:
            for number in range(count):
                await asyncio.sleep(0)
                yield number
            if count > 2:
                raise ValueError("too many")
        finally:
            self.closed.set()


@pytest.fixture
def portal() -> Iterator[Portal]:
    portal = Portal()
    portal.start()
    yield portal
    portal.stop()


def test_interrupted_call_is_given_up(portal: Portal) -> None:
    """Ctrl-C in a waiting call ends the waiting in the twin's thread, too; the twin works on."""
    service = Service()
    twin = twin_of(Service)(service, portal)
    with interrupted(service.waits.is_set):
        twin.wait()

    assert service.cancelled.wait(5)
    assert list(twin.numbers(2)) == [0, 1]


def test_interrupted_close_still_closes(database_url: str) -> None:
    gate = threading.Event()
    recorder = GatedNotifier(gate)
    with no_thread_left():
        store = SyncGatewayStore(database_url, plugins=[recorder]).open()
        store.approvals.issue_token(make_request())
        started = time.monotonic()
        threading.Timer(0.3, gate.set).start()
        with interrupted(lambda: time.monotonic() - started > 0.1):
            store.close()

        assert seen(recorder) == [("pending", "PENDING")]
        with pytest.raises(errors.StoreNotOpenError):
            store.keys.list()
        with store:
            assert store.keys.list() == []


class Signal(Exception):
    """What the handler of a signal raises."""


def handed_over(use: Callable[[Callable[[], object]], object]) -> int:
    """Run `use` with a signal at each step, until there are no more; return how many.

    Steps are where Python runs handlers: as a function begins, and after a function in C. They go from where `use`
    calls its argument to where the answer of the store's thread is waited for.
    """
    for step in itertools.count():
        left = step

        def profile(frame: FrameType, event: str, _value: object) -> None:
            nonlocal left
            if frame.f_code.co_name == "result":
                sys.setprofile(None)
            elif event in ("call", "c_return"):
                left -= 1
                if left < 0:
                    raise Signal

        # What the collector calls ignores errors.
        gc.disable()
        try:
            use(partial(sys.setprofile, profile))
        except Signal:
            continue
        finally:
            sys.setprofile(None)
            gc.enable()
        return step
    raise AssertionError


def test_a_signal_drops_no_event_of_a_call_that_ran(database_url: str) -> None:
    with SyncGatewayStore(database_url, redis_url="") as store:

        def use(begin: Callable[[], object]) -> None:
            with store.audit.call(CALL, CALLER, decision="ALLOW"):
                begin()

        signals = handed_over(use)
        dropped: Any = store.audit.call(CALL, CALLER, decision="ALLOW")
        dropped.event, dropped.itself = dropped.__enter__(), dropped
        del dropped
        gc.collect()
        deadline = time.monotonic() + 10
        while len(store.audit.list_recent(signals + 2)) <= signals + 1 and time.monotonic() < deadline:
            time.sleep(0.01)
        statuses = Counter(event.execution_status for event in store.audit.list_recent(signals + 2))

    # Before its first line `__exit__` does not know how the body ended. The first signal may come in the body.
    assert signals > 9
    assert (statuses["CANCELLED"], statuses["SUCCESS"] >= signals - 1) == (2, True)


@pytest.mark.system
def test_a_signal_leaves_no_call_half_handed_over(tmp_path: Path) -> None:
    store = SyncGatewayStore(f"sqlite:///{tmp_path / 'gateway.db'}", redis_url="")

    def use(begin: Callable[[], object], method: Callable[[], object]) -> None:
        with no_thread_left(), store:
            begin()
            try:
                method()
            finally:
                store.close()

    for method in (store.ping, lambda: list(store.audit.stream()), store.close):
        assert handed_over(partial(use, method=method)) > 9


def test_closing_ends_a_wait_in_another_thread(database_url: str) -> None:
    """Who waits for a decision while another thread closes the store is told so, and nothing is left open."""
    with no_thread_left(), ThreadPoolExecutor(1) as pool:
        with SyncGatewayStore(database_url) as store:
            token = store.approvals.issue_token(make_request())
            waiting = pool.submit(store.approvals.wait_for_decision, token, timeout_s=60)
            while not waiting.running():
                time.sleep(0.001)
        with pytest.raises(errors.StoreNotOpenError):
            waiting.result(timeout=5)


def test_forked_process_is_refused(store: SyncGatewayStore) -> None:
    """In a forked child, which has no thread for the loop, a call is refused rather than waiting for ever."""

    def use() -> None:
        for act in (store.keys.list, store.open, store.close):
            with pytest.raises(errors.StoreNotOpenError, match="another process"):
                act()

    child = forked(use)
    child.join(30)

    assert child.exitcode == 0
    assert store.keys.list() == []


def test_call_from_its_own_thread_is_refused(store: SyncGatewayStore) -> None:
    """What the store's thread runs, as a generator of events, cannot wait for that thread."""

    def events() -> Iterator[AuditEvent]:
        yield make_event()
        store.keys.list()

    with pytest.raises(RuntimeError, match="from its own thread"):
        store.audit.write_many(events())
    assert store.keys.list() == []


@pytest.mark.system
def test_program_that_forgets_to_close_ends(tmp_path: Path) -> None:
    program = """
from agent_gateway_store import SyncGatewayStore
from builders import CALL, CALLER
store = SyncGatewayStore().open()
call = store.audit.call(CALL, CALLER, decision="ALLOW")
call.__enter__()
print(len(store.keys.list()))
"""
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        timeout=60,
    )

    assert (done.returncode, done.stdout.strip()) == (0, "0"), done.stderr


def test_async_iterator_becomes_an_iterator(portal: Portal) -> None:
    """It gives items one by one, raises what the async one raises, and is closed where the caller stops early."""
    service = Service()
    twin = twin_of(Service)(service, portal)

    assert list(twin.numbers(2)) == [0, 1]
    with pytest.raises(ValueError, match="too many"):
        list(twin.numbers(3))
    service.closed.clear()
    items = twin.numbers(100)
    assert next(items) == 0
    assert not service.closed.is_set()
    items.close()
    assert service.closed.is_set()


async def test_streams_and_followers_are_plain_iterators(database_url: str, tmp_path: Path) -> None:
    """Beside a running loop, as in a notebook: search, stream, statistics, exports, and a follower that is left."""
    with SyncGatewayStore(database_url) as store:
        store.audit.write_many(make_event(request_id=f"r-{number}") for number in range(30))
        streamed = [event.request_id for event in store.audit.stream(caller_id="dev-agent")]
        assert streamed == [event.request_id for event in store.audit.search(limit=50)]
        assert store.audit.stats("caller_id")[0]["calls"] == 30
        assert store.audit.export(tmp_path / "e.jsonl").rows == 30
        assert store.audit.import_file(tmp_path / "e.jsonl") == Counter({WriteOutcome.DUPLICATE: 30})
        assert len(store.audit.to_pandas()) == 30
        cursor = store.audit.changes().next_cursor
        followed = store.audit.follow(start=cursor, poll_s=0.01)
        store.audit.write(make_event(request_id="new"))
        assert next(followed).request_id == "new"
        followed.close()
        for event in store.audit.stream():
            assert event.request_id == "new"
            break
