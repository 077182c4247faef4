"""`audit.call`: one event for one call, whatever happens in its body; and the intents that found no end."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import nullcontext, suppress
from datetime import timedelta
from typing import Any
from uuid import uuid4

import anyio
import pytest
from contract_helpers import POSTGRES
from pydantic import ValidationError

from agent_gateway_store import (
    AuditEvent,
    GatewayStore,
    StoreSettings,
    SyncGatewayStore,
    ToolCall,
    clock,
    errors,
)
from builders import CALL, CALLER, make_event
from cases import cases


class Broken(Exception):
    """What a tool raises."""


# As frameworks raise it for a tool that took too long; the same error each time, as of a task that several wait for.
LATE = RuntimeError()
LATE.__cause__ = TimeoutError()


async def only(store: GatewayStore) -> AuditEvent:
    (event,) = await store.audit.list_recent()
    return event


async def test_a_call_leaves_one_event(store: GatewayStore) -> None:
    """Everything that is known of the call and its caller, with no field by hand and no argument in clear."""
    approval_id = uuid4()
    async with store.audit.call(
        CALL,
        CALLER,
        decision="APPROVAL_REQUIRED",
        rule="deletes",
        rationale="deletes are asked for",
        approval_id=approval_id,
        session_id="s-1",
        risk_score=0.7,
    ) as event:
        assert not await store.audit.list_recent()
        await asyncio.sleep(0.02)
        event.output_hash = store.hash_args({"ok": True})

    stored = await only(store)
    assert stored.latency_ms >= 20
    assert stored.model_dump(exclude={"id", "latency_ms", "timestamp", "content_hash", "request_id"}) == {
        **make_event().model_dump(exclude={"id", "latency_ms", "timestamp", "content_hash", "request_id"}),
        "org_id": "acme",
        "caller_id": "dev-agent",
        "caller_role": "developer",
        "key_id": "k1",
        "environment": "staging",
        "mcp_server": "files",
        "tool_name": "delete_file",
        "raw_args_hash": AuditEvent.hash_args(CALL.arguments),
        "sanitized_args": {"path": "[hidden]"},
        "matched_policy_rule": "deletes",
        "decision": "APPROVAL_REQUIRED",
        "deterministic_rationale": "deletes are asked for",
        "approval_id": approval_id,
        "session_id": "s-1",
        "risk_score": 0.7,
        "execution_status": "SUCCESS",
        "output_hash": event.output_hash,
    }


@POSTGRES
@cases(
    ("raised", "status"),
    [
        (Broken("no"), "TOOL_ERROR"),
        (TimeoutError(), "TIMEOUT"),
        (LATE, "TIMEOUT"),
        (asyncio.CancelledError(), "CANCELLED"),
    ],
)
@cases("decision", ["ALLOW", "SANITIZE_AND_ALLOW", "DENY", "APPROVAL_REQUIRED"])
async def test_what_is_raised_is_recorded_and_raised_on(
    store: GatewayStore, raised: BaseException, status: str, decision: str
) -> None:
    """A call that was not let through has no status, however its refusal is raised."""
    with pytest.raises(type(raised)) as caught:
        async with store.audit.call(CALL, CALLER, decision=decision):
            raise raised
    assert caught.value is raised
    (stored,) = await store.audit.list_recent(1)
    assert stored.execution_status == (status if decision.endswith("ALLOW") else None)


@POSTGRES
@cases("status", ["TOOL_ERROR", None])
async def test_the_body_has_the_last_word(store: GatewayStore, status: Any) -> None:
    """A tool that answers with an error raises nothing, and one that goes on elsewhere has not ended."""
    async with store.audit.call(
        CALL, CALLER, decision="ALLOW", request_id=f"r-{status}", sanitize=dict_of_path
    ) as event:
        event.execution_status = status
    (stored,) = await store.audit.list_recent(1)
    assert (stored.request_id, stored.execution_status) == (f"r-{status}", status)
    assert stored.sanitized_args == {"path": "…"}


def dict_of_path(_call: ToolCall) -> dict[str, Any]:
    return {"path": "…"}


@POSTGRES
async def test_a_cancelled_call_is_recorded(store: GatewayStore) -> None:
    """Cancelled once, and once more while its event is written."""
    begun = asyncio.Event()

    async def run() -> None:
        async with store.audit.call(CALL, CALLER, decision="ALLOW"):
            begun.set()
            await asyncio.Event().wait()

    task = asyncio.create_task(run())
    await begun.wait()
    for _ in range(2):
        task.cancel()
        await asyncio.sleep(0)
    with suppress(asyncio.CancelledError):
        await task
    await store.audit.flush()
    assert (await only(store)).execution_status == "CANCELLED"


class Caller:
    async def __call__(self) -> int:
        return 3


async def fails() -> None:
    raise Broken


async def waits() -> None:
    await asyncio.Event().wait()


async def fails_in_a_group() -> None:
    async with asyncio.TaskGroup() as group:
        group.create_task(fails())
        await waits()


async def fails_while_a_group_waits() -> None:
    async with asyncio.TaskGroup() as group:
        group.create_task(fails())


async def is_cancelled() -> None:
    task = asyncio.current_task()
    assert task is not None
    task.cancel()
    await waits()


async def is_late() -> None:
    raise TimeoutError


async def stumbles_when_cancelled() -> None:
    try:
        await is_cancelled()
    except asyncio.CancelledError:
        raise Broken from None


async def fails_at_its_end() -> None:
    try:
        await waits()
    finally:
        raise Broken


async def is_cancelled_in_a_group_that_fails() -> None:
    async with asyncio.TaskGroup() as group:
        group.create_task(fails_at_its_end())
        await asyncio.sleep(0)
        await is_cancelled()


async def is_late_as_before() -> None:
    raise LATE


async def after(before: Callable[[], Awaitable[None]], call: Callable[[], Awaitable[None]]) -> None:
    with suppress(BaseException):
        await before()
    await call()


async def while_handling(before: Callable[[], Awaitable[None]], call: Callable[[], Awaitable[None]]) -> None:
    try:
        await before()
    except BaseException:
        await call()


async def in_an_ended_scope(_before: Callable[[], Awaitable[None]], call: Callable[[], Awaitable[None]]) -> None:
    with anyio.CancelScope() as scope:
        scope.cancel()
        await call()


@POSTGRES
@cases(
    ("around", "before", "tool", "status"),
    [
        *(
            (around, before, tool, status)
            for around in (after, while_handling)
            for before in (is_cancelled, fails_in_a_group, is_late)
            for tool, status in (
                (fails, "TOOL_ERROR"),
                (fails_in_a_group, "TOOL_ERROR"),
                (fails_while_a_group_waits, "TOOL_ERROR"),
                (is_late, "TIMEOUT"),
                (is_cancelled, "CANCELLED"),
                (stumbles_when_cancelled, "CANCELLED"),
                (is_cancelled_in_a_group_that_fails, "CANCELLED"),
            )
        ),
        (in_an_ended_scope, waits, fails, "TOOL_ERROR"),
        (while_handling, is_late_as_before, is_late_as_before, "TIMEOUT"),
    ],
)
async def test_what_happens_around_a_call_is_not_how_it_ends(
    store: GatewayStore, around: Any, before: Any, tool: Any, status: str
) -> None:
    """What was cancelled, or went wrong, before a cleanup or a second attempt: its own end is recorded."""

    async def call() -> None:
        async with store.audit.call(CALL, CALLER, decision="ALLOW"):
            await tool()

    await asyncio.wait([asyncio.create_task(around(before, call))])
    await store.audit.flush()
    (stored,) = await store.audit.list_recent(1)
    assert stored.execution_status == status


@POSTGRES
@cases("mode", ["spool", "strict"])
async def test_a_call_that_outlives_its_store_is_lost_in_the_log(
    database_url: str, caplog: pytest.LogCaptureFixture, mode: str
) -> None:
    """Its result stands, as the tool has run; in the strict mode nothing unrecorded goes through."""
    options: dict[str, Any] = {"redis_url": "", "settings": StoreSettings.model_validate({"audit_mode": mode})}

    def refused() -> Any:
        return pytest.raises(errors.AuditUnavailableError, match="closed") if mode == "strict" else nullcontext()

    with refused():
        async with GatewayStore(database_url, **options) as store, store.audit.call(CALL, CALLER, decision="ALLOW"):
            await store.close()
    with refused(), SyncGatewayStore(database_url, **options) as twin, twin.audit.call(CALL, CALLER, decision="ALLOW"):
        twin.close()

    logged = [each.getMessage() for each in caplog.records if each.name == "agent_gateway_store.audit.lost"]
    lost = [json.loads(each.partition(": ")[2]) for each in logged]
    held = [(each["tool_name"], each["sanitized_args"], each["execution_status"]) for each in lost]
    assert held == [("delete_file", {"path": "[hidden]"}, "SUCCESS")] * (0 if mode == "strict" else 2)
    caplog.clear()


@POSTGRES
async def test_a_decorator_records_each_call(store: GatewayStore) -> None:
    """Of a coroutine function; what is none is refused before it runs, and one call is not recorded twice."""
    record = store.audit.call(CALL, CALLER, decision="ALLOW")

    @record
    async def tool(number: int) -> int:
        return number

    async def generator() -> AsyncIterator[int]:
        yield 1

    assert [await tool(1), await asyncio.create_task(tool(2)), await record(Caller())()] == [1, 2, 3]
    assert len(await store.audit.list_recent()) == 3
    wrong: list[Any] = [generator, lambda: 1]
    for each in wrong:
        with pytest.raises(TypeError, match=f"make {each.__name__} an `async def`"):
            record(each)
    async with record:
        with pytest.raises(RuntimeError, match="recorded before"):
            await record.__aenter__()


@POSTGRES
async def test_arguments_are_hashed_under_the_key_of_the_store(database_url: str) -> None:
    settings = StoreSettings(hash_key="a secret")  # type: ignore[arg-type]
    async with GatewayStore(database_url, redis_url="", settings=settings) as store:
        async with store.audit.call(CALL, CALLER, decision="ALLOW"):
            pass
        expected = AuditEvent.hash_args(CALL.arguments, key="a secret")
        assert (await only(store)).raw_args_hash == store.hash_args(CALL.arguments) == expected


@POSTGRES
@cases("wrong", [{"decision": "PERHAPS"}, {"no_such_field": 1}, {"risk_score": "high"}])
async def test_a_wrong_field_stops_the_call(store: GatewayStore, wrong: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        async with store.audit.call(CALL, CALLER, **({"decision": "ALLOW"} | wrong)):
            pytest.fail("the call ran")
    assert not await store.audit.list_recent()


@POSTGRES
async def test_an_intent_is_stored_before_the_body_runs(store: GatewayStore) -> None:
    """The outcome keeps the call's request id and names the intent, which keeps the parent that was given."""
    given: dict[str, Any] = {"request_id": "r-1", "parent_request_id": "outer", "extra": {"span": "1"}}
    async with store.audit.call(CALL, CALLER, decision="ALLOW", intent=True, **given):
        intent = await only(store)
        assert (intent.execution_status, intent.extra) == (None, {"span": "1", "phase": "intent"})
        assert [each.id for each in await store.audit.orphans(older_than=timedelta())] == [intent.id]
    outcome, _ = await store.audit.list_recent()
    assert (outcome.request_id, outcome.parent_request_id) == ("r-1", intent.request_id)
    assert (outcome.extra, outcome.execution_status) == ({"span": "1", "phase": "outcome"}, "SUCCESS")
    assert intent.parent_request_id == "outer"
    assert not await store.audit.orphans(older_than=timedelta())


