"""`approvals.acquire` as a state machine: two gateways against a small model, while clock, Redis and processes change;
and very many callers at once, over processes and over threads."""

from __future__ import annotations

import asyncio
import json
import shutil
import sys
import threading
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from random import Random
from typing import Any
from uuid import UUID, uuid4

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
)

from agent_gateway_store import ApprovalRequest, ApprovalResult, GatewayStore, StoreSettings, ToolCall, clock, errors
from agent_gateway_store.store import parts_of
from proofs.harness import child, migrated, run_machine

pytestmark = pytest.mark.integration

CALLS = [ToolCall(server="files", tool="delete_file", arguments={"path": path}) for path in ("/tmp/a", "/tmp/b")]
SHOWN = [{"path": "[hidden]"}, {"path": "[hidden]", "size": 1}]
DECIDE, USE, DENIAL = timedelta(hours=2), timedelta(hours=1), timedelta(minutes=5)
WORKERS = 4


@dataclass
class Approval:
    """What the model knows of one approval; times are offsets of the clock."""

    key: tuple[Any, ...]
    approval_id: UUID
    needed: int
    shown: int
    explanation: str
    deadline: timedelta
    stored: str = "PENDING"
    outcome: str | None = None
    voters: set[str] = field(default_factory=set)
    decided: timedelta = timedelta()

    @property
    def status(self) -> str:
        is_over = self.stored in ("PENDING", "APPROVED") and clock.offset() >= self.deadline
        return "EXPIRED" if is_over else self.stored


class Acquiring(RuleBasedStateMachine):
    """Drives two open stores, as two processes have them, on one database and one Redis."""

    database_url: Callable[[], str]
    redis_url: str
    steps = 0

    @initialize()
    def begin(self) -> None:
        clock.reset()
        self.runner = asyncio.Runner()
        self.known: list[Approval] = []
        self.url = type(self).database_url()
        self.callers = [uuid4().hex, uuid4().hex]
        self.stores = [self._open(), self._open()]

    def _open(self) -> GatewayStore:
        options = StoreSettings(acquire_decision_seconds=DECIDE.total_seconds(), redis_timeout_seconds=5)
        return self.runner.run(GatewayStore(self.url, redis_url=self.redis_url, settings=options).open())

    def teardown(self) -> None:
        if hasattr(self, "runner"):
            for store in self.stores:
                self.runner.run(store.close())
            self.runner.close()
        clock.reset()

    @rule(
        which=st.integers(0, 1),
        caller=st.sampled_from([0, 0, 1]),
        call=st.integers(0, 1),
        bind=st.sampled_from(["", "session"]),
        needed=st.sampled_from([1, 1, 1, 2]),
        shown=st.sampled_from([0, 0, 0, 1]),
    )
    def acquire(self, which: int, caller: int, call: int, bind: str, needed: int, shown: int) -> None:
        request = ApprovalRequest(
            request_id=uuid4().hex,
            caller_id=self.callers[caller],
            tool_call=CALLS[call].model_copy(update={"arguments": SHOWN[shown]}),
            risk_explanation="why",
            required_approvals=needed,
        )
        approvals = self.stores[which].approvals
        result: ApprovalResult = self.runner.run(approvals.acquire(request, call=CALLS[call], bind=bind))
        mine = [one for one in self.known if one.key == (caller, call, bind)]
        standing = next((one for one in mine if one.status in ("PENDING", "APPROVED")), None)
        fits = standing is not None and needed <= standing.needed and shown == standing.shown
        denied = [one for one in mine if one.stored == "DENIED" and clock.offset() - one.decided < DENIAL]
        if standing is not None and fits:
            expected = "USED" if standing.status == "APPROVED" else "PENDING"
            assert (result.status, result.approval_id) == (expected, standing.approval_id)
            standing.stored = expected
        elif denied:
            assert (result.status, result.approval_id) == ("DENIED", denied[-1].approval_id)
        else:
            for one in mine:
                if one.stored in ("PENDING", "APPROVED"):
                    one.stored = "EXPIRED" if one.status == "EXPIRED" else "CANCELLED"
            assert result.status == "PENDING"
            assert result.approval_id not in {one.approval_id for one in self.known}
            used = [one for one in mine if one.stored == "USED"]
            is_unknown = bool(used) and used[-1].outcome is None
            deadline = clock.offset() + DECIDE
            new = Approval((caller, call, bind), result.approval_id, needed, shown, "unknown" * is_unknown, deadline)
            self.known.append(new)

    @precondition(lambda self: self.known)
    @rule(
        data=st.data(),
        which=st.integers(0, 1),
        move=st.sampled_from(["approve", "approve", "approve", "deny", "cancel"]),
        who=st.sampled_from(["ann", "bob"]),
    )
    def decide(self, data: st.DataObject, which: int, move: str, who: str) -> None:
        approval = data.draw(st.sampled_from(self.known[-4:]))
        decide = getattr(self.stores[which].approvals, move)
        is_open = approval.status == "PENDING" or (move == "cancel" and approval.status == "APPROVED")
        may = is_open and (move == "cancel" or who not in approval.voters)
        try:
            result = self.runner.run(decide(approval_id=approval.approval_id, approver_id=who))
        except errors.ApprovalError:
            assert not may
            return
        assert may
        approval.voters.add(who)
        if move != "approve" or len(approval.voters) >= approval.needed:
            approval.stored = {"approve": "APPROVED", "deny": "DENIED", "cancel": "CANCELLED"}[move]
            approval.decided = clock.offset()
            approval.deadline = clock.offset() + USE
        assert result.status == approval.stored

    @precondition(lambda self: self.known)
    @rule(data=st.data(), which=st.integers(0, 1))
    def record_outcome(self, data: st.DataObject, which: int) -> None:
        approval = data.draw(st.sampled_from(self.known[-4:]))
        recording = self.stores[which].approvals.record_outcome(approval_id=approval.approval_id, outcome="SUCCESS")
        try:
            self.runner.run(recording)
        except errors.ApprovalNotApprovedError:
            assert approval.stored != "USED"
        else:
            assert approval.stored == "USED"
            approval.outcome = "SUCCESS"

    @rule(minutes=st.sampled_from([3, 7, 31, 125]))
    def move_clock(self, minutes: int) -> None:
        clock.move(timedelta(minutes=minutes))

    @rule(which=st.integers(0, 1))
    def sweep(self, which: int) -> None:
        self.runner.run(self.stores[which].approvals.expire_stale())
        for approval in self.known:
            approval.stored = approval.status

    @rule(which=st.integers(0, 1))
    def new_process(self, which: int) -> None:
        self.runner.run(self.stores[which].close())
        self.stores[which] = self._open()

    @rule()
    def flush_redis(self) -> None:
        client: Any = parts_of(self.stores[0]).redis.client
        if client is not None:
            self.runner.run(client.flushdb())

    @invariant()
    def sql_is_the_model(self) -> None:
        Acquiring.steps += 1
        for approval in getattr(self, "known", [])[-3:]:
            found = self.runner.run(self.stores[0].approvals.get(approval_id=approval.approval_id))
            assert (found.status, found.outcome) == (approval.status, approval.outcome), approval
            assert ("unknown" in found.risk_explanation) == bool(approval.explanation)


