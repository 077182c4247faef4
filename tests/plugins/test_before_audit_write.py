"""Plugins enrich and redact events before they are stored; one that fails lets no secret through."""

from __future__ import annotations

import asyncio
import sqlite3
import threading
from collections.abc import Callable
from contextlib import closing
from typing import Any
from uuid import UUID

import pytest
from audit_helpers import SHORT_S, Editor, open_with

from agent_gateway_store import AuditEvent, RedactionFlag, WriteOutcome
from builders import CALL, CALLER, make_event, rehash

pytestmark = pytest.mark.unit

SECRET = "hunter2-in-an-argument"
QUOTING = {
    "sanitized_args": {"path": SECRET},
    "extra": {"error": SECRET},
    "llm_explanation": f"It reads {SECRET}.",
    "output_policy_rationale": SECRET,
    "deterministic_rationale": SECRET,
}


def redact(event: AuditEvent) -> AuditEvent:
    """Do as a redactor does: replace, and say so."""
    flag = RedactionFlag(field="sanitized_args.path", reason="SECRET")
    return event.model_copy(
        update={"sanitized_args": {"path": "***"}, "extra": {}, "redaction_flags": [*event.redaction_flags, flag]}
    )


def file_text() -> str:
    """Everything in the database file, and in its log."""
    with closing(sqlite3.connect("gateway.db")) as connection:
        return "\n".join(connection.iterdump())


async def test_what_a_plugin_returns_is_stored_and_sealed() -> None:
    """The redacted event is stored, its content hash is its own, and the caller's object is untouched."""
    event = make_event(sanitized_args={"path": SECRET}, extra={"error": SECRET})
    async with open_with(Editor("redactor", redact)) as store:
        outcomes = [await store.audit.write(event) for _ in range(2)]
        stored = await store.audit.get_by_request_id(event.request_id)

    assert outcomes == [WriteOutcome.STORED, WriteOutcome.DUPLICATE]
    assert stored is not None
    assert stored.sanitized_args == {"path": "***"}
    assert [flag.reason for flag in stored.redaction_flags] == ["SECRET"]
    assert stored.content_hash == rehash(stored)
    assert event.sanitized_args == {"path": SECRET}
    assert SECRET not in file_text()


async def test_each_plugin_sees_what_the_one_before_made() -> None:
    """In the order of loading; None leaves the event as it is, and so does changing the copy in place."""

    async def enrich(event: AuditEvent) -> AuditEvent:
        await asyncio.sleep(0)
        event.risk_labels = [*event.risk_labels, "pii"]
        return event

    def spoil(event: AuditEvent) -> None:
        event.sanitized_args["path"] = "spoilt"

    editors = Editor("redactor", redact), Editor("spoiler", spoil), Editor("enricher", enrich)
    async with open_with(*editors) as store:
        await store.audit.write(make_event(request_id="r-1"))
        stored = await store.audit.get_by_request_id("r-1")

    assert stored is not None
    assert (stored.sanitized_args, stored.risk_labels) == ({"path": "***"}, ["pii"])
    assert editors[2].seen[0].sanitized_args == {"path": "***"}


BAD: dict[str, Callable[[AuditEvent], Any]] = {
    "raises": lambda _: 1 / 0,
    "garbage": lambda _: {"sanitized_args": {}},
    "hangs": lambda _: asyncio.sleep(30),
    "blocks": lambda _: threading.Event().wait(0.8),
    "exits": lambda _: exec("raise SystemExit(3)"),
    "invalid": lambda event: event.model_copy(update={"sanitized_args": "no mapping"}),
    "org": lambda event: event.model_copy(update={"org_id": "another"}),
    "id": lambda event: event.model_copy(update={"request_id": "another"}),
    "caller": lambda event: event.model_copy(update={"caller_id": "another"}),
    "approval": lambda event: event.model_copy(update={"approval_id": UUID(int=1)}),
    "decision": lambda event: event.model_copy(update={"decision": "DENY"}),
    "flags": lambda event: event.model_copy(update={"redaction_flags": []}),
}


@pytest.mark.parametrize("edit", BAD.values(), ids=BAD)
async def test_a_failing_plugin_withholds_what_it_might_have_redacted(
    edit: Callable[[AuditEvent], Any], caplog: pytest.LogCaptureFixture
) -> None:
    """The call is recorded with who, what and when; texts and arguments are withheld, visibly; nothing raises."""
    flag = RedactionFlag(field="sanitized_args.x", reason="GATEWAY")
    async with open_with(Editor("broken", edit), timeout_s=SHORT_S) as store:
        outcome = await store.audit.write(make_event(request_id="r-1", redaction_flags=[flag], **QUOTING))
        stored = await store.audit.get_by_request_id("r-1")
        counters = store.audit.counters

    assert outcome is WriteOutcome.STORED
    assert stored is not None
    assert (stored.org_id, stored.caller_id, stored.tool_name) == ("default", "dev-agent", "read_file")
    assert (stored.decision, stored.matched_policy_rule) == ("ALLOW", "allow-reads")
    assert stored.sanitized_args == stored.extra == {"[WITHHELD]": "PLUGIN_FAILED"}
    assert {stored.llm_explanation, stored.output_policy_rationale, stored.deterministic_rationale} == {"[WITHHELD]"}
    flags = {(each.field, each.reason) for each in stored.redaction_flags}
    assert flags == {("sanitized_args.x", "GATEWAY"), *((name, "PLUGIN_FAILED") for name in QUOTING)}
    assert (counters.stored, counters.withheld) == (1, 1)
    assert "Plugin broken failed before the write" in caplog.text
    assert SECRET not in file_text() + caplog.text