async def test_orphans_are_intents_of_this_organisation_that_nothing_ended(store: GatewayStore) -> None:
    """Another call inside it, an outcome elsewhere and a younger intent end nothing; newest first."""
    for number, org_id in enumerate(["acme", "acme", "other"]):
        await store.audit.write(make_event(request_id=f"i-{number}", org_id=org_id, extra={"phase": "intent"}))
    await store.audit.write(make_event(org_id="acme", parent_request_id="i-0"))
    await store.audit.write(make_event(org_id="other", parent_request_id="i-1", extra={"phase": "outcome"}))
    assert not await store.audit.orphans(older_than="10m")
    clock.move(timedelta(minutes=11))

    async def found(view: GatewayStore, limit: int = 100) -> list[str]:
        return [each.request_id for each in await view.audit.orphans(older_than="10m", limit=limit)]

    assert await found(store) == ["i-2", "i-1", "i-0"]
    assert await found(store, 1) == ["i-2"]
    assert await found(store.for_org("acme")) == ["i-1", "i-0"]
    await store.audit.write(make_event(org_id="acme", parent_request_id="i-0", extra={"phase": "outcome"}))
    assert await found(store.for_org("acme")) == ["i-1"]
    with pytest.raises(ValueError, match="older_than"):
        await store.audit.orphans(older_than="soon")
    with pytest.raises(ValueError, match="limit"):
        await store.audit.orphans(limit=0)


