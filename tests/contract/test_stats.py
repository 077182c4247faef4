"""Aggregates: what SQL counts is what Python counts, to the last digit, on both databases."""

from __future__ import annotations

import math
from collections import defaultdict
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import uuid4

import pytest
from contract_helpers import POSTGRES
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from agent_gateway_store import AuditEvent, ExecutionStatus, GatewayStore, SyncGatewayStore
from agent_gateway_store.audit.selects import GROUPS
from agent_gateway_store.results import Stats
from builders import make_event
from cases import cases

ORIGIN = datetime(1, 1, 1, tzinfo=UTC)


def reference(events: list[AuditEvent], by: tuple[str, ...], bucket: timedelta | None) -> list[dict[str, Any]]:
    groups: dict[tuple[Any, ...], list[AuditEvent]] = defaultdict(list)
    for event in events:
        start = () if bucket is None else (ORIGIN + (event.timestamp - ORIGIN) // bucket * bucket,)
        keys: list[tuple[Any, ...]] = [start]
        for name in by:
            values = (set(event.risk_labels) or {None}) if name == "risk_label" else {getattr(event, name)}
            keys = [(*key, value) for key in keys for value in values]
        for key in keys:
            groups[key].append(event)
    if not by and bucket is None:
        groups.setdefault((), [])
    names = (*(("bucket",) if bucket is not None else ()), *by)
    rows = [dict(zip(names, key, strict=True)) | _measured(found) for key, found in groups.items()]
    return sorted(rows, key=lambda row: repr([(row[name] is None, str(row[name])) for name in names]))


def _measured(events: list[AuditEvent]) -> dict[str, Any]:
    latencies = sorted(event.latency_ms for event in events)
    return {
        "calls": len(events),
        "denials": sum(event.decision == "DENY" for event in events),
        "approvals": sum(event.decision == "APPROVAL_REQUIRED" for event in events),
        "errors": sum(event.execution_status in ("TOOL_ERROR", "TIMEOUT") for event in events),
        **{
            f"latency_p{percent}_ms": latencies[math.ceil(percent / 100 * len(latencies)) - 1] if latencies else None
            for percent in (50, 95, 99)
        },
    }


def ordered(stats: Stats) -> list[dict[str, Any]]:
    names = (*(("bucket",) if stats.bucket is not None else ()), *stats.by)
    return sorted(stats, key=lambda row: repr([(row[name] is None, str(row[name])) for name in names]))


EVENTS = st.fixed_dictionaries(
    {
        "caller_id": st.sampled_from(("a", "b", "ü")),
        "tool_name": st.sampled_from(("read", "write")),
        "decision": st.sampled_from(("ALLOW", "DENY", "APPROVAL_REQUIRED", "SANITIZE_AND_ALLOW")),
        "execution_status": st.sampled_from((None, *ExecutionStatus)),
        "latency_ms": st.integers(0, 50) | st.sampled_from((2**53 + 1, 2**63 - 1)),
        "risk_labels": st.lists(st.sampled_from(("PII", "é\"'", "W")), max_size=4),
        "session_id": st.sampled_from((None, "s")),
        "timestamp": st.datetimes(datetime(2026, 4, 30, 22), datetime(2026, 5, 4, 2), timezones=st.just(UTC))
        | st.sampled_from(
            (
                datetime(1, 1, 1, tzinfo=UTC),
                datetime(9999, 12, 31, 23, 59, 59, 999999, UTC),
                datetime(2026, 5, 1, 0, 59, 59, 999_999, UTC),
                datetime(1969, 12, 31, 23, 59, 59, 999_600, UTC),
            )
        ),
    }
)


def test_sql_counts_as_python_does(database_url: str) -> None:
    """Counts, labels, buckets and percentiles of random events, grouped at random; among them times at the edges."""

    @given(
        st.lists(EVENTS, max_size=60),
        st.lists(st.sampled_from(GROUPS), unique=True, max_size=3).map(tuple),
        st.sampled_from((None, "1s", "7m", "1h", "1d", "1w", timedelta(days=365_000))),
    )
    @settings(max_examples=12, deadline=None, phases=(Phase.explicit, Phase.generate))
    def counts(events: list[dict[str, Any]], by: tuple[str, ...], bucket: Any) -> None:
        org_id = f"org-{uuid4()}"
        written = [make_event(**fields, org_id=org_id) for fields in events]
        assert sum(store.audit.write_many(written).values()) == len(written)
        found = store.audit.stats(by or None, bucket, org_id=org_id)
        kept = store.audit.search(org_id=org_id, limit=100)

        assert len(kept) == len(written)
        assert ordered(found) == reference(kept, by, found.bucket)

    with SyncGatewayStore(database_url, redis_url="") as store:
        counts()


async def test_rows_come_by_time_and_then_the_largest_first(store: GatewayStore) -> None:
    """A bucket of a week begins on its Monday in UTC; `by`, `bucket` and the columns say how rows are grouped."""
    monday = datetime(2026, 5, 4, tzinfo=UTC)
    for caller, day in (("a", 0), ("b", 1), ("b", 6), ("a", 7)):
        await store.audit.write(make_event(caller_id=caller, timestamp=monday + timedelta(days=day)))
    found = await store.audit.stats("caller_id", "7d")

    shown = [(row["bucket"], row["caller_id"], row["calls"]) for row in found]
    assert shown == [(monday, "b", 2), (monday, "a", 1), (monday + timedelta(days=7), "a", 1)]
    assert (found.by, found.bucket) == (("caller_id",), timedelta(days=7))
    assert tuple(found[0]) == found.columns
    assert found.to_pandas()["calls"].sum() == 4
    assert (await store.audit.stats("caller_id", caller_id="nobody")) == []


@POSTGRES
@cases(
    ("arguments", "error", "says"),
    [
        ({"by": "latency_ms"}, ValueError, "by must name one or more of caller_id"),
        ({"by": ["decision", "decision"]}, ValueError, "each column once"),
        ({"bucket": "1y"}, ValueError, "bucket must be a number with a unit"),
        ({"bucket": "0s"}, ValueError, "whole seconds"),
        ({"bucket": timedelta(milliseconds=1500)}, ValueError, "whole seconds"),
        ({"bucket": timedelta(days=-1)}, ValueError, "whole seconds"),
        ({"bucket": "999999999w"}, ValueError, "whole seconds"),
        ({"bucket": 60}, TypeError, "bucket must be a timedelta or text"),
        ({"nothing": "x"}, TypeError, "no filter 'nothing'"),
    ],
)
async def test_a_wrong_grouping_is_one_sentence(
    store: GatewayStore, arguments: dict[str, Any], error: type[Exception], says: str
) -> None:
    with pytest.raises(error, match=says):
        await store.audit.stats(**arguments)
