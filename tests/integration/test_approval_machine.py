"""Approvals as a state machine: two gateways against a small model, while clock, Redis and processes change."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from agent_gateway_store import ApprovalRequest, GatewayStore, StoreSettings, ToolCall, clock, errors
from agent_gateway_store.store import parts_of
from proofs.harness import run_machine
from servers import RedisServer

pytestmark = [pytest.mark.usefixtures("no_plugins"), pytest.mark.system]

CALL = ToolCall(server="files", tool="delete_file", arguments={"path": "/tmp/report.txt"})
OTHER_CALL = ToolCall(server="files", tool="delete_file", arguments={"path": "/etc/passwd"})
CALLER = "dev-agent"
HOUR = timedelta(hours=1)
TRUST_S = [0.0, 0.05, 0.3]
"""APPROVAL_CACHE_SECONDS of the gateways; the model must hold whichever it is."""
REFUSALS = {
    "not found": errors.ApprovalNotFoundError,
    "decided": errors.ApprovalAlreadyDecidedError,
    "voted": errors.ApprovalAlreadyVotedError,
    "self": errors.SelfApprovalError,
    "not approved": errors.ApprovalNotApprovedError,
    "expired": errors.ApprovalExpiredError,
    "used": errors.ApprovalAlreadyUsedError,
    "mismatch": errors.ApprovalMismatchError,
}


@dataclass
class Approval:
    """What the model knows of one approval.

    Attributes:
        past: Each status it had, with the (real) time at which it had ended.
        old_tokens: Tokens that another one has replaced, with the time.
        asked: Which call it is for.
        real: What was the time, less the offset of the clock, when it was asked.
    """

    token: str
    asked: str
    needed: int
    expires: timedelta
    use_before: timedelta | None
    approval_id: UUID | None = None
    stored: str = "PENDING"
    voters: set[str] = field(default_factory=set)
    votes: int = 0
    outcome: str | None = None
    decider: str | None = None
    past: list[tuple[str, float]] = field(default_factory=list)
    old_tokens: dict[str, float] = field(default_factory=dict)
    real: datetime = field(default_factory=lambda: clock.utc_now() - clock.offset())

    @property
    def status(self) -> str:
        """As a reader sees it."""
        deadline = self.expires if self.stored == "PENDING" else self.use_before or self.expires
        is_over = self.stored in ("PENDING", "APPROVED") and clock.offset() >= deadline
        return "EXPIRED" if is_over else self.stored

    def become(self, status: str) -> None:
        self.past.append((self.stored, time.monotonic()))
        self.stored = status

    def can_vote(self, who: str) -> str:
        """What an approver is told: "" or a refusal."""
        if self.status == "EXPIRED":
            return "expired"
        if self.status != "PENDING":
            return "decided"
        return "self" if who == CALLER else "voted" if who in self.voters else ""


class Approvals(RuleBasedStateMachine):
    """Drives two open stores, as two processes have them, on one database and one Redis."""

    database_url: Callable[[], str]
    server: RedisServer
    calls = 0
    steps = 0

    @initialize(trust=st.sampled_from(TRUST_S))
    def begin(self, trust: float) -> None:
        clock.reset()
        self.runner = asyncio.Runner()
        self.known: list[Approval] = []
        self.trust_s = trust
        self.is_up = True
        self.url = type(self).database_url()
        if not self.server.is_running:
            self.server.start()
        self.stores = [self._open(), self._open()]
        self.runner.run(self._forget_everything())
        for needed in (1, 2):
            self._issue(self.stores[0], needed, 2, None)

    async def _forget_everything(self) -> None:
        async with self.stores[0].database.engine.begin() as connection:
            for table in ("approval_votes", "approval_requests"):
                await connection.exec_driver_sql(f"DELETE FROM {table}")

    def _open(self) -> GatewayStore:
        options = StoreSettings(approval_cache_seconds=self.trust_s)
        return self.runner.run(GatewayStore(self.url, redis_url=self.server.url, settings=options).open())

    def teardown(self) -> None:
        if hasattr(self, "runner"):
            for store in self.stores:
                assert store.database.engine.pool.checkedout() == 0  # type: ignore[attr-defined]
                self.runner.run(store.close())
            self.runner.close()
        clock.reset()

    def _call(self, work: Awaitable[Any]) -> Any:
        """Return what a call returns, or which refusal it was."""

        async def call() -> Any:
            return await work

        Approvals.calls += 1
        try:
            return self.runner.run(call())
        except errors.ApprovalError as exc:
            self.refusal: Any = exc
            return next(name for name, kind in REFUSALS.items() if type(exc) is kind)

    def _pick(self, data: st.DataObject) -> tuple[Any, Approval]:
        store = self.stores[data.draw(st.integers(0, 1), label="gateway")]
        return store.approvals, self.known[data.draw(st.integers(0, len(self.known) - 1), label="approval")]

    @rule(
        data=st.data(),
        needed=st.sampled_from([1, 1, 2]),
        hours=st.integers(1, 3),
        use_hours=st.none() | st.integers(1, 5),
    )
    def issue(self, data: st.DataObject, needed: int, hours: int, use_hours: int | None) -> None:
        self._issue(self.stores[data.draw(st.integers(0, 1), label="gateway")], needed, hours, use_hours)

    def _issue(self, store: GatewayStore, needed: int, hours: int, use_hours: int | None) -> None:
        now = clock.offset()
        uses = None if use_hours is None else now + use_hours * HOUR
        asked = uuid4().hex
        self._ask(store, Approval("", asked, needed, now + hours * HOUR, uses))

    def _ask(self, store: GatewayStore, approval: Approval) -> None:
        approval.token = self._call(store.approvals.issue_token(self._request(approval)))
        result = self._call(store.approvals.check_token(approval.token, fresh=True))
        approval.approval_id = result.approval_id
        self.known.append(approval)

    def _request(self, approval: Approval) -> ApprovalRequest:
        real = approval.real
        return ApprovalRequest(
            request_id=approval.asked,
            caller_id=CALLER,
            tool_call=CALL,
            risk_explanation="deletes a file",
            required_approvals=approval.needed,
            expires_at=real + approval.expires,
            use_before=None if approval.use_before is None else real + approval.use_before,
        )

    @precondition(lambda self: self.known)
    @rule(data=st.data())
    def ask_again(self, data: st.DataObject) -> None:
        approvals, approval = self._pick(data)
        if approval.status != "PENDING":
            return
        token = self._call(approvals.issue_token(self._request(approval)))
        approval.old_tokens[approval.token] = time.monotonic()
        approval.token = token

    @precondition(lambda self: self.known)
    @rule(data=st.data(), needed=st.integers(1, 3), later=st.booleans())
    def ask_on_other_terms(self, data: st.DataObject, needed: int, later: bool) -> None:
        store = self.stores[data.draw(st.integers(0, 1), label="gateway")]
        _, old = self._pick(data)
        if old.status != "PENDING" or (needed == old.needed and not later):
            return
        expires = old.expires + HOUR if later else old.expires
        self._ask(store, Approval("", old.asked, needed, expires, old.use_before, real=old.real))
        old.become("CANCELLED")
        old.decider = CALLER

    @precondition(lambda self: self.known)
    @rule(
        data=st.data(),
        move=st.sampled_from(["approve", "approve", "deny", "cancel"]),
        who=st.sampled_from(["ann", "bob", "eve", CALLER]),
    )
    def decide(self, data: st.DataObject, move: str, who: str) -> None:
        approvals, approval = self._pick(data)
        by_id = data.draw(st.booleans(), label="by id")
        name = {"approval_id": approval.approval_id} if by_id else {"token": approval.token}
        answer = self._call(getattr(approvals, move)(**name, approver_id=who))
        if move == "cancel":
            allowed = approval.status in ("PENDING", "APPROVED")
            refusal = "" if allowed else "expired" if approval.status == "EXPIRED" else "decided"
        else:
            refusal = approval.can_vote(who)
            if move == "deny" and refusal == "self":
                refusal = "voted" if who in approval.voters else ""
        if refusal:
            assert answer == refusal, approval
            if refusal == "decided":
                assert (self.refusal.status, self.refusal.approver_id) == (approval.status, approval.decider)
            return
        approval.voters.add(who)
        if move == "approve":
            approval.votes += 1
            if approval.votes >= approval.needed:
                approval.become("APPROVED")
        else:
            approval.become("DENIED" if move == "deny" else "CANCELLED")
        if approval.stored != "PENDING":
            approval.decider = who
        stands = approval.approval_id, approval.stored, approval.decider
        assert (answer.approval_id, answer.status, answer.approver_id) == stands

    @precondition(lambda self: self.known)
    @rule(
        data=st.data(), caller=st.sampled_from([CALLER, CALLER, "mallory"]), right=st.sampled_from([True, True, False])
    )
    def consume(self, data: st.DataObject, caller: str, right: bool) -> None:
        approvals, approval = self._pick(data)
        call = CALL if right else OTHER_CALL
        answer = self._call(approvals.consume_token(approval.token, caller_id=caller, tool_call=call))
        by_status = {"APPROVED": "", "USED": "used", "EXPIRED": "expired"}
        refusal = by_status.get(approval.status, "not approved") if caller == CALLER and right else "mismatch"
        if refusal:
            assert answer == refusal, approval
        else:
            assert (answer.status, answer.approval_id) == ("USED", approval.approval_id)
            approval.become("USED")

    @precondition(lambda self: self.known)
    @rule(data=st.data(), outcome=st.sampled_from(["SUCCESS", "TOOL_ERROR"]))
    def record_outcome(self, data: st.DataObject, outcome: str) -> None:
        approvals, approval = self._pick(data)
        answer = self._call(approvals.record_outcome(approval.token, outcome))
        if approval.stored != "USED":
            assert answer == "not approved"
        elif approval.outcome not in (None, outcome):
            assert answer == "used"
        else:
            assert answer.status == "USED"
            approval.outcome = outcome

    @rule(minutes=st.sampled_from([-20, 7, 31, 61, 125]))
    def move_clock(self, minutes: int) -> None:
        if minutes < 0 and clock.offset() < HOUR:
            return
        for approval in self.known:
            approval.past.append((approval.status, float("inf")))
        clock.move(timedelta(minutes=minutes))
        for approval in self.known:
            # Deadlines are met to the minute, so no status depends on how long the test takes.
            status, _ = approval.past.pop()
            if status != approval.status:
                approval.past.append((status, time.monotonic()))

    @rule(data=st.data())
    def sweep(self, data: st.DataObject) -> None:
        store = self.stores[data.draw(st.integers(0, 1), label="gateway")]
        overdue = [one for one in self.known if one.status == "EXPIRED" and one.stored != "EXPIRED"]
        assert self._call(store.approvals.expire_stale(batch_size=2)) == len(overdue)
        for approval in overdue:
            approval.become("EXPIRED")

    @precondition(lambda self: self.known)
    @rule(data=st.data())
    def check(self, data: st.DataObject) -> None:
        """What is served may be as old as APPROVAL_CACHE_SECONDS, and not older."""
        approvals, approval = self._pick(data)
        begun = time.monotonic()
        answer = self._call(approvals.check_token(approval.token))
        recent = {status for status, end in approval.past if begun - end < self.trust_s}
        assert str(answer.status) in recent | {approval.status}, approval
        assert answer.approval_id == approval.approval_id
        if answer.status == approval.status:
            assert answer.approver_id == approval.decider
        for token, end in list(approval.old_tokens.items())[-2:]:
            begun = time.monotonic()
            answer = self._call(approvals.check_token(token))
            assert answer == "not found" or begun - end < self.trust_s
            assert self._call(approvals.consume_token(token, caller_id=CALLER, tool_call=CALL)) == "not found"

    @precondition(lambda self: self.known)
    @rule(data=st.data())
    def wait(self, data: st.DataObject) -> None:
        approvals, approval = self._pick(data)
        assert self._call(approvals.wait_for_decision(approval.token, timeout_s=0)).status == approval.status

    @rule()
    def flush_redis(self) -> None:
        if self.is_up:
            self.runner.run(self._flush())

    async def _flush(self) -> None:
        client = parts_of(self.stores[0]).redis.client
        assert client is not None
        with suppress(Exception):
            await client.flushall()

    @rule()
    def stop_or_start_redis(self) -> None:
        if self.is_up:
            self.server.kill()
        else:
            self.server.start()
        self.is_up = not self.is_up

    @precondition(lambda self: self.is_up)
    @rule()
    def hang_redis(self) -> None:
        """One call while Redis hangs; what it could not do then is done when it goes on."""
        self.server.pause()
        try:
            for approval in self.known[-1:]:
                self._call(self.stores[0].approvals.check_token(approval.token, fresh=True))
        finally:
            self.server.resume()

    @rule(which=st.integers(0, 1))
    def new_process(self, which: int) -> None:
        self.runner.run(self.stores[which].close())
        self.stores[which] = self._open()

    @rule(seconds=st.sampled_from([0.01, 0.06, 0.35]))
    def time_passes(self, seconds: float) -> None:
        self.runner.run(asyncio.sleep(seconds))

    @invariant()
    def sql_is_the_model(self) -> None:
        """Fresh reads through either gateway are what the model says."""
        Approvals.steps += 1
        for index, approval in enumerate(self.known[-4:]):
            approvals = self.stores[index % 2].approvals
            answer = self._call(approvals.get(approval_id=approval.approval_id))
            stands = approval.status, approval.decider, approval.outcome
            assert (answer.status, answer.approver_id, answer.outcome) == stands
            if index == 0:
                assert self._call(approvals.check_token(approval.token, fresh=True)).status == approval.status


@pytest.fixture
def server() -> Iterator[RedisServer]:
    """A Redis server that the machine stops and starts."""
    with RedisServer() as started:
        yield started


@pytest.mark.parametrize(
    ("backend", "examples", "length"),
    [
        ("sqlite", 2, 60),
        ("postgres", 2, 60),
        pytest.param("sqlite", 80, 200, marks=pytest.mark.slow),
        pytest.param("postgres", 80, 200, marks=pytest.mark.slow),
    ],
)
def test_gateways_never_leave_the_model(
    backend: str, examples: int, length: int, server: RedisServer, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """No answer differs from the model, and none through Redis is older than APPROVAL_CACHE_SECONDS."""
    make: Callable[[], str] = request.getfixturevalue("migrated_postgres_database")
    postgres = make() if backend == "postgres" else ""

    def database_url() -> str:
        return postgres or f"sqlite:///{tmp_path}/{uuid4().hex}.db"

    machine = type("Machine", (Approvals,), {"database_url": staticmethod(database_url), "server": server})
    Approvals.steps, Approvals.calls, start = 0, 0, time.monotonic()
    run_machine(machine, examples=examples, length=length)
    print(f"{backend}: {Approvals.steps} steps, {Approvals.calls} calls, {time.monotonic() - start:.1f} s")
    assert Approvals.steps >= (10_000 if examples > 2 else 100)