@POSTGRES
async def test_a_call_whose_intent_is_lost_does_not_run(store: GatewayStore, monkeypatch: pytest.MonkeyPatch) -> None:
    async def lost(_event: AuditEvent) -> str:
        return "LOST"

    monkeypatch.setattr(store.audit.event_writer, "write_ended", lost)
    with pytest.raises(errors.AuditUnavailableError):
        async with store.audit.call(CALL, CALLER, decision="ALLOW", intent=True):
            pytest.fail("the call ran")


@POSTGRES
def test_the_blocking_twin_records_a_call(database_url: str) -> None:
    with SyncGatewayStore(database_url, redis_url="") as store:
        with store.audit.call(CALL, CALLER, decision="ALLOW", intent=True) as event:
            event.risk_labels = ["seen"]
        with pytest.raises(Broken), store.audit.call(CALL, CALLER, decision="ALLOW"):
            raise Broken
        try:
            raise TimeoutError
        except TimeoutError:
            with pytest.raises(Broken), store.audit.call(CALL, CALLER, decision="ALLOW"):
                raise Broken  # noqa: B904  as a fallback does
        again, *others = store.audit.list_recent()
        assert again.execution_status == "TOOL_ERROR"
        statuses = [(each.execution_status, each.risk_labels) for each in others]
        assert statuses == [("TOOL_ERROR", []), ("SUCCESS", ["seen"]), (None, [])]
        assert isinstance(again.id, int)
        assert not store.audit.orphans(older_than=timedelta())

        record = store.audit.call(CALL, CALLER, decision="ALLOW")
        assert [record(abs)(-1), record(abs)(-2)] == [1, 2]
        assert len(store.audit.list_recent()) == 6
        for wrong in (fails, Caller()):
            with pytest.raises(TypeError, match="plain functions"):
                record(wrong)
