"""A SQLite file that is removed or replaced while it is open."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from agent_gateway_store import GatewayStore, StoreSettings
from agent_gateway_store.errors import StoreUnavailableError
from builders import make_event, make_request


async def test_nothing_is_acknowledged_into_a_file_that_was_removed(tmp_path: Path) -> None:
    path, away = tmp_path / "gateway.db", tmp_path / "away"
    away.mkdir()
    settings = StoreSettings(audit_spool_path=tmp_path / "spool.db", audit_seal_seconds=0)
    async with GatewayStore(f"sqlite:///{path}", redis_url="", settings=settings) as store:
        assert await store.audit.write(make_event(request_id="before")) == "STORED"
        # Its own connections have the files beside it open, which belong to it.
        for each in tmp_path.glob("gateway.db*"):
            each.rename(away / each.name)
        assert await store.audit.write(make_event(request_id="meanwhile")) == "SPOOLED"
        with pytest.raises(
            StoreUnavailableError, match="its file was removed or replaced while it was open: put it back"
        ):
            await store.approvals.issue_token(make_request())
        for each in away.iterdir():
            each.rename(tmp_path / each.name)
        await store.audit.flush()
        assert await store.audit.write(make_event(request_id="after")) == "STORED"
    async with GatewayStore(f"sqlite:///{path}", redis_url="") as store:
        found = {event.request_id for event in await store.audit.list_recent()}
    assert found == {"before", "meanwhile", "after"}


async def test_a_file_that_took_its_place_is_not_written(tmp_path: Path) -> None:
    path, backup = tmp_path / "gateway.db", tmp_path / "backup.db"
    async with GatewayStore(f"sqlite:///{path}", redis_url="") as store:
        await store.audit.write(make_event(request_id="old"))
    shutil.copy(path, backup)
    settings = StoreSettings(audit_spool_path=tmp_path / "spool.db", audit_seal_seconds=0)
    async with GatewayStore(f"sqlite:///{path}", redis_url="", settings=settings) as store:
        assert await store.audit.write(make_event(request_id="lost with the old file")) == "STORED"
        backup.rename(path)
        for name in ("new-1", "new-2", "new-3"):
            assert await store.audit.write(make_event(request_id=name)) == "SPOOLED"
        for _ in range(3):
            with pytest.raises(StoreUnavailableError):
                await store.audit.list_recent()
        for each in tmp_path.glob("gateway.db-*"):
            each.unlink()
    async with GatewayStore(f"sqlite:///{path}", redis_url="", settings=settings) as store:
        await store.audit.flush()
        assert {event.request_id for event in await store.audit.list_recent()} == {"old", "new-1", "new-2", "new-3"}


@pytest.mark.parametrize("left", [None, b""])
async def test_no_other_file_is_made_beside_the_log_of_one_that_was_moved_away(
    tmp_path: Path, left: bytes | None
) -> None:
    """SQLite would delete that log, with events that were acknowledged. Put back, the file has them all."""
    path, away = tmp_path / "gateway.db", tmp_path / "away.db"
    settings = StoreSettings(audit_spool_path=tmp_path / "spool.db", audit_seal_seconds=0)
    async with GatewayStore(f"sqlite:///{path}", redis_url="", settings=settings) as store:
        assert await store.audit.write(make_event(request_id="before")) == "STORED"
        path.rename(away)
        if left is not None:
            path.write_bytes(left)
        for _ in range(2):
            with pytest.raises(StoreUnavailableError, match="moved away: put that back, or remove both"):
                await GatewayStore(f"sqlite:///{path}", redis_url="", settings=settings).open()
        away.rename(path)
        assert await store.audit.write(make_event(request_id="after")) == "STORED"
        await store.audit.flush()
    async with GatewayStore(f"sqlite:///{path}", redis_url="") as store:
        assert {event.request_id for event in await store.audit.list_recent()} == {"before", "after"}


@pytest.mark.parametrize("url", ["sqlite:///gateway.db", "sqlite:///file:gateway%2edb?mode=rwc&uri=true"])
async def test_a_file_is_the_same_from_another_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, url: str
) -> None:
    """A relative name counts from where the store was made, also for connections that are new."""
    home, away = tmp_path / "at home, 100%3f é#?", tmp_path / "elsewhere"
    home.mkdir()
    away.mkdir()
    monkeypatch.chdir(home)
    async with GatewayStore(url, redis_url="") as store:
        assert await store.audit.write(make_event()) == "STORED"
        monkeypatch.chdir(away)
        await store.database.engine.dispose()
        assert await store.audit.write(make_event()) == "STORED"
        assert len(await store.audit.list_recent()) == 2
    assert (home / "gateway.db").exists()
    assert not list(away.iterdir())
