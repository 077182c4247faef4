"""`approvals.acquire` as a state machine: two gateways against a small model, while clock, Redis and processes change
and further gateways are killed."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from agent_gateway_store import ApprovalRequest, ApprovalResult, GatewayStore, StoreSettings, ToolCall, clock, errors
from agent_gateway_store.store import parts_of
from commands import python_path
from forks import forks
from proofs.harness import run_machine

pytestmark = [pytest.mark.usefixtures("no_plugins"), pytest.mark.system]

CALLS = [ToolCall(server="files", tool="delete_file", arguments={"path": path}) for path in ("/tmp/a", "/tmp/b")]
SHOWN = [{"path": "[hidden]"}, {"path": "[hidden]", "size": 1}]
DECIDE, USE, DENIAL = timedelta(hours=2), timedelta(hours=1), timedelta(minutes=5)
OPTIONS: dict[str, Any] = {"acquire_decision_seconds": DECIDE.total_seconds(), "redis_timeout_seconds": 5}
MOVE = st.sampled_from(["approve", "approve", "approve", "deny", "cancel"])
APPROVER = st.sampled_from(["ann", "bob"])


@dataclass(frozen=True)
class Asked:
    """A question, by numbers: of the caller, the call, and what is shown of it."""

    caller: int
    call: int
    bind: str
    needed: int
    shown: int

    @property
    def key(self) -> tuple[Any, ...]:
        return self.caller, self.call, self.bind


ASKED = st.builds(
    Asked,
    caller=st.sampled_from([0, 0, 1]),
    call=st.integers(0, 1),
    bind=st.sampled_from(["", "session"]),
    needed=st.sampled_from([1, 1, 1, 2]),
    shown=st.sampled_from([0, 0, 0, 1]),
)


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
    """Drives two open stores, as two processes have them, on one database and one Redis, and processes that die."""

    database_url: Callable[[], str]
    redis_url: str
    dying: Any
    folder: Path
    steps = 0
    kills = 0

    @initialize()
    def begin(self) -> None:
        clock.reset()
        self.runner = asyncio.Runner()
        self.known: list[Approval] = []
        self.url = type(self).database_url()
        self.ran = self.folder / f"{uuid4().hex}.ran"
        self.callers = [uuid4().hex, uuid4().hex]
        self.stores = [self._open(), self._open()]

    def _open(self) -> GatewayStore:
        store = GatewayStore(self.url, redis_url=self.redis_url, settings=StoreSettings(**OPTIONS))
        return self.runner.run(store.open())

    def teardown(self) -> None:
        if hasattr(self, "runner"):
            for store in self.stores:
                self.runner.run(store.close())
            self.runner.close()
        clock.reset()

    def _foresee(self, asked: Asked) -> tuple[str, Approval | None]:
        """What comes of a question, and the approval that it is about; None if a new one is asked for."""
        mine = [one for one in self.known if one.key == asked.key]
        standing = next((one for one in mine if one.status in ("PENDING", "APPROVED")), None)
        if standing is not None and asked.needed <= standing.needed and asked.shown == standing.shown:
            return ("USED" if standing.status == "APPROVED" else "PENDING"), standing
        denied = [one for one in mine if one.stored == "DENIED" and clock.offset() - one.decided < DENIAL]
        return ("DENIED", denied[-1]) if denied else ("PENDING", None)

    def _note_new(self, asked: Asked, approval_id: UUID) -> None:
        assert approval_id not in {one.approval_id for one in self.known}
        mine = [one for one in self.known if one.key == asked.key]
        for one in mine:
            if one.stored in ("PENDING", "APPROVED"):
                one.stored = "EXPIRED" if one.status == "EXPIRED" else "CANCELLED"
        used = [one for one in mine if one.stored == "USED"]
        is_unknown = bool(used) and used[-1].outcome is None
        deadline = clock.offset() + DECIDE
        self.known.append(Approval(asked.key, approval_id, asked.needed, asked.shown, "unknown" * is_unknown, deadline))

    def _request(self, asked: Asked) -> ApprovalRequest:
        return ApprovalRequest(
            request_id=uuid4().hex,
            caller_id=self.callers[asked.caller],
            tool_call=CALLS[asked.call].model_copy(update={"arguments": SHOWN[asked.shown]}),
            risk_explanation="why",
            required_approvals=asked.needed,
        )

    @rule(which=st.integers(0, 1), asked=ASKED)
    def acquire(self, which: int, asked: Asked) -> None:
        acquiring = self.stores[which].approvals.acquire(self._request(asked), call=CALLS[asked.call], bind=asked.bind)
        result: ApprovalResult = self.runner.run(acquiring)
        status, standing = self._foresee(asked)
        assert result.status == status
        if standing is None:
            self._note_new(asked, result.approval_id)
            return
        assert result.approval_id == standing.approval_id
        if status == "USED":
            standing.stored = status

    def _die(self, at: int | str, **told: Any) -> bool:
        """Have a process do a thing and be killed at a step of it; True if it had not so many steps, and ended."""
        told |= {
            "url": self.url,
            "redis_url": self.redis_url,
            "settings": OPTIONS,
            "ran": str(self.ran),
            "moved_s": clock.offset().total_seconds(),
            "at": at,
        }
        self.dying.stdin.write(json.dumps(told) + "\n")
        self.dying.stdin.flush()
        code = int(self.dying.stdout.readline())
        Acquiring.kills += code == -signal.SIGKILL
        assert code in (0, -signal.SIGKILL)
        return code == 0

    @rule(asked=ASKED, at=st.sampled_from(["used", "ran", "recorded"]) | st.integers(1, 10))
    def die_running(self, asked: Asked, at: int | str) -> None:
        """Between any two of question, use, intent, run, event and outcome; or nowhere."""
        request, call = self._request(asked), CALLS[asked.call]
        status, standing = self._foresee(asked)
        has_ended = self._die(
            at, request=request.model_dump(mode="json"), call=call.model_dump(mode="json"), bind=asked.bind
        )
        if standing is None:
            found = self.runner.run(self.stores[0].approvals.search(request_id=request.request_id))
            assert found or not has_ended
            if found:
                self._note_new(asked, found[0].approval_id)
        elif status == "USED":
            found = self.runner.run(self.stores[0].approvals.get(approval_id=standing.approval_id))
            events = self.runner.run(self.stores[0].audit.search(approval_id=standing.approval_id))
            phases = [event.extra["phase"] for event in events]
            runs = self._runs().count(str(standing.approval_id))
            # In this order, so that a later step was made only where all earlier ones were.
            reached = [found.status == "USED", "intent" in phases, runs == 1, "outcome" in phases, bool(found.outcome)]
            assert reached == sorted(reached, reverse=True)
            assert sum(reached) in {"used": [1], "ran": [3], "recorded": [4]}.get(str(at), range(6))
            assert all(reached) or not has_ended
            standing.stored, standing.outcome = str(found.status), found.outcome

    def _runs(self) -> list[str]:
        runs = self.ran.read_text().split() if self.ran.exists() else []
        assert len(runs) == len(set(runs))
        return runs

    def _may(self, approval: Approval, move: str, who: str) -> bool:
        if move == "cancel":
            return approval.status in ("PENDING", "APPROVED")
        return approval.status == "PENDING" and who not in approval.voters

    def _note_decided(self, approval: Approval, move: str, who: str) -> None:
        approval.voters.add(who)
        if move != "approve" or len(approval.voters) >= approval.needed:
            approval.stored = {"approve": "APPROVED", "deny": "DENIED", "cancel": "CANCELLED"}[move]
            approval.decided = clock.offset()
            approval.deadline = clock.offset() + USE

    @precondition(lambda self: self.known)
    @rule(data=st.data(), which=st.integers(0, 1), move=MOVE, who=APPROVER)
    def decide(self, data: st.DataObject, which: int, move: str, who: str) -> None:
        approval = data.draw(st.sampled_from(self.known[-4:]))
        may = self._may(approval, move, who)
        decide = getattr(self.stores[which].approvals, move)
        try:
            result = self.runner.run(decide(approval_id=approval.approval_id, approver_id=who))
        except errors.ApprovalError:
            assert not may
            return
        assert may
        self._note_decided(approval, move, who)
        assert result.status == approval.stored

    @precondition(lambda self: self.known)
    @rule(data=st.data(), move=MOVE, who=APPROVER, at=st.integers(1, 6))
    def die_deciding(self, data: st.DataObject, move: str, who: str, at: int) -> None:
        """Before the decision is committed, or after it and before anybody learns of it; or nowhere."""
        approval = data.draw(st.sampled_from(self.known[-4:]))
        may = self._may(approval, move, who)
        has_ended = self._die(at, approval_id=str(approval.approval_id), move=move, who=who)
        steps = self.runner.run(self.stores[0].approvals.history(approval.approval_id))
        if move == "cancel":
            counted = may and self.runner.run(self._status(approval)) == "CANCELLED"
        else:
            counted = may and who in {step["by"] for step in steps if step["event"] == "vote"}
        assert counted or not (may and has_ended)
        if counted:
            self._note_decided(approval, move, who)

    async def _status(self, approval: Approval) -> str:
        return str((await self.stores[0].approvals.get(approval_id=approval.approval_id)).status)

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


@contextmanager
def dying_gateways() -> Iterator[Any]:
    """The process from which gateways are forked that die."""
    command = [forks().programs / "python", "-W", "error", "-m", "integration.acquire_process"]
    environment = {**os.environ, "PYTHONPATH": python_path(Path(__file__).parents[1])}
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "env": environment}
    with subprocess.Popen(command, text=True, **pipes) as process:
        try:
            assert process.stdout.readline() == "open\n"  # type: ignore[union-attr]
            yield process
        finally:
            process.stdin.close()  # type: ignore[union-attr]
            process.wait(timeout=60)


@pytest.mark.parametrize(
    ("backend", "examples", "length"),
    [
        ("sqlite", 3, 35),
        ("postgres", 3, 35),
        pytest.param("sqlite", 60, 200, marks=pytest.mark.slow),
        pytest.param("postgres", 60, 200, marks=pytest.mark.slow),
    ],
)
def test_acquire_never_leaves_the_model(
    backend: str, examples: int, length: int, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """With PostgreSQL and Redis, and with SQLite and neither: one run for each use, and evidence of what was begun."""
    shared = request.getfixturevalue("migrated_postgres_database")() if backend == "postgres" else ""

    def database_url() -> str:
        return shared or f"sqlite:///{tmp_path}/{uuid4().hex}.db"

    redis_url = request.getfixturevalue("fresh_redis_url") if shared else ""
    Acquiring.steps = Acquiring.kills = 0
    with dying_gateways() as dying:
        parts = {"database_url": staticmethod(database_url), "redis_url": redis_url, "dying": dying, "folder": tmp_path}
        run_machine(type("Machine", (Acquiring,), parts), examples=examples, length=length)
    print(f"{backend}: {Acquiring.steps:,} steps, {Acquiring.kills:,} kills")
    assert Acquiring.steps >= (10_000 if examples > 3 else 50)
    assert Acquiring.kills >= (500 if examples > 3 else 3)
