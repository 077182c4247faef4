"""What an earlier version left: its database, its spool, and what it handed out are worked on as if they were ours.

The files of `store_before_renames` were written by the last version before modules and words got their present names:
events of two organisations, approvals in every state with notices due, keys, and a spool of what came while the
database was locked. `facts.json` holds what callers had got: tokens, keys, cursors, and the hashes as they stood.
"""

from __future__ import annotations

import gzip
import json
import sqlite3
from collections.abc import AsyncIterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from agent_gateway_store import AuditEvent, GatewayStore, StoreSettings, errors
from agent_gateway_store.testing import RecordingNotifier
from builders import CALL, make_event, make_request, rehash

pytestmark = pytest.mark.unit

KEPT = Path(__file__).with_name("store_before_renames")
FACTS: dict[str, Any] = json.loads((KEPT / "facts.json").read_text())
SPOOLED = ["spooled", "spooled of acme"]


@pytest.fixture
def notifier() -> RecordingNotifier:
    return RecordingNotifier("kept")


@pytest.fixture
async def store(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, notifier: RecordingNotifier
) -> AsyncIterator[GatewayStore]:
    """A store of today on a copy of those files, migrated."""
    monkeypatch.setenv("AGENT_GATEWAY_STORE_LOAD_PLUGINS", "")
    for name in ("database", "spool"):
        (tmp_path / f"{name}.sqlite").write_bytes(gzip.decompress((KEPT / f"{name}.sqlite.gz").read_bytes()))
    database = tmp_path / "database.sqlite"
    with closing(sqlite3.connect(tmp_path / "spool.sqlite", isolation_level=None)) as spool:
        # The spool knows the database by its path, and that has moved.
        moved = "UPDATE spooled_events SET target = replace(target, '/tmp/build/gateway.db', ?)"
        spool.execute(moved, [str(database)])
    settings = StoreSettings(
        database_url=f"sqlite:///{database}",
        redis_url="",
        audit_spool_path=tmp_path / "spool.sqlite",
        notification_worker=False,
    )
    async with GatewayStore(settings=settings, plugins=[notifier], auto_migrate=True) as opened:
        yield opened


async def test_events_are_read_and_their_hashes_hold(store: GatewayStore) -> None:
    assert await store.audit.flush() == 0

    events = await store.audit.search()

    assert {event.request_id for event in events} == {"plain", "denied", "hostile", *SPOOLED}
    assert [event for event in events if rehash(event) != event.content_hash] == []
    found = {f"{event.org_id}/{event.request_id}": event.content_hash for event in events}
    assert {name: found[name] for name in FACTS["hashes"]} == FACTS["hashes"]


async def test_the_spool_is_replayed_once(store: GatewayStore, tmp_path: Path) -> None:
    await store.audit.flush()
    await store.audit.flush()

    assert [event.request_id for event in await store.audit.search(limit=2)][::-1] == SPOOLED
    assert len(await store.audit.search()) == len(FACTS["hashes"]) + len(SPOOLED)
    with closing(sqlite3.connect(tmp_path / "spool.sqlite")) as spool:
        assert spool.execute("SELECT count(*) FROM spooled_events").fetchone() == (0,)


async def test_cursors_lead_on(store: GatewayStore) -> None:
    """Of a listing to what is older, of a follower to what it has not seen: stored, spooled, and written today."""
    await store.audit.flush()
    await store.audit.write(make_event(request_id="of today"))

    older = await store.audit.search(cursor=FACTS["search_cursor"])
    newer = await store.audit.changes(FACTS["changes_cursor"])

    assert [event.request_id for event in older] == ["hostile", "denied", "plain"]
    assert [event.request_id for event in newer] == ["hostile", "plain", *SPOOLED, "of today"]


async def test_a_repeated_event_is_the_one_that_is_there(store: GatewayStore) -> None:
    """What was stored then is not stored again; another organisation may use its request id."""
    stored = await store.audit.get_by_request_id("denied")
    assert stored is not None

    again = AuditEvent(**stored.model_dump(exclude={"id", "content_hash"}))
    assert await store.audit.write(again) == "DUPLICATE"
    assert await store.for_org("acme").audit.write(make_event(request_id="denied")) == "STORED"


async def test_tokens_go_on(store: GatewayStore) -> None:
    """Each approval has the state it had, and is decided, used and refused by the token of then."""
    tokens, approvals = FACTS["tokens"], store.approvals
    states = {name: (await approvals.check_token(token)).status for name, token in tokens.items()}
    assert states == {
        "pending": "PENDING",
        "half": "PENDING",
        "approved": "APPROVED",
        "denied": "DENIED",
        "used": "USED",
    }

    with pytest.raises(errors.GatewayStoreError):
        await approvals.approve(tokens["half"], "alice")
    assert (await approvals.approve(tokens["half"], "carol")).status == "APPROVED"
    assert (await approvals.deny(tokens["pending"], "carol")).status == "DENIED"
    assert (await approvals.consume_token(tokens["approved"], caller_id="dev-agent", tool_call=CALL)).status == "USED"
    with pytest.raises(errors.GatewayStoreError):
        await approvals.consume_token(tokens["used"], caller_id="dev-agent", tool_call=CALL)
    fresh = await approvals.issue_token(make_request())
    assert (await approvals.check_token(fresh)).status == "PENDING"


async def test_keys_are_known(store: GatewayStore) -> None:
    assert (await store.keys.verify(FACTS["key"])).caller_id == "dev-agent"
    with pytest.raises(errors.GatewayStoreError):
        await store.keys.verify(FACTS["revoked_key"])


async def test_notices_that_waited_are_sent(store: GatewayStore, notifier: RecordingNotifier) -> None:
    assert await store.notifications.run(once=True) == FACTS["due"]

    assert len(notifier.notices) == FACTS["due"]
    assert await store.notifications.list("DUE") == []
