"""What the scrubber lets through reads back identical on every database, and hashes to its `content_hash`."""

from __future__ import annotations

import json
import math
from datetime import UTC, date, datetime, timedelta, timezone
from decimal import Decimal
from pathlib import PurePosixPath
from typing import Any
from uuid import uuid4

from sqlalchemy import insert, select

from agent_gateway_store.audit.record import encode_event, hash_of, to_values
from agent_gateway_store.models.audit import AuditEvent, RedactionFlag
from agent_gateway_store.storage.database import create_engine
from builders import make_event, rehash
from oddities import Level, nested

table = AuditEvent.__table__


CYCLE: dict[str, Any] = {}
CYCLE["self"] = [CYCLE]

NASTY_ARGUMENTS: list[dict[Any, Any]] = [
    {},
    {"": "", " ": None, "a\0b": "\0", "$int:5": "$int:5"},
    {"lone": "\ud800", "pair": "\ud83d\ude00", "many": "\udfff" * 9, "\ud800": 1},
    {"floats": [math.nan, math.inf, -math.inf, -0.0, 0.0, 1e15, 1e16, 1e22, 1e23, 5e-324, -5e-324, 2.2e-308, 1e-7]},
    {"floats": [0.1, 1 / 3, 123456789012345.6, 9999999999999998.0, 9007199254740993.0, 1.0, 100.0, 1.7e308]},
    {"integers": [0, -1, 2**53 - 1, -(2**53) + 1, 2**53, 2**63, 10**30, 10**5000]},
    {"booleans": [True, False, None], "types": [1, 1.0, "1", True]},
    {"args": nested(98, "bottom")},
    {"args": nested(101, "bottom")},
    {"args": nested(5_000, "bottom")},
    CYCLE,
    {"text": "x" * 1_000_000, "euro": "\u20ac" * 100_000, "emoji": "\U0001f600" * 50_000},
    {"list": list(range(100_000)), "after": 1},
    {f"key {number}": number for number in range(50_000)},
    {"k" * 5_000: 1, "k" * 5_001: 2, "\U0001f600" * 300: 3},
    {1: "a", "1": "b", None: "c", 1.5: "d", b"x": "e", (1, 2): "f"},
    {"others": [b"\0\xff", {1, 2}, Decimal("1.10"), date(2024, 5, 1), uuid4(), PurePosixPath("/x"), Level.BIG, object]},
    {"control": "".join(map(chr, range(1, 160))), "bidi": "\u202e\u2066\u200f", "bom": "\ufeff", "last": "\U0010ffff"},
    {"quotes": "\"'\\/", "escaped": "\\u0000", "html": "<script>", "sql": "'; DROP TABLE audit_events; --"},
    {"[cut]": 1, "more": ["x" * 60_000] * 10},
]
NASTY_IDS = ["", " ", "x" * 512, "x" * 513, "\u20ac" * 171, "\0", "\ud800", "a" * 100_000, "\U0001f600" * 128]


async def assert_round_trip(url: str, events: list[AuditEvent]) -> None:
    """Store `events` in batches, read them over a new connection, compare each with the row it was stored as."""
    rows = [to_values(encode_event(event)) for event in events]
    writer, reader = create_engine(url), create_engine(url)
    try:
        async with writer.begin() as connection:
            for start in range(0, len(rows), 200):
                await connection.execute(insert(table), rows[start : start + 200])
        async with reader.connect() as connection:
            found = (await connection.execute(select(table).order_by(table.c.id))).mappings().all()
    finally:
        await writer.dispose()
        await reader.dispose()

    assert len(found) == len(rows)
    for row, event in zip(rows, map(AuditEvent.from_row, found), strict=True):
        stored = event.model_dump(exclude={"id"})
        sent = AuditEvent.model_construct(**row).model_dump(exclude={"id"})
        # As text, so that 1, 1.0 and True are three.
        assert {name: spelt(value) for name, value in stored.items()} == {
            name: spelt(value) for name, value in sent.items()
        }
        assert rehash(event) == event.content_hash
        # Written again it is the same event; what was flagged may gain a flag.
        assert event.redaction_flags or hash_of(encode_event(event)) == event.content_hash


def spelt(value: Any) -> str:
    return json.dumps(value, sort_keys=True, default=str)


async def test_named_nasty_values_read_back_identical(database_url: str) -> None:
    """Every value that some database or driver is known to refuse or to change."""
    events = [make_event(sanitized_args=args) for args in NASTY_ARGUMENTS]
    events += [make_event(request_id=text, tool_name=text, llm_explanation=text, key_id=text) for text in NASTY_IDS]
    events += [make_event(risk_score=score) for score in (0.1, 1 / 3, 5e-324, 1.7e308, math.nan, -math.inf, -0.0, 1e23)]
    events += [make_event(latency_ms=latency) for latency in (0, 2**31, 2**63 - 1, 2**63, 2**200)]
    events += [
        make_event(timestamp=when)
        for when in (
            datetime.min,
            datetime.max,
            datetime.max - timedelta(microseconds=1),
            datetime(1, 1, 1, tzinfo=timezone(timedelta(hours=14))),
            datetime(2024, 5, 1, 12, 0, 0, 1),
            datetime(1969, 12, 31, 23, 59, 59, 999999, tzinfo=UTC),
        )
    ]
    events += [
        make_event(risk_labels=labels) for labels in ([], ["\0", "\ud800", ""], ["x" * 100_000], ["l"] * 100_000)
    ]
    flag = RedactionFlag(field="a\0", reason="\ud800", original_hash="x" * 1_000)
    events += [make_event(redaction_flags=flags) for flags in ([flag], [flag] * 100)]

    await assert_round_trip(database_url, events)
