"""Two gateway processes on one PostgreSQL and one Redis behave as one: also by the tests of a single store."""

from __future__ import annotations

import asyncio
import base64
import importlib
import inspect
import itertools
import pickle
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
import pytest_asyncio
from sqlalchemy import make_url

from agent_gateway_store import AuditEvent, GatewayStore, WriteOutcome, clock, errors
from builders import CALL, make_event, make_request
from proofs.harness import child, execute, migrated
from tampering import triggers_off

pytestmark = [pytest.mark.asyncio(loop_scope="module"), pytest.mark.system]

SERVING = """
import asyncio, sys
from integration.test_two_gateways import serve

asyncio.run(serve(*sys.argv[1:3]))
"""
SUITES = ("test_approvals", "test_approvals_deadlines", "test_keys")
"""Tests of the contract; of these, the ones that need a store and nothing else are run over two processes."""
INSIDE = ("counted_statements", "store._")
"""Words of tests that look into the process of the store itself."""


def packed(value: Any) -> bytes:
    return base64.b64encode(pickle.dumps(value)) + b"\n"


def unpacked(line: bytes | str) -> Any:
    return pickle.loads(base64.b64decode(line))


async def serve(database_url: str, redis_url: str) -> None:
    """Be a gateway: carry out the calls of the input, any number at once."""
    async with GatewayStore(database_url, redis_url=redis_url) as store:
        running: set[asyncio.Task[None]] = set()
        print("open", flush=True)

        async def carry_out(number: int, org_id: str | None, path: str, args: Any, kwargs: Any) -> None:
            service, _, name = path.partition(".")
            view = store if org_id is None else store.for_org(org_id)
            try:
                answer = (True, await getattr(getattr(view, service), name)(*args, **kwargs))
            except Exception as exc:
                # As parts: an error's text is made from other arguments than it has afterwards.
                answer = (False, (type(exc), str(exc), vars(exc)))
            print(packed((number, *answer)).decode(), end="", flush=True)

        while line := await asyncio.to_thread(sys.stdin.readline):
            offset, *call = unpacked(line)
            clock.reset()
            clock.move(offset)
            task = asyncio.create_task(carry_out(*call))
            running.add(task)
            task.add_done_callback(running.discard)


class Gateway:
    """A gateway process, as it is called from here."""

    def __init__(self, process: Any) -> None:
        self._process = process
        self._numbers = itertools.count()
        self._answers: dict[int, asyncio.Future[Any]] = {}
        self._reading = asyncio.create_task(self._read())

    async def _read(self) -> None:
        while line := await self._process.stdout.readline():
            number, is_good, value = unpacked(line)
            if is_good:
                self._answers.pop(number).set_result(value)
            else:
                kind, text, attributes = value
                error = kind.__new__(kind, text)
                error.args = (text,)
                vars(error).update(attributes)
                self._answers.pop(number).set_exception(error)

    async def call(self, org_id: str | None, path: str, args: Any, kwargs: Any) -> Any:
        number = next(self._numbers)
        answer = self._answers[number] = asyncio.get_running_loop().create_future()
        self._process.stdin.write(packed((clock.offset(), number, org_id, path, args, kwargs)))
        return await answer

    async def close(self) -> None:
        self._process.stdin.close()
        await self._process.wait()
        await self._reading


class Service:
    """`store.approvals`, say, of gateways that take turns."""

    def __init__(self, gateways: list[Gateway], name: str, org_id: str | None) -> None:
        self._turns = itertools.cycle(gateways)
        self._name, self._org_id = name, org_id

    def __getattr__(self, name: str) -> Callable[..., Awaitable[Any]]:
        return lambda *args, **kwargs: next(self._turns).call(self._org_id, f"{self._name}.{name}", args, kwargs)


class Remote:
    """What looks like one store and is several processes; what tests look into is a store of this process."""

    def __init__(self, gateways: list[Gateway], store: GatewayStore, org_id: str | None = None) -> None:
        self._gateways, self._store = gateways, store
        self.approvals, self.keys, self.audit = (
            Service(gateways, name, org_id) for name in ("approvals", "keys", "audit")
        )
        self.database, self.settings, self.hash_args = store.database, store.settings, store.hash_args

    def for_org(self, org_id: str) -> Remote:
        return Remote(self._gateways, self._store, org_id)


