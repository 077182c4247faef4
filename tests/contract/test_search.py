"""Search: every filter alone and combined, pages that stay put, cursors of one search only."""

from __future__ import annotations

import base64
import pickle
import random
from contextlib import aclosing
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID

import pytest
from contract_helpers import POSTGRES
from sqlalchemy.ext.asyncio import AsyncSession

from agent_gateway_store import AuditEvent, AuditQuery, GatewayStore, clock, errors
from builders import make_event
from cases import cases
from proofs.hostile import Hostile

START = datetime(2026, 5, 1, tzinfo=UTC)


APPROVALS = (UUID(int=1), UUID(int=2**127 + 5))


def random_fields(rng: random.Random, number: int) -> dict[str, Any]:
    return {
        "request_id": f"r-{number}",
        # The first two stand where a period of `FILTERS` begins, and where one ends.
        "timestamp": START + timedelta(minutes=(60, 120)[number] if number < 2 else rng.randrange(200)),
        "caller_id": rng.choice(("anna", "bert", "x" * 600)),
        "tool_name": rng.choice(("read_file", "Read_File", "delete%file", "delete\\_file")),
        "mcp_server": rng.choice(("files", "mail")),
        "org_id": rng.choice(("acme", "globex")),
        "environment": rng.choice(("dev", "prod")),
        "session_id": rng.choice((None, "s-1", "s-2")),
        "trace_id": rng.choice((None, "t-1")),
        "key_id": rng.choice((None, "k-1")),
        "approver_id": rng.choice((None, "carla")),
        "parent_request_id": rng.choice((None, "r-0")),
        "approval_id": rng.choice((None, *APPROVALS)),
        "raw_args_hash": AuditEvent.hash_args({"n": rng.randrange(3)}),
        "decision": rng.choice(("ALLOW", "DENY", "APPROVAL_REQUIRED")),
        "output_decision": rng.choice(("ALLOW", "REDACT")),
        "execution_status": rng.choice((None, "SUCCESS", "TIMEOUT")),
        "risk_labels": rng.sample(("PII", "WRITE", 'it\'s "odd"'), rng.randrange(3)),
        "risk_score": rng.choice((0.0, 0.5, 0.9)),
        "deterministic_rationale": rng.choice(("rule 1", "100% safe", "RULE_2")),
        "llm_explanation": rng.choice((None, "Looks harmless")),
    }


def matches(event: AuditEvent, name: str, wanted: Any) -> bool:
    if name == "since":
        return event.timestamp >= wanted
    if name == "until":
        return event.timestamp < wanted
    if name == "min_risk_score":
        return event.risk_score >= wanted
    if name == "text":
        texts = (event.tool_name, event.deterministic_rationale, event.llm_explanation or "")
        return any(wanted.lower() in text.lower() for text in texts)
    several = [wanted] if isinstance(wanted, str | UUID) else list(wanted)
    if name == "risk_label":
        return bool(set(event.risk_labels) & set(several))
    if name == "caller_id" and "x" * 600 in several:
        several.append("x" * 447 + "~" + event.caller_id[-64:])
    return getattr(event, name) in several


FILTERS: dict[str, tuple[Any, ...]] = {
    "request_id": ("r-7", ["r-7", "r-8"]),
    "caller_id": ("anna", {"anna", "bert"}, "x" * 600),
    "tool_name": ("read_file", ("read_file", "delete%file")),
    "mcp_server": ("mail",),
    "org_id": ("acme",),
    "environment": ("prod",),
    "session_id": ("s-1",),
    "trace_id": ("t-1",),
    "key_id": ("k-1",),
    "approver_id": ("carla",),
    "parent_request_id": ("r-0",),
    "approval_id": (APPROVALS[0], [APPROVALS[0]], APPROVALS),
    "raw_args_hash": (AuditEvent.hash_args({"n": 1}),),
    "decision": ("DENY", ["DENY", "ALLOW"]),
    "output_decision": ("REDACT",),
    "execution_status": ("TIMEOUT", ["TIMEOUT", "SUCCESS"]),
    "risk_label": ("PII", 'it\'s "odd"', ["PII", "WRITE"]),
    "min_risk_score": (0.5,),
    "since": (START + timedelta(minutes=60),),
    "until": (START + timedelta(minutes=120),),
    "text": ("READ_", "e%f", "\\_", "harmless", "100%"),
}


