"""OpenTelemetry with the real SDK: whose child a span is, what it says, and what metrics say after known actions."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AsyncExitStack
from typing import Any

import pytest
from contract_helpers import WAYS, RefusingSink, approved, on_backend, until, write_by
from opentelemetry.context import Context
from opentelemetry.trace import StatusCode

from agent_gateway_store import AuditEvent, GatewayStore, StoreSettings, WriteOutcome
from agent_gateway_store.errors import ApprovalNotFoundError, InvalidApiKeyError
from agent_gateway_store.store import parts_of
from agent_gateway_store.testing import RecordingNotifier
from builders import CALL, make_event, make_request
from otel import Recorded, recorded

pytest_generate_tests = on_backend("postgres")


# Planted in every place from which an argument or a secret could get into an attribute.
SECRET = "hunter2-s3cret"


@pytest.fixture
def otel() -> Iterator[Recorded]:
    with recorded() as found:
        yield found


@pytest.fixture
async def measured(otel: Recorded, database_url: str, tmp_path: Any) -> AsyncIterator[GatewayStore]:
    settings = StoreSettings(otel_enabled=True, redis_url="", audit_spool_path=tmp_path / "spool.db")
    async with GatewayStore(database_url, settings=settings, plugins=[RecordingNotifier()]) as opened:
        yield opened


async def issued(store: GatewayStore) -> str:
    return await store.approvals.issue_token(make_request())


async def decide(store: GatewayStore) -> None:
    await store.approvals.approve(await issued(store), "alice")


async def wait(store: GatewayStore) -> None:
    await store.approvals.wait_for_decision(await issued(store), timeout_s=0)


async def consume(store: GatewayStore) -> None:
    token = await approved(store)
    await store.approvals.consume_token(token, caller_id="dev-agent", tool_call=CALL)


async def verify(store: GatewayStore) -> None:
    key = await store.keys.issue("agent", role="dev")
    await store.keys.verify(key.plaintext)


ACTIONS: dict[str, Callable[[GatewayStore], Awaitable[Any]]] = {
    "audit.write": lambda store: store.audit.write(make_event()),
    "approval.acquire": lambda store: store.approvals.acquire(make_request()),
    "approval.wait": wait,
    "approval.decide": decide,
    "approval.consume": consume,
    "key.verify": verify,
    "log.seal": lambda store: store.evidence.seal(),
    "log.prune": lambda store: store.retention.prune("365d", by="alice", discard=True),
}


@pytest.mark.parametrize("how", WAYS)
async def test_a_retry_in_another_trace_is_a_duplicate(otel: Recorded, measured: GatewayStore, how: str) -> None:
    event = make_event()

    async def write(written: AuditEvent) -> WriteOutcome:
        with otel.tracer.start_as_current_span("attempt", context=Context()):
            return await write_by(how, measured, written)

    assert [await write(event) for _ in range(3)] == ["STORED", "DUPLICATE", "DUPLICATE"]
    first = await measured.audit.get_by_request_id(event.request_id)
    assert await write(event.model_copy(update={"latency_ms": event.latency_ms + 1})) == "STORED"

    assert first is not None
    assert first.trace_id is not None
    assert await measured.audit.get_by_request_id(event.request_id) == first
    assert len(await measured.audit.list_recent()) == 2


@pytest.mark.parametrize("name", ACTIONS)
async def test_each_is_a_child_of_the_span_of_its_caller(otel: Recorded, measured: GatewayStore, name: str) -> None:
    with otel.tracer.start_as_current_span("caller") as caller:
        await ACTIONS[name](measured)

    span = otel.span(name)
    assert span.parent is not None
    assert span.parent.span_id == caller.get_span_context().span_id
    assert span.status.status_code is StatusCode.UNSET


async def test_a_span_names_the_tool_the_outcome_and_the_approval(otel: Recorded, measured: GatewayStore) -> None:
    await measured.audit.write(make_event(tool_name="read_\ud800file"))
    result = await measured.approvals.acquire(make_request())

    assert otel.span("audit.write").attributes == {
        "gen_ai.tool.name": "read_?file",
        "agent_gateway_store.outcome": "STORED",
    }
    assert otel.span("approval.acquire").attributes == {
        "gen_ai.tool.name": CALL.tool,
        "agent_gateway_store.status": "PENDING",
        "agent_gateway_store.approval_id": str(result.approval_id),
    }


async def test_an_error_is_named_by_its_class_alone(otel: Recorded, measured: GatewayStore) -> None:
    with pytest.raises(ApprovalNotFoundError):
        await measured.approvals.consume_token(SECRET, caller_id="dev-agent", tool_call=CALL)

    span = otel.span("approval.consume")
    assert (span.status.status_code, span.status.description) == (StatusCode.ERROR, None)
    assert span.attributes["error.type"] == "ApprovalNotFoundError"
    assert not span.events


async def test_deliveries_are_roots_that_link_to_their_cause(otel: Recorded, measured: GatewayStore) -> None:
    with otel.tracer.start_as_current_span("caller") as caller:
        await issued(measured)
    await until(lambda: otel.deliveries("recording"))

    (span,) = otel.deliveries("recording")
    assert span.parent is None
    assert [link.context.trace_id for link in span.links] == [caller.get_span_context().trace_id]
    assert span.attributes["agent_gateway_store.status"] == "DELIVERED"


async def test_no_argument_key_or_token_is_in_an_attribute(otel: Recorded, measured: GatewayStore) -> None:
    call = CALL.model_copy(update={"arguments": {"password": SECRET}})
    key = await measured.keys.issue("agent", role="dev")
    with pytest.raises(InvalidApiKeyError):
        await measured.keys.verify(key.plaintext.get_secret_value()[:-3] + "abc")
    await measured.keys.verify(key.plaintext)
    await measured.audit.write(
        make_event(sanitized_args={"password": SECRET}, deterministic_rationale=SECRET, extra={"x": SECRET})
    )
    token = await measured.approvals.issue_token(make_request(tool_call=call, risk_explanation=SECRET), call=call)
    await measured.approvals.approve(token, "alice", SECRET)
    await measured.approvals.consume_token(token, caller_id="dev-agent", tool_call=call)
    await until(lambda: len(otel.deliveries("recording")) >= 2)

    told = "".join(span.to_json() for span in otel.spans) + repr(otel.metrics())
    assert len(otel.spans) > 6
    assert not [secret for secret in (SECRET, token, key.plaintext.get_secret_value()[20:]) if secret in told]


async def test_an_event_without_a_trace_gets_that_of_its_caller(otel: Recorded, measured: GatewayStore) -> None:
    """However it is written; the same event again, in the same trace, is still the same."""
    events = [make_event() for _ in range(3)]
    with otel.tracer.start_as_current_span("caller") as caller:
        await measured.audit.write(events[0])
        again = await measured.audit.write(events[0])
        await measured.audit.write_many(events[1:2])
        async with measured.database.sessions() as session:
            await measured.audit.record(events[2], session=session)
            await session.commit()
    await measured.audit.write(make_event(request_id="outside"))
    kept = await measured.audit.write(make_event(request_id="own", trace_id="f" * 32))

    stored = {event.request_id: event.trace_id for event in await measured.audit.list_recent()}
    trace_id = f"{caller.get_span_context().trace_id:032x}"
    assert (again, kept) == ("DUPLICATE", "STORED")
    assert stored == {**{event.request_id: trace_id for event in events}, "outside": None, "own": "f" * 32}
    assert events[0].trace_id is None


async def test_metrics_say_what_was_done(otel: Recorded, measured: GatewayStore) -> None:
    event = make_event()
    await measured.audit.write(event)
    await measured.audit.write(event)
    await decide(measured)
    await measured.approvals.issue_token(make_request(request_id="other"))
    key = await measured.keys.issue("agent", role="dev")
    await measured.keys.verify(key.plaintext)
    with pytest.raises(InvalidApiKeyError):
        await measured.keys.verify("nonsense")
    await measured.audit.ship(RefusingSink(), once=True)
    await until(lambda: otel.metrics().get(("delivery.duration", "recording", "DELIVERED"), 0) == 3)
    await parts_of(measured).figures.refresh()

    found = otel.metrics()
    expected = {
        ("audit.events", "stored"): 1,
        ("audit.events", "duplicate"): 1,
        ("audit.events", "lost"): 0,
        ("audit.queue_depth",): 0,
        ("audit.queue_age",): 0,
        ("audit.batch_size",): 2,
        ("audit.commit_duration",): 2,
        ("audit.spool_depth", "waiting"): 0,
        ("audit.spool_age",): 0,
        ("approvals.open", "PENDING"): 1,
        ("approvals.open", "APPROVED"): 1,
        ("approvals.decision_time", "APPROVED"): 1,
        ("keys.verifications", "ok"): 1,
        ("keys.verifications", "InvalidApiKeyError"): 1,
        ("outbox.dead", "recording"): 0,
        ("outbox.due", "recording"): 0,
        ("sinks.dead", "sink", ""): 1,
        ("sinks.lag", "sink", ""): 0,
        ("retention.lag",): 0,
    }
    assert {name: found.get(name) for name in expected} == expected
    assert found["approvals.oldest_pending_age",] >= 0
    assert found["evidence.seal_lag",] > 0
    assert any(name[0] == "database.pool_wait" for name in found)
    await measured.evidence.seal()
    # A reading that began before the seal may be stored after this one.
    await parts_of(measured).figures.refresh()
    await until(lambda: otel.metrics()["evidence.seal_lag",] == 0)


async def test_a_wait_for_a_connection_that_ends_in_vain_is_measured(otel: Recorded, measured: GatewayStore) -> None:
    """So that the alert of a pool that is exhausted fires also where nobody gets a connection."""
    async with AsyncExitStack() as holding:

        async def hold_all() -> None:
            while True:
                async with asyncio.timeout(0.5):
                    await holding.enter_async_context(measured.database.read())

        with pytest.raises(TimeoutError):
            await hold_all()

    assert otel.longest("database.pool_wait") >= 0.4


async def test_a_closed_store_says_nothing(otel: Recorded, measured: GatewayStore) -> None:
    await measured.audit.write(make_event())
    await measured.close()

    assert not any(name[0] in ("audit.events", "audit.queue_depth") for name in otel.metrics())


async def test_without_the_setting_there_is_no_span(otel: Recorded, database_url: str) -> None:
    async with GatewayStore(database_url, settings=StoreSettings(redis_url="")) as store:
        with otel.tracer.start_as_current_span("caller"):
            await store.audit.write(make_event())
        (event,) = await store.audit.list_recent()

    assert not otel.spans
    assert not otel.metrics()
    assert event.trace_id is not None