async def test_a_call_that_outlives_its_store_is_logged_without_what_a_plugin_might_have_redacted(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async with (
        open_with(Editor("redacts", lambda _: None)) as store,
        store.audit.call(CALL, CALLER, decision="ALLOW", sanitize=lambda _: {"x": SECRET}, llm_explanation=SECRET),
    ):
        await store.close()

    assert "LOST audit event" in caplog.text
    assert '"tool_name": "delete_file"' in caplog.text
    assert SECRET not in caplog.text


async def test_after_a_timeout_the_plugin_is_left_alone_for_as_long() -> None:
    """It costs one bounded wait, not one for each write; in the strict mode, too, the call is on record."""
    plugin = Editor("hung", lambda _: asyncio.sleep(30))
    async with open_with(plugin, timeout_s=SHORT_S, audit_mode="strict") as store:
        for _ in range(20):
            assert await store.audit.write(make_event(**QUOTING)) is WriteOutcome.STORED
        counters = store.audit.counters

    assert counters.withheld == 20
    assert len(plugin.seen) < 20


async def test_every_way_in_goes_through_the_plugin() -> None:
    """`write`, `write_many` and `record` of the store; one bad event of a bulk is withheld alone."""

    def picky(event: AuditEvent) -> AuditEvent:
        if event.request_id == "bad":
            raise ValueError("cannot")
        return redact(event)

    async with open_with(Editor("picky", picky)) as store:
        await store.audit.write(make_event(request_id="one", sanitized_args={"path": SECRET}))
        many = [make_event(request_id=name, sanitized_args={"path": SECRET}) for name in ("two", "bad", "three")]
        outcomes = await store.audit.write_many(many)
        async with store.database.sessions() as session, session.begin():
            await store.audit.record(make_event(request_id="own", sanitized_args={"path": SECRET}), session=session)
        found = {event.request_id: event.sanitized_args for event in await store.audit.list_recent()}

    assert outcomes == {WriteOutcome.STORED: 3}
    assert found.pop("bad") == {"[WITHHELD]": "PLUGIN_FAILED"}
    assert found == {name: {"path": "***"} for name in ("one", "two", "three", "own")}
    assert SECRET not in file_text()


async def test_cancelling_the_caller_does_not_cancel_the_write() -> None:
    """Also while a plugin looks at the event; `flush` and `close` wait for it."""
    begun = threading.Event()

    async def slow(_event: AuditEvent) -> None:
        begun.set()
        await asyncio.sleep(0.1)

    async with open_with(Editor("slow", slow), timeout_s=5) as store:
        for index in range(2):
            begun.clear()
            task = asyncio.create_task(store.audit.write(make_event(request_id=f"r-{index}")))
            await asyncio.to_thread(begun.wait, 5)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            if index == 0:
                await store.audit.flush()
                assert await store.audit.get_by_request_id("r-0") is not None
    async with open_with() as store:
        assert await store.audit.get_by_request_id("r-1") is not None


async def test_an_event_survives_the_cancelling_of_every_task() -> None:
    begun = threading.Event()

    async def slow(_event: AuditEvent) -> None:
        begun.set()
        await asyncio.sleep(60)

    async with open_with(Editor("slow", slow), timeout_s=60) as store:
        writing = asyncio.create_task(store.audit.write(make_event(request_id="r-1", **QUOTING)))
        await asyncio.to_thread(begun.wait, 5)
        others = asyncio.all_tasks() - {asyncio.current_task()}
        for task in others:
            task.cancel()
        await asyncio.wait(others, timeout=5)
        await store.audit.flush()
        stored = await store.audit.get_by_request_id("r-1")

    assert writing.cancelled()
    assert stored is not None
    assert stored.sanitized_args == {"[WITHHELD]": "PLUGIN_FAILED"}


async def test_a_burst_reaches_the_plugin_in_small_parts() -> None:
    """Waiting for its turn is not the plugin's time: it has at most 50 events at once, however many come."""
    under_way, most = set[str](), 0

    async def slow(event: AuditEvent) -> AuditEvent:
        nonlocal most
        under_way.add(event.request_id)
        most = max(most, len(under_way))
        await asyncio.sleep(0.001)
        under_way.remove(event.request_id)
        return redact(event)

    async with open_with(Editor("slow", slow)) as store:
        outcomes = await asyncio.gather(*(store.audit.write(make_event()) for _ in range(400)))
        counters = store.audit.counters

    assert set(outcomes) == {WriteOutcome.STORED}
    assert counters.withheld == 0
    assert 1 < most <= 50


async def test_the_plugin_sees_what_can_be_stored() -> None:
    """NUL, lone surrogates, NaN and deep nesting have been replaced before a plugin sees them; none makes it fail."""
    deep: list[Any] = []
    for _ in range(3000):
        deep = [deep]
    hostile = make_event(
        request_id="r\0",
        tool_name="\ud800",
        sanitized_args={"nan": float("nan"), "deep": deep, "big": 2**200, "nul": "\0"},
        risk_score=float("inf"),
        latency_ms=2**70,
    )
    plugin = Editor("witness", redact)
    async with open_with(plugin) as store:
        outcome = await store.audit.write(hostile)
        counters = store.audit.counters

    assert (outcome, counters.withheld) == (WriteOutcome.STORED, 0)
    assert "\0" not in plugin.seen[0].request_id