async def test_every_filter_finds_what_it_means(store: GatewayStore) -> None:
    """Each alone with each value, and 60 random combinations: what Python picks, in the same order."""
    rng = random.Random(7)
    await store.audit.write_many(make_event(**random_fields(rng, number)) for number in range(150))
    everything = await store.audit.list_recent(1_000)
    asked: list[dict[str, Any]] = [{name: value} for name, values in FILTERS.items() for value in values]
    for _ in range(60):
        names = rng.sample(sorted(FILTERS), rng.randrange(2, 5))
        asked.append({name: rng.choice(FILTERS[name]) for name in names})
    found = 0
    for filters in asked:
        expected = [event for event in everything if all(matches(event, *each) for each in filters.items())]
        assert await store.audit.search(**filters, limit=1_000) == expected, filters
        found += bool(expected)

    assert len(everything) == 150
    assert found > 50
    assert await store.audit.search(caller_id=[], limit=10) == []
    assert await store.audit.search(caller_id=None, since=None, limit=1_000) == everything


@POSTGRES
async def test_times_are_told_in_many_ways(store: GatewayStore) -> None:
    """A datetime, naive as UTC; a timedelta or "24h" is so long ago; ISO text; too long a period is the beginning."""
    now = clock.utc_now()
    for hours in (1, 30, 200):
        await store.audit.write(make_event(request_id=f"{hours}h", timestamp=now - timedelta(hours=hours)))

    async def since(given: Any) -> list[str]:
        return [event.request_id for event in await store.audit.search(since=given)]

    assert await since("24h") == await since(timedelta(days=1)) == await since("1440 m") == ["1h"]
    assert await since("7d") == await since("1w") == ["1h", "30h"]
    assert await since((now - timedelta(hours=31)).replace(tzinfo=None)) == ["1h", "30h"]
    assert await since((now - timedelta(hours=31)).isoformat()) == ["1h", "30h"]
    assert await since("999999999w") == await since(timedelta.max) == ["1h", "30h", "200h"]
    assert await store.audit.search(until="24h", since="100h") == [await store.audit.get_by_request_id("30h")]


@POSTGRES
@cases(
    ("filters", "error", "says"),
    [
        ({"callerid": "x"}, TypeError, "no filter 'callerid': use one of caller_id, tool_name"),
        ({"caller_id": 5}, TypeError, "caller_id must be text, not int"),
        ({"caller_id": ["a", 5]}, TypeError, "caller_id must be text, not int"),
        ({"approval_id": ["a"]}, ValueError, "approval_id must be a UUID, not 'a'"),
        ({"decision": "MAYBE"}, ValueError, "decision must be one of ALLOW, DENY"),
        ({"execution_status": ["MAYBE"]}, ValueError, "execution_status must be one of SUCCESS"),
        ({"since": "yesterday"}, ValueError, "since must be a time such as"),
        ({"until": 5}, TypeError, "until must be a datetime"),
        ({"min_risk_score": "high"}, TypeError, "min_risk_score must be a number"),
        ({"min_risk_score": float("nan")}, ValueError, "not NaN"),
        ({"text": ""}, ValueError, "text must have 1 to 1,000 characters"),
        ({"text": "x" * 1_001}, ValueError, "text must have 1 to 1,000 characters"),
        ({"limit": "5"}, TypeError, "limit must be a whole number, not str"),
        ({"limit": 0}, ValueError, "limit must be 1 to 100,000"),
        ({"limit": 2**70}, ValueError, "limit must be 1 to 100,000"),
    ],
)
async def test_a_wrong_filter_is_one_sentence(
    store: GatewayStore, filters: dict[str, Any], error: type[Exception], says: str
) -> None:
    with pytest.raises(error, match=says) as caught:
        await store.audit.search(**filters)

    assert "\n" not in str(caught.value)


async def test_hostile_filters_find_nothing_and_break_nothing(store: GatewayStore) -> None:
    """Whatever text is looked for is looked for as it would be stored."""
    hostile = Hostile(3)
    await store.audit.write(make_event(caller_id="a\0b", tool_name="nul\ud800", risk_labels=["c\0"]))
    for _ in range(20):
        text = hostile.text()
        for name in ("caller_id", "tool_name", "request_id", "risk_label", "session_id"):
            await store.audit.search(**{name: text})  # type: ignore[arg-type]
            await store.audit.search(**{name: [text, "x"]})  # type: ignore[arg-type]
        if 0 < len(text) < 900:
            await store.audit.search(text=text)
    for score in (float("inf"), 10**400, -(10**400)):
        assert len(await store.audit.search(min_risk_score=score)) == (score < 0)

    found = await store.audit.search(caller_id="a\0b", tool_name="nul\ud800", risk_label="c\0", text="L\ud800")
    assert len(found) == 1


