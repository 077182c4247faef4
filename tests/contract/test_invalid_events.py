"""Events whose fields were set past the validation, as `model_copy(update=...)` does: each concerns itself alone."""

from __future__ import annotations

import asyncio
import json
import logging
from datetime import UTC, datetime
from typing import Any
from uuid import UUID

import pytest
from contract_helpers import POSTGRES
from pydantic import ValidationError

from agent_gateway_store import Decision, GatewayStore, RedactionFlag, StoreSettings, clock, errors
from builders import make_event
from cases import cases

pytestmark = POSTGRES

INVALID: tuple[dict[str, Any], ...] = (
    {"decision": "MAYBE"},
    {"execution_status": "maybe"},
    {"output_decision": None},
    {"raw_args_hash": 5},
)
REPAIRED: tuple[tuple[dict[str, Any], Any], ...] = (
    ({"latency_ms": -5}, 0),
    ({"latency_ms": "soon"}, 0),
    ({"risk_score": None}, 0.0),
    ({"sanitized_args": [1]}, {"[WITHHELD]": "INVALID"}),
    ({"sanitized_args": object()}, {"[WITHHELD]": "INVALID"}),
    ({"extra": [1]}, {"[WITHHELD]": "INVALID"}),
    ({"approval_id": "no UUID"}, None),
    ({"risk_labels": None}, []),
    ({"risk_labels": ["a", 5]}, ["a", "$int:5"]),
    ({"caller_id": None}, ""),
    ({"trace_id": UUID(int=1)}, f"$uuid:{UUID(int=1)}"),
)


async def test_what_the_validation_would_have_taken_is_stored(store: GatewayStore) -> None:
    """A word for an enum, a float of milliseconds, a naive time, a whole number as a score."""
    noon = datetime(2026, 1, 2, 12)
    given = {"decision": "DENY", "latency_ms": 1.7, "timestamp": noon, "risk_score": 1}

    assert await store.audit.write(make_event(trace_id="t").model_copy(update=given)) == "STORED"

    (found,) = await store.audit.list_recent()
    assert (found.decision, found.latency_ms) == (Decision.DENY, 2)
    assert (found.timestamp, found.risk_score, found.trace_id) == (noon.replace(tzinfo=UTC), 1.0, "t")


async def test_an_invalid_event_costs_no_other_one(store: GatewayStore, caplog: pytest.LogCaptureFixture) -> None:
    """It is LOST: `write` does not raise, what is wrong and the whole event are logged; the others are stored."""
    bad = [make_event(request_id="bad").model_copy(update=given) for given in INVALID]
    events = [make_event(request_id=f"r-{number}") for number in range(20)]

    with caplog.at_level(logging.ERROR):
        outcomes = await asyncio.gather(*map(store.audit.write, [*events[:10], *bad, *events[10:]]))

    assert outcomes == ["STORED"] * 10 + ["LOST"] * len(INVALID) + ["STORED"] * 10
    assert store.audit.counters.lost == len(INVALID)
    said = [record.getMessage() for record in caplog.records]
    for given, wrong, lost in zip(INVALID, said[::2], said[1::2], strict=True):
        assert next(iter(given)) in wrong
        assert json.loads(lost.partition(": ")[2])["request_id"] == "bad"


async def test_the_strict_mode_refuses_an_invalid_event(database_url: str) -> None:
    async with GatewayStore(database_url, redis_url="", settings=StoreSettings(audit_mode="strict")) as strict:
        with pytest.raises(errors.AuditUnavailableError, match="The event is not valid") as caught:
            await strict.audit.write(make_event().model_copy(update={"decision": "MAYBE"}))
        assert await strict.audit.write(make_event()) == "STORED"

    assert isinstance(caught.value.__cause__, ValidationError)


@cases(("given", "kept"), REPAIRED)
async def test_an_invalid_value_is_replaced_and_flagged(store: GatewayStore, given: dict[str, Any], kept: Any) -> None:
    assert await store.audit.write(make_event().model_copy(update=given)) == "STORED"

    (name,) = given
    (found,) = await store.audit.list_recent(1)
    assert getattr(found, name) == kept
    assert [(flag.field, flag.reason) for flag in found.redaction_flags] == [(name, "INVALID")]


async def test_an_invalid_time_or_flag_is_replaced(store: GatewayStore) -> None:
    flag = RedactionFlag(field="caller_id", reason="KNOWN")
    given = {"timestamp": "noon", "redaction_flags": [flag, {"field": 5}]}
    before = clock.utc_now()

    await store.audit.write(make_event().model_copy(update=given))

    (found,) = await store.audit.list_recent()
    assert before <= found.timestamp <= clock.utc_now()
    assert {(flag.field, flag.reason) for flag in found.redaction_flags} == {
        ("caller_id", "KNOWN"),
        ("timestamp", "INVALID"),
        ("redaction_flags", "INVALID"),
    }
