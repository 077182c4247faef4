"""The console while its database is away, or has another schema: it says so, waits, and notices the return."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import console_helpers
import pytest
from console_helpers import Visitor, console, key_of, life, signed_in, status, waiting
from sqlalchemy import text

from agent_gateway_store import GatewayStore
from agent_gateway_store.console import create_console, pages
from agent_gateway_store.errors import StoreUnavailableError
from agent_gateway_store.storage.migrate import VERSION_TABLE

url, store, app = console_helpers.url, console_helpers.store, console_helpers.app


class _Away:
    """A store whose database can be taken away."""

    def __init__(self, store: GatewayStore, monkeypatch: pytest.MonkeyPatch) -> None:
        self.is_away = self.hangs = False
        connection = store.database.read

        @asynccontextmanager
        async def read() -> AsyncIterator[Any]:
            if self.is_away:
                raise StoreUnavailableError("The database cannot be reached.")
            if self.hangs:
                await asyncio.Event().wait()
            async with connection() as found:
                yield found

        monkeypatch.setattr(store.database, "read", read)


async def test_a_database_that_is_away_is_told_and_its_return_is_noticed(
    store: GatewayStore, app: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The page tries again by itself without a script, keeps the address, and says nothing of the cause.

    A note that was sent stays on the screen; a sign-in leads on to where it would have led, and counts as no failure.
    """
    request = await waiting(store)
    alice = await signed_in(store, app)
    csrf, key = await alice.csrf(), await key_of(store, "bob")
    decision, sent = f"/approvals/{request.approval_id}/decision", {"decision": "approve", "csrf": csrf}
    database = _Away(store, monkeypatch)

    database.is_away = True
    answer = await alice.get("/audit?caller_id=x")
    form, noted = [await alice.post(decision, sent | note) for note in ({}, {"note": "<b>&"})]
    entries = [await alice.post("/login", {"key": key, "next": "/audit?text=a&since=1d"}) for _ in range(11)]
    health = [await status(alice, path) for path in ("/healthz", "/readyz")]
    database.is_away = False

    assert (answer.status_code, form.status_code, health) == (503, 503, [200, 503])
    assert 'http-equiv="refresh" content="5;url=/audit?caller_id=x"' in answer.text
    assert f'content="5;url=/approvals/{request.approval_id}"' in form.text
    assert "not known whether" in form.text
    assert "readonly>\n&lt;b&gt;&amp;</textarea>" in noted.text
    assert 'http-equiv="refresh"' not in noted.text
    assert {each.status_code for each in entries} == {503}
    assert 'content="5;url=/login?next=%2Faudit%3Ftext%3Da%26since%3D1d"' in entries[0].text
    assert "you are not signed in" in entries[0].text
    assert "reached" not in answer.text
    assert await status(alice, "/audit?caller_id=x") == 200
    assert await status(alice, "/readyz") == 200
    monkeypatch.setattr(pages, "SESSION_S", 0.05)
    database.hangs = True
    async with asyncio.timeout(10):
        assert await status(alice, "/approvals") == 503
    database.hangs = False
    assert (await Visitor(app).sign_in(key)).status_code == 303


async def test_the_console_starts_before_its_database(tmp_path: Path, store: GatewayStore, url: str) -> None:
    """Served by itself it opens the store once that can be, after `db upgrade`, too, and closes it at the end."""
    folder = tmp_path / "later"
    own = GatewayStore(f"sqlite:///{folder}/gateway.db", redis_url="")
    async with life(app := create_console(own)):
        visitor = Visitor(app)
        before = await status(visitor, "/approvals")
        folder.mkdir()
        after = await status(visitor, "/approvals")
        assert await status(visitor, "/readyz") == 200

    assert (before, after) == (503, 303)
    with pytest.raises(Exception, match="not open"):
        await own.ping()
    # The log is that of all organisations: a store of one is asked nothing about it.
    async with life(bound := create_console(store.for_org("acme"))):
        assert await status(Visitor(bound), "/readyz") == 200
    async with console(url) as (other, _), other.database.sessions() as session, session.begin():
        await session.execute(text(f"UPDATE {VERSION_TABLE} SET version_num = '0001'"))
    async with life(later := create_console(GatewayStore(url, redis_url=""))):
        assert [await status(Visitor(later), path) for path in ("/readyz", "/approvals")] == [503, 503]