async def test_pages_stay_put_while_events_are_added(store: GatewayStore) -> None:
    """A walk by cursor gives each event once, newest first, also where many share one time."""
    times = [START + timedelta(seconds=number // 7) for number in range(40)]
    await store.audit.write_many(make_event(request_id=f"r-{n}", timestamp=time) for n, time in enumerate(times))
    expected = [event.request_id for event in await store.audit.list_recent(100)]
    seen: list[str] = []
    cursor = None
    while True:
        page = await store.audit.search(caller_id="dev-agent", limit=6, cursor=cursor)
        seen += [event.request_id for event in page]
        await store.audit.write(make_event(timestamp=START + timedelta(days=1)))
        if (cursor := page.next_cursor) is None:
            break

    assert seen == expected
    assert len(page) == 40 % 6


@POSTGRES
async def test_a_cursor_is_of_one_search(store: GatewayStore) -> None:
    """Other filters, another organisation, another listing, or a byte changed: InvalidCursorError."""
    await store.audit.write_many(make_event(org_id="acme") for _ in range(5))
    cursor = (await store.audit.search(caller_id="dev-agent", limit=2)).next_cursor
    assert cursor is not None
    assert len(await store.audit.search(caller_id=["dev-agent"], limit=1, cursor=cursor)) == 1
    acme = store.for_org("acme")
    theirs = (await acme.audit.search(caller_id="dev-agent", limit=2)).next_cursor
    changes = (await store.audit.changes(caller_id="dev-agent")).next_cursor
    forged = [
        *("", "x", "é", "\0", cursor + "A", cursor + "=", cursor[:-1], " " + cursor, "A" * 10_000_000),
        *(base64.urlsafe_b64encode(bytes([byte]) * 25).decode().rstrip("=") for byte in (0, 1, 255)),
        *(cursor[:place] + ("A" if cursor[place] != "A" else "B") + cursor[place + 1 :] for place in range(12)),
        theirs,
        changes,
    ]
    for each in forged:
        with pytest.raises(errors.InvalidCursorError, match="not of this listing"):
            await store.audit.search(caller_id="dev-agent", cursor=each)
    for filters in ({}, {"caller_id": "other"}, {"caller_id": "dev-agent", "decision": "ALLOW"}):
        with pytest.raises(errors.InvalidCursorError):
            await store.audit.search(**filters, cursor=cursor)  # type: ignore[arg-type]
    with pytest.raises(errors.InvalidCursorError):
        await acme.audit.search(caller_id="dev-agent", cursor=cursor)


async def test_events_equal_those_that_were_validated(store: GatewayStore) -> None:
    """Events made from rows without validation are what validation of the same values gives, to the type of each."""
    hostile = Hostile(11)
    await store.audit.write_many(hostile.event() for _ in range(60))
    events = await store.audit.list_recent(1_000)
    for event in events:
        again = AuditEvent.model_validate(event.model_dump())
        assert again == event
        assert event.model_fields_set == set(AuditEvent.model_fields)
        for name in AuditEvent.model_fields:
            assert type(getattr(again, name)) is type(getattr(event, name)), name
        assert pickle.loads(pickle.dumps(event)) == event
        assert AuditEvent.model_validate_json(event.model_dump_json()) == event

    assert len(events) == 60


async def test_stream_gives_everything_once(store: GatewayStore) -> None:
    """All that matches, newest first, as it was at the first; also when the reader leaves early."""
    await store.audit.write_many(make_event(request_id=f"r-{n}", risk_score=n % 2) for n in range(2_500))
    seen = []
    async for event in store.audit.stream(min_risk_score=1):
        seen.append(event)
        if len(seen) == 3:
            await store.audit.write(make_event(risk_score=1))
    async with aclosing(store.audit.stream()) as events:
        async for _ in events:
            break
    everything = await store.audit.search(min_risk_score=1, limit=5_000)

    assert seen == everything[1:]
    assert len(seen) == 1_250
    with pytest.raises(TypeError, match="no filter"):
        await anext(store.audit.stream(nothing="x"))  # type: ignore[call-arg]


async def test_a_query_over_a_session_searches_too(store: GatewayStore) -> None:
    """Also what the session's own transaction has not committed yet; the session stays as it was."""
    await store.audit.write(make_event(request_id="r-1", decision="DENY"))
    async with AsyncSession(store.database.engine) as session:
        await store.audit.record(make_event(request_id="r-2", decision="DENY"), session=session)
        query = AuditQuery(session)
        found = await query.search(decision="DENY", limit=1)
        rest = await query.search(decision="DENY", limit=1, cursor=found.next_cursor)
        total = await query.stats(decision="DENY")
        assert session.in_transaction()
        await session.rollback()

    assert [event.request_id for event in [*found, *rest]] == ["r-2", "r-1"]
    assert total[0]["calls"] == 2
    assert len(await store.audit.search(decision="DENY")) == 1
