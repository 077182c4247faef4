"""Databases of both kinds to migrate; the migrations run as they are."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from pathlib import Path

import alembic.command
import pytest
from sqlalchemy.ext.asyncio import AsyncEngine

import once
from agent_gateway_store.storage.database import create_engine


@pytest.fixture(autouse=True)
def _real_migrations(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the shortcut that the other tests take."""
    monkeypatch.setattr(alembic.command, "upgrade", once.migrate)


@pytest.fixture(params=["sqlite", "postgres"])
def make_url(request: pytest.FixtureRequest, tmp_path: Path) -> Callable[[], str]:
    """Make an empty database with each call and return its URL."""
    if request.param == "postgres":
        made: Callable[[], str] = request.getfixturevalue("postgres_database")
        return made
    numbers = iter(range(99))
    return lambda: f"sqlite:///{tmp_path}/test-{next(numbers)}.db"


@pytest.fixture
def url(make_url: Callable[[], str]) -> str:
    return make_url()


@pytest.fixture
async def engine(url: str) -> AsyncIterator[AsyncEngine]:
    made = create_engine(url)
    yield made
    assert made.pool.checkedout() == 0  # type: ignore[attr-defined]
    await made.dispose()