@pytest.mark.parametrize(
    ("backend", "examples", "length"),
    [
        ("sqlite", 4, 40),
        ("postgres", 4, 40),
        pytest.param("sqlite", 60, 200, marks=pytest.mark.slow),
        pytest.param("postgres", 60, 200, marks=pytest.mark.slow),
    ],
)
def test_acquire_never_leaves_the_model(
    backend: str,
    examples: int,
    length: int,
    tmp_path: Path,
    request: pytest.FixtureRequest,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With PostgreSQL and Redis, and with SQLite and neither."""
    monkeypatch.setenv("AGENT_GATEWAY_STORE_LOAD_PLUGINS", "")
    template = migrated(f"sqlite:///{tmp_path / 'template.db'}") if backend == "sqlite" else ""
    shared = "" if template else request.getfixturevalue("migrated_postgres_database")()

    def database_url() -> str:
        if shared:
            return str(shared)
        path = tmp_path / f"{uuid4().hex}.db"
        shutil.copy(tmp_path / "template.db", path)
        return f"sqlite:///{path}"

    redis_url = request.getfixturevalue("fresh_redis_url") if shared else ""
    machine = type("Machine", (Acquiring,), {"database_url": staticmethod(database_url), "redis_url": redis_url})
    Acquiring.steps = 0
    run_machine(machine, examples=examples, length=length)
    assert Acquiring.steps >= (10_000 if examples > 4 else 100)


SIZES = [(5, 10), pytest.param(100, 50, marks=pytest.mark.slow)]
"""Approvals, and how many callers of each process want to use each of them."""

SERVING = """
import asyncio, sys
from integration.test_acquire_machine import serve

asyncio.run(serve(sys.argv[1]))
"""


def wanted(number: int, caller_id: str = "dev-agent") -> ApprovalRequest:
    call = ToolCall(server="files", tool="delete_file", arguments={"number": number})
    return ApprovalRequest(request_id=uuid4().hex, caller_id=caller_id, tool_call=call, risk_explanation="deletes")


async def crowd(store: GatewayStore, number: int, callers: int) -> list[str]:
    """Let so many tasks acquire one call at once."""
    results = await asyncio.gather(*(store.approvals.acquire(wanted(number)) for _ in range(callers)))
    return [f"{result.status} {result.approval_id}" for result in results]


async def serve(url: str) -> None:
    """Do what the lines of the input say, as one of several processes."""
    async with GatewayStore(url, redis_url="") as store:
        print("open", flush=True)
        while line := await asyncio.to_thread(sys.stdin.readline):
            print(json.dumps(await crowd(store, *json.loads(line))), flush=True)


def judge(asked: ApprovalResult, answers: list[str]) -> None:
    """Fail unless one caller runs, by the approval that was given, and all others share the next question."""
    counted = Counter(answers)
    assert counted.pop(f"USED {asked.approval_id}") == 1
    ((pending, count),) = counted.items()
    assert (pending.split()[0], count) == ("PENDING", len(answers) - 1)


async def ask_and_approve(store: GatewayStore, number: int) -> ApprovalResult:
    asked = await store.approvals.acquire(wanted(number))
    return await store.approvals.approve(approval_id=asked.approval_id, approver_id="approver-1")


@pytest.mark.parametrize("rounds", [20, pytest.param(1_000, marks=pytest.mark.slow)])
async def test_no_release_goes_to_the_wrong_agent(
    migrated_postgres_database: Callable[[], str], rounds: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two agents ask for the same call and for different ones, in every order, while a human decides about some."""
    monkeypatch.setenv("AGENT_GATEWAY_STORE_LOAD_PLUGINS", "")
    order = Random(16)
    async with GatewayStore(migrated_postgres_database(), redis_url="") as store:
        for number in range(rounds):
            agents = [f"agent-{number}-{each}" for each in "ab"]
            # Numbers 0 and 1 are wanted by both, 2 and 3 by one each.
            wants = [(agents[0], 0), (agents[0], 1), (agents[0], 2), (agents[1], 0), (agents[1], 1), (agents[1], 3)]
            asked = {want: await store.approvals.acquire(wanted(want[1], want[0])) for want in wants}
            approved = {want for want in wants if order.random() < 0.5}

            async def decide(want: tuple[str, int], asked: dict[Any, ApprovalResult] = asked) -> None:
                await store.approvals.approve(approval_id=asked[want].approval_id, approver_id="alice")

            async def run(want: tuple[str, int]) -> tuple[tuple[str, int], ApprovalResult]:
                return want, await store.approvals.acquire(wanted(want[1], want[0]))

            steps: list[Any] = [decide(want) for want in approved] + [run(want) for want in wants * 2]
            order.shuffle(steps)
            answers = [each for each in await asyncio.gather(*steps) if each is not None]
            answers += [await run(want) for want in wants]
            released = [(want, result.approval_id) for want, result in answers if result.status == "USED"]
            assert sorted(released) == sorted((want, asked[want].approval_id) for want in approved)


@pytest.mark.parametrize(("approvals", "callers"), SIZES)
async def test_one_of_many_processes_runs(
    migrated_postgres_database: Callable[[], str], approvals: int, callers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Four processes acquire the same calls on one PostgreSQL at the same moment."""
    monkeypatch.setenv("AGENT_GATEWAY_STORE_LOAD_PLUGINS", "")
    url = migrated_postgres_database()
    async with AsyncExitStack() as stack:
        store = await stack.enter_async_context(GatewayStore(url, redis_url=""))
        workers = [await stack.enter_async_context(child(SERVING, url)) for _ in range(WORKERS)]
        for number in range(approvals):
            asked = await ask_and_approve(store, number)
            for process in workers:
                process.stdin.write(f"{json.dumps([number, callers])}\n".encode())
            judge(asked, [answer for process in workers for answer in json.loads(await process.stdout.readline())])


@pytest.mark.parametrize(("approvals", "callers"), SIZES)
def test_one_of_many_threads_runs(
    tmp_path: Path, approvals: int, callers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Four threads, each with an event loop and a store of its own, do the same on one SQLite file."""
    monkeypatch.setenv("AGENT_GATEWAY_STORE_LOAD_PLUGINS", "")
    url, barrier = migrated(f"sqlite:///{tmp_path}/gateway.db"), threading.Barrier(WORKERS, timeout=60)
    asked: list[ApprovalResult] = []
    answers: list[str] = []

    def worker(is_first: bool) -> None:
        async def work() -> None:
            async with GatewayStore(url, redis_url="") as store:
                for number in range(approvals):
                    if is_first:
                        asked[:] = [await ask_and_approve(store, number)]
                    await asyncio.to_thread(barrier.wait)
                    answers.extend(await crowd(store, number, callers))
                    await asyncio.to_thread(barrier.wait)
                    if is_first:
                        judge(asked[0], answers)
                        answers.clear()

        asyncio.run(work())

    with ThreadPoolExecutor(WORKERS) as pool:
        for done in [pool.submit(worker, index == 0) for index in range(WORKERS)]:
            done.result()
