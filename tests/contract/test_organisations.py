"""Two organisations in one store: what one writes is stamped, and the other sees nothing of it.

The whole public surface is walked: each method has a case, and no case shows or changes anything of the other.
"""

from __future__ import annotations

import asyncio
import inspect
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from contract_helpers import WITH_REDIS, RefusingSink
from organisation_helpers import MARK, SAME_NAMES, TABLES, Other, settle, settle_deliveries
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncSession

from agent_gateway_store import AuditEvent, GatewayStore, Page, clock, errors
from builders import CALL, CALLER, make_event, make_request

Case = Callable[[GatewayStore, Other], Any]
"""What an outsider tries with one method: an answer, or a list of answers."""


def by_token(name: str, *args: Any, **kwargs: Any) -> Case:
    return lambda view, other: [
        getattr(view.approvals, name)(token, *args, **kwargs) for token in other.tokens.values()
    ]


def by_token_and_id(name: str) -> Case:
    return lambda view, other: [
        *(getattr(view.approvals, name)(token, "approver-9") for token in other.tokens.values()),
        *(getattr(view.approvals, name)(approval_id=each, approver_id="approver-9") for each in other.ids.values()),
    ]


def by_caller(name: str) -> Case:
    return lambda view, other: [
        getattr(view.keys, name)("only-there"),
        getattr(view.keys, name)("dev-agent", org_id="globex"),
    ]


async def _recorded(view: GatewayStore, event: AuditEvent) -> Any:
    async with AsyncSession(view.database.engine) as session:
        outcome = await view.audit.record(event, session=session)
        await session.commit()
    return outcome


async def _called(view: GatewayStore, org_id: str) -> AuditEvent:
    caller = CALLER.model_copy(update={"org_id": org_id})
    async with view.audit.call(CALL, caller, decision="ALLOW", intent=True) as event:
        return event


async def _all(events: AsyncIterator[AuditEvent]) -> list[AuditEvent]:
    return [event async for event in events]


async def _first(events: AsyncIterator[AuditEvent]) -> list[AuditEvent]:
    try:
        return [await asyncio.wait_for(anext(events), 0.5)]
    except TimeoutError:
        return []


async def _without_cursor(page: Awaitable[Page[AuditEvent]]) -> list[AuditEvent]:
    """The cursor tells how far the whole database is, and differs from one to the other."""
    return list(await page)


async def _without_times(page: Awaitable[Page[dict[str, Any]]]) -> list[dict[str, Any]]:
    return [{name: value for name, value in row.items() if name != "moved_at"} for row in await page]


async def _texts(frame: Awaitable[Any]) -> list[Any]:
    found = await frame
    if hasattr(found, "to_pylist"):
        return list(found.to_pylist())
    return list(found.to_dict("records") if hasattr(found, "to_numpy") and hasattr(found, "iloc") else found.to_dicts())


async def _exported(service: Any, name: str, **filters: Any) -> Any:
    with tempfile.TemporaryDirectory() as folder:
        result = await service.export(Path(folder) / name, **filters)
        return result.rows, (Path(folder) / name).read_bytes() if name != "e.parquet" else b""


async def _imported(view: GatewayStore, event: AuditEvent) -> Any:
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "e.jsonl").write_text(event.model_dump_json())
        return await view.audit.import_file(Path(folder) / "e.jsonl")


