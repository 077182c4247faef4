"""Any object may be anywhere in an event: the write keeps the event, and what is read back has the hash of the row."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from datetime import UTC, datetime
from typing import Any

import pytest
from contract_helpers import POSTGRES
from pydantic import ValidationError

from agent_gateway_store import AuditEvent, AuditLogger, GatewayStore
from agent_gateway_store.audit.record import encode_event, hash_of
from builders import make_event
from cases import cases
from corpus.hostile_objects import OBJECTS, Nanoseconds, UnreadableTime

# Pydantic asks an object for its `__class__` and reports what that raises as unraisable.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")

REPAIRED = (
    "caller_id",
    "trace_id",
    "risk_labels",
    "risk_score",
    "latency_ms",
    "timestamp",
    "sanitized_args",
    "extra",
    "approval_id",
    "redaction_flags",
)
REFUSED = ("decision", "execution_status", "output_decision", "raw_args_hash")


def places(value: Any) -> list[dict[Any, Any]]:
    """Put `value` into arguments as an item, in a list and, where it can be, as a name."""
    found: list[dict[Any, Any]] = [{"a": value}, {"a": [value, (value,)]}]
    try:
        return [*found, {value: 1, "b": value}]
    except Exception:
        return found


async def all_keep_their_hash(store: GatewayStore, count: int) -> None:
    events = await store.audit.list_recent(1_000)
    assert len(events) == count
    for event in events:
        assert hash_of(encode_event(event)) == event.content_hash, event.request_id


async def test_arguments_of_any_object_are_hashed_and_stored(store: GatewayStore) -> None:
    """As a leaf, in a list, as a name: hashed the same each time, stored, and read back with its own hash."""
    cases = [(name, args) for name, value in OBJECTS.items() for args in places(value)]
    for name, args in cases:
        assert AuditEvent.hash_args(args) == AuditEvent.hash_args(args), name

        assert await store.audit.write(make_event(sanitized_args=args, extra=args)) == "STORED", name

    await all_keep_their_hash(store, len(cases))


async def test_what_is_set_past_the_validation_costs_the_value_alone(store: GatewayStore) -> None:
    """Where a stand-in claims nothing the event is kept, flagged if the value was not valid; it never raises."""
    events = []
    for name, value in OBJECTS.items():
        for field in REPAIRED:
            given = [value] if field in ("risk_labels", "redaction_flags") else value
            events.append(make_event(request_id=f"{name}, {field}").model_copy(update={field: given}))

    outcomes = await asyncio.gather(*map(store.audit.write, events))

    kept = zip(events, outcomes, strict=True)
    assert [event.request_id for event, outcome in kept if outcome != "STORED"] == []
    await all_keep_their_hash(store, len(events))


@POSTGRES
@cases("field", REFUSED)
async def test_a_decision_is_never_made_up(store: GatewayStore, field: str) -> None:
    """An event whose decision, status or hash cannot be read is LOST: no stand-in would be true."""
    outcomes = [
        await store.audit.write(make_event().model_copy(update={field: value}))
        for name, value in OBJECTS.items()
        if name != "text"
    ]

    assert set(outcomes) == {"LOST"}


@POSTGRES
@cases("kind", [Nanoseconds, UnreadableTime])
async def test_a_time_is_kept_to_the_microsecond(store: GatewayStore, kind: type[datetime]) -> None:
    """Whatever a subclass of datetime makes of it, so that an export can be read back."""
    assert await store.audit.write(make_event(timestamp=kind(2026, 1, 2, tzinfo=UTC))) == "STORED"

    (found,) = await store.audit.list_recent(1)
    assert (type(found.timestamp), found.timestamp) == (datetime, datetime(2026, 1, 2, tzinfo=UTC))
    assert hash_of(encode_event(found)) == found.content_hash


# A set that cannot be walked makes Pydantic's core panic, in the words of another language.
def test_a_constructor_refuses_in_its_own_words() -> None:
    """What a method of the value raises comes out as a ValidationError, or the value is taken."""
    for name in OBJECTS.keys() - {"set"}:
        for field in AuditEvent.model_fields:
            with suppress(ValidationError):
                make_event(**{field: OBJECTS[name]})


@POSTGRES
@cases("name", ["dead reference", "no class", "real"])
async def test_a_logger_says_what_is_no_event(store: GatewayStore, caplog: pytest.LogCaptureFixture, name: str) -> None:
    async with store.database.sessions() as session:
        assert await AuditLogger(session).write(OBJECTS[name]) == "LOST"
        assert await AuditLogger(session).write(None) == "LOST"  # type: ignore[arg-type]

    assert "The event must be a whole AuditEvent, not NoneType" in caplog.text