Pair = tuple[Remote, Remote, Remote]
"""The first gateway, the second, and both in turns."""


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def shared(
    postgres_url: str, redis_url: str, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[tuple[Pair, GatewayStore]]:
    """Two gateway processes, and a store of this process on their database."""
    name = f"two_gateways_{uuid4().hex}"
    await execute(postgres_url, f"CREATE DATABASE {name} TEMPLATE template0")
    url = migrated(make_url(postgres_url).set(database=name).render_as_string(hide_password=False))
    async with AsyncExitStack() as stack:
        stack.push_async_callback(execute, postgres_url, f"DROP DATABASE {name} WITH (FORCE)")
        environment = stack.enter_context(pytest.MonkeyPatch.context())
        environment.setenv("AGENT_GATEWAY_STORE_LOAD_PLUGINS", "")
        environment.setenv("AUDIT_SPOOL_PATH", str(tmp_path_factory.mktemp("two") / "spool.db"))
        environment.setenv("BCRYPT_ROUNDS", "4")
        store = await stack.enter_async_context(GatewayStore(url, redis_url=redis_url))
        starting = [stack.enter_async_context(child(SERVING, url, redis_url)) for _ in range(2)]
        both = [Gateway(process) for process in await asyncio.gather(*starting)]
        for one in both:
            stack.push_async_callback(one.close)
        yield (Remote(both[:1], store), Remote(both[1:], store), Remote(both, store)), store


@pytest_asyncio.fixture(loop_scope="module")
async def gateways(shared: tuple[Pair, GatewayStore]) -> Pair:
    """The two, on empty tables."""
    await empty(shared[1])
    return shared[0]


async def empty(store: Any) -> None:
    async with store.database.engine.begin() as connection, triggers_off(connection):
        for table in ("approval_votes", "approval_requests", "api_keys", "audit_events"):
            await connection.exec_driver_sql(f"DELETE FROM {table}")


async def test_wait_in_one_and_decide_in_the_other(gateways: Pair) -> None:
    """Asked and awaited here, decided there, the decision arrives at once; the other one may use it, once."""
    first, second, _ = gateways
    for decide, status in ((second.approvals.approve, "APPROVED"), (second.approvals.deny, "DENIED")):
        token = await first.approvals.issue_token(make_request())
        waiting = [
            asyncio.create_task(one.approvals.wait_for_decision(token, timeout_s=20)) for one in (first, second, first)
        ]
        await asyncio.sleep(0.3)
        start = time.monotonic()
        await decide(token, "approver-1", "seen")
        answers = await asyncio.gather(*waiting)

        assert time.monotonic() - start < 10
        assert {(answer.status, answer.approver_id, answer.note) for answer in answers} == {
            (status, "approver-1", "seen")
        }
        used = await asyncio.gather(
            *(one.approvals.consume_token(token, caller_id="dev-agent", tool_call=CALL) for one in (first, second)),
            return_exceptions=True,
        )
        released = [answer for answer in used if not isinstance(answer, BaseException)]
        assert len(released) == (status == "APPROVED")
        kinds = {type(answer) for answer in used if isinstance(answer, BaseException)}
        assert kinds == {errors.ApprovalAlreadyUsedError if released else errors.ApprovalNotApprovedError}


async def test_what_one_decided_the_other_knows(gateways: Pair) -> None:
    """A status read through Redis follows every change made by the other process, and so does an exchanged token."""
    first, second, _ = gateways
    request = make_request(required_approvals=2)
    old = await first.approvals.issue_token(request)
    assert (await second.approvals.check_token(old)).status == "PENDING"
    token = await second.approvals.issue_token(request.model_copy(update={"token": "another-token"}))
    with pytest.raises(errors.ApprovalNotFoundError):
        await first.approvals.check_token(old)
    assert (await first.approvals.approve(token, "ann")).status == "PENDING"
    with pytest.raises(errors.ApprovalAlreadyVotedError):
        await second.approvals.approve(token, "ann")
    assert (await second.approvals.approve(token, "bob")).status == "APPROVED"
    assert (await first.approvals.check_token(token)).status == "APPROVED"
    await first.approvals.consume_token(token, caller_id="dev-agent", tool_call=CALL)
    assert (await second.approvals.check_token(token)).status == "USED"
    await second.approvals.record_outcome(token, "SUCCESS")
    with pytest.raises(errors.ApprovalAlreadyUsedError):
        await first.approvals.record_outcome(token, "TOOL_ERROR")


async def test_what_one_writes_the_other_finds(gateways: Pair) -> None:
    """An audit event is stored once, whichever process it is sent to again; organisations stay apart everywhere."""
    first, second, both = gateways
    event = make_event()
    outcomes = await asyncio.gather(*(both.for_org("acme").audit.write(event) for _ in range(10)))
    found: AuditEvent = await second.for_org("acme").audit.get_by_request_id(event.request_id)

    assert sorted(outcomes) == sorted([WriteOutcome.STORED, *[WriteOutcome.DUPLICATE] * 9])
    assert found.org_id == "acme"
    assert await first.for_org("globex").audit.get_by_request_id(event.request_id) is None
    token = await first.for_org("acme").approvals.issue_token(make_request())
    with pytest.raises(errors.ApprovalNotFoundError):
        await second.for_org("globex").approvals.check_token(token)


async def test_the_contract_holds_across_processes(gateways: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every contract test that needs nothing but a store passes where each call goes to the other process."""
    _, _, both = gateways
    monkeypatch.syspath_prepend(str(Path(__file__).parent.parent / "contract"))
    passed, failed = [], {}
    for suite in SUITES:
        module = importlib.import_module(suite)
        for name, test in inspect.getmembers(module, inspect.iscoroutinefunction):
            if not name.startswith("test_") or list(inspect.signature(test).parameters) != ["store"]:
                continue
            if any(word in inspect.getsource(test) for word in INSIDE):
                continue
            await empty(both)
            try:
                await test(store=both)
            except Exception as exc:
                failed[f"{suite}.{name}"] = exc
            else:
                passed.append(name)
            clock.reset()

    print(f"{len(passed)} tests of the contract across two processes")
    assert failed == {}
    assert len(passed) > 25