CASES: dict[str, Case] = {
    "audit.write": lambda view, other: [
        view.audit.write(make_event(**SAME_NAMES)),
        view.audit.write(make_event(request_id="r-1", org_id="globex")),
    ],
    "audit.write_many": lambda view, other: [
        view.audit.write_many([make_event(**SAME_NAMES), make_event(**SAME_NAMES, org_id="globex")])
    ],
    "audit.record": lambda view, other: [_recorded(view, make_event(**SAME_NAMES, org_id="globex"))],
    "audit.call": lambda view, other: [_called(view, "acme"), _called(view, "globex")],
    "audit.orphans": lambda view, other: [view.audit.orphans(older_than=timedelta())],
    "audit.flush": lambda view, other: [view.audit.flush()],
    "audit.get": lambda view, other: [view.audit.get(other.event.id or 0), view.audit.get(2**63), view.audit.get(-1)],
    "audit.get_by_request_id": lambda view, other: [view.audit.get_by_request_id("r-1")],
    "audit.list_by_caller": lambda view, other: [view.audit.list_by_caller("dev-agent", limit=1000)],
    "audit.list_by_decision": lambda view, other: [view.audit.list_by_decision("ALLOW", limit=1000)],
    "audit.list_recent": lambda view, other: [view.audit.list_recent(limit=1000)],
    "audit.search": lambda view, other: [
        view.audit.search(limit=1000),
        view.audit.search(org_id="globex"),
        view.audit.search(org_id=["globex", "acme"], session_id=MARK),
        view.audit.search(text=MARK),
        view.audit.search(limit=1, cursor=other.audit_cursor),
    ],
    "audit.stream": lambda view, other: [_all(view.audit.stream()), _all(view.audit.stream(org_id="globex"))],
    "audit.stats": lambda view, other: [
        view.audit.stats(),
        view.audit.stats("org_id", "1h"),
        view.audit.stats(["session_id"], org_id="globex"),
        view.audit.stats(["hour_of_day", "session_id"], time_zone="Europe/Berlin"),
    ],
    "audit.changes": lambda view, other: [
        _without_cursor(view.audit.changes("beginning")),
        _without_cursor(view.audit.changes("beginning", org_id="globex")),
        view.audit.changes(other.changes_cursor),
    ],
    "audit.follow": lambda view, other: [_first(view.audit.follow(start="beginning", poll_s=0.01))],
    "audit.to_arrow": lambda view, other: [_texts(view.audit.to_arrow()), _texts(view.audit.to_arrow(text=MARK))],
    "audit.to_pandas": lambda view, other: [_texts(view.audit.to_pandas())],
    "audit.to_polars": lambda view, other: [_texts(view.audit.to_polars())],
    "audit.export": lambda view, other: [_exported(view.audit, name) for name in ("e.jsonl", "e.csv", "e.parquet")],
    "audit.import_file": lambda view, other: [_imported(view, make_event(**SAME_NAMES, org_id="globex"))],
    "approvals.issue_token": lambda view, other: [
        *(view.approvals.issue_token(make_request(request_id=f"r-{status}")) for status in other.tokens),
        view.approvals.issue_token(make_request(org_id="globex")),
        *(view.approvals.issue_token(make_request(token=token)) for token in other.tokens.values()),
        *(view.approvals.issue_token(make_request(approval_id=each)) for each in other.ids.values()),
    ],
    "approvals.acquire": lambda view, other: [
        view.approvals.acquire(make_request()),
        view.approvals.acquire(make_request(org_id="globex")),
    ],
    "approvals.check_token": lambda view, other: [
        view.approvals.check_token(token, fresh=fresh) for token in other.tokens.values() for fresh in (False, True)
    ],
    "approvals.approve": by_token_and_id("approve"),
    "approvals.deny": by_token_and_id("deny"),
    "approvals.cancel": by_token_and_id("cancel"),
    "approvals.consume_token": by_token("consume_token", caller_id="dev-agent", tool_call=CALL),
    "approvals.release_output": by_token("release_output", caller_id="dev-agent"),
    "approvals.record_outcome": lambda view, other: [
        *(view.approvals.record_outcome(token, "SUCCESS") for token in other.tokens.values()),
        *(view.approvals.record_outcome(approval_id=each, outcome="SUCCESS") for each in other.ids.values()),
    ],
    "approvals.wait_for_decision": by_token("wait_for_decision", timeout_s=0.01),
    "approvals.get": lambda view, other: [view.approvals.get(approval_id=each) for each in other.ids.values()],
    "approvals.list_requests": lambda view, other: [
        view.approvals.list_requests(limit=1000),
        view.approvals.list_requests(limit=1000, cursor=other.cursor),
        *(view.approvals.list_requests(status) for status in other.tokens),
    ],
    "approvals.search": lambda view, other: [
        view.approvals.search(limit=1000),
        view.approvals.search(org_id="globex"),
        view.approvals.search(text=MARK, cursor=other.cursor),
        view.approvals.search(approver_id=f"by-{MARK}"),
    ],
    "approvals.stream": lambda view, other: [
        _all(view.approvals.stream()),
        _all(view.approvals.stream(org_id="globex")),
        _all(view.approvals.stream(text=MARK)),
    ],
    "approvals.stats": lambda view, other: [
        view.approvals.stats(),
        view.approvals.stats(["org_id", "approver_id"], "1h"),
        view.approvals.stats("approver_id", time_zone="Europe/Berlin", org_id="globex"),
    ],
    "approvals.export": lambda view, other: [
        *(_exported(view.approvals, name) for name in ("a.jsonl", "a.csv", "e.parquet")),
        _exported(view.approvals, "a.jsonl", org_id="globex"),
    ],
    "approvals.history": lambda view, other: [view.approvals.history(each) for each in other.ids.values()],
    "approvals.expire_stale": lambda view, other: [view.approvals.expire_stale()],
    "keys.issue": lambda view, other: [
        view.keys.issue("only-there", role="r"),
        view.keys.issue("dev-agent", role="r", org_id="globex"),
    ],
    "keys.verify": lambda view, other: [view.keys.verify(other.key.plaintext)],
    "keys.rotate": by_caller("rotate"),
    "keys.revoke": by_caller("revoke"),
    "keys.get": by_caller("get"),
    "keys.read": by_caller("read"),
    "keys.list": lambda view, other: [view.keys.list(limit=1000), view.keys.list(offset=0)],
}

CASES |= {
    "notifications.list": lambda view, other: [
        view.notifications.list(limit=1000),
        *(view.notifications.list(status) for status in ("DUE", "DELIVERED", "DEAD")),
        *(view.notifications.list(approval_id=each) for each in other.ids.values()),
        view.notifications.list(cursor=other.delivery_cursor),
    ],
    "notifications.counts": lambda view, other: [view.notifications.counts()],
    "notifications.redrive": lambda view, other: [
        view.notifications.redrive(),
        *(view.notifications.redrive(each) for each in other.deliveries),
    ],
    "notifications.run": lambda view, other: [view.notifications.run(once=True)],
    "notifications.prune": lambda view, other: [view.notifications.prune(timedelta())],
}

CASES |= {
    "evidence.prove": lambda view, other: [view.evidence.prove("r-1"), view.evidence.prove("r-2")],
    "evidence.seal": lambda view, other: [view.evidence.seal()],
    "evidence.checkpoint": lambda view, other: [view.evidence.checkpoint()],
    "evidence.verify": lambda view, other: [view.evidence.verify()],
    "evidence.publish": lambda view, other: [view.evidence.publish("log")],
}

CASES |= {
    "retention.prune": lambda view, other: [
        view.retention.prune(timedelta(), by="acme", discard=True, below_floor=True),
    ],
    "retention.hold": lambda view, other: [view.retention.hold("h", reason="r", by="acme", org_id="globex")],
    "retention.release_hold": lambda view, other: [view.retention.release_hold("h", by="acme")],
    "retention.prune_approvals": lambda view, other: [
        view.retention.prune_approvals(timedelta(), by="acme", discard=True, below_floor=True),
    ],
    "retention.erase": lambda view, other: [
        view.retention.erase(name, reason="r", by="acme") for name in ("r-1", "r-2", "r-PENDING")
    ],
    "retention.find": lambda view, other: [
        view.retention.find(caller_id="dev-agent"),
        view.retention.find(text=MARK),
    ],
    "retention.holds": lambda view, other: [view.retention.holds()],
}

CASES |= {
    "audit.ship": lambda view, other: [view.audit.ship(RefusingSink("acme"), once=True)],
    "sinks.list": lambda view, other: [_without_times(view.sinks.list())],
    "sinks.dead_letters": lambda view, other: [view.sinks.dead_letters(), view.sinks.dead_letters(MARK)],
    "sinks.redrive": lambda view, other: [view.sinks.redrive(), view.sinks.redrive(MARK)],
    "sinks.forget": lambda view, other: [view.sinks.forget(MARK)],
}

PROPERTIES = {"audit.counters"}
"""What a process counts of itself; numbers only."""


def surface() -> set[str]:
    store = GatewayStore("sqlite://", redis_url="")
    found = set()
    for service in ("audit", "approvals", "keys", "notifications", "evidence", "retention", "sinks"):
        kind = type(getattr(store, service))
        # A method that is bound to the class is another constructor.
        public = [name for name in dir(kind) if not name.startswith("_") and not inspect.ismethod(getattr(kind, name))]
        found |= {f"{service}.{name}" for name in public}
    return found


def test_every_public_method_has_a_case() -> None:
    assert surface() == CASES.keys() | PROPERTIES


async def rows(store: GatewayStore) -> dict[str, list[Any]]:
    async with store.database.engine.connect() as connection:
        return {
            table: [tuple(row) for row in await connection.execute(
                text(f"SELECT * FROM {table} WHERE org_id = 'globex' ORDER BY id"))]
            for table in TABLES
        }  # fmt: skip


def shown(answer: Any) -> str:
    parts = [repr(answer), str(answer)]
    if hasattr(answer, "to_dicts"):
        parts += [str(answer.to_dicts()), answer._repr_html_(), str(answer.next_cursor)]
    items = answer if isinstance(answer, list) else [answer]
    parts += [item.model_dump_json() for item in items if hasattr(item, "model_dump_json")]
    return "\n".join(parts)


async def told(answer: Awaitable[Any]) -> str:
    try:
        return shown(await answer)
    except (errors.GatewayStoreError, ValueError) as exc:
        return f"{exc!r} {exc} {vars(exc)}"


@pytest.fixture
async def other(store: GatewayStore) -> Other:
    """The other organisation; beside the same names it has a caller of its own."""
    view = store.for_org("globex")
    settled = await settle(view, MARK)
    await settle_deliveries(settled)
    await view.keys.issue("only-there", role=MARK)
    await view.audit.ship(RefusingSink(MARK), once=True)
    return settled


async def attempt(name: str, view: GatewayStore, other: Other) -> str:
    return "\n".join([await told(answer) for answer in CASES[name](view, other)])


@WITH_REDIS
async def test_nothing_of_the_other_organisation_is_shown_or_changed(store: GatewayStore, other: Other) -> None:
    """Neither a row nor an id nor a word of it is in any answer or error, and its rows stay as they were."""
    before = await rows(store)
    for name in sorted(CASES, key=lambda name: name == "approvals.expire_stale"):
        if name == "approvals.expire_stale":
            clock.move(timedelta(hours=3))
        everything = await attempt(name, store.for_org("acme"), other)

        assert MARK not in everything, name
        if name != "approvals.issue_token":  # which is told of the id and the token that it brings itself
            assert not [each for each in other.ids.values() if str(each) in everything], name
        assert other.key.api_key.key_id not in everything, name
        assert not [each for each in other.deliveries if str(each) in everything], name
        assert await rows(store) == before, name


WRITING = {"approvals.issue_token", "approvals.acquire", "keys.issue"} | {
    f"audit.{name}" for name in ("write", "write_many", "record", "call", "import_file")
}


@pytest.mark.parametrize("database_url", ["postgres"], indirect=True)
@WITH_REDIS
async def test_answers_are_those_of_a_store_without_the_other(
    store: GatewayStore, other: Other, tmp_path: Path
) -> None:
    """To the word, counts included, one is told what one is told where the other organisation does not exist."""
    async with GatewayStore(f"sqlite:///{tmp_path}/alone.db", redis_url="") as alone:
        for name in sorted(CASES.keys() - WRITING, key=lambda name: name == "approvals.expire_stale"):
            if name == "approvals.expire_stale":
                clock.move(timedelta(hours=3))
            here, there = [await attempt(name, one.for_org("acme"), other) for one in (store, alone)]
            assert here == there, name
