"""What the tests of engines and sessions share: an empty database of each kind, and a transaction of statements."""

from __future__ import annotations

from pathlib import Path

import pytest
from sqlalchemy import text

from agent_gateway_store.storage.database import Database, SessionTransactions


@pytest.fixture(params=["sqlite", "postgres"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """The URL of an empty database."""
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path}/test.db"
    made: str = request.getfixturevalue("postgres_database")()
    return made


async def write(work: Database | SessionTransactions, *statements: str, error: Exception | None = None) -> None:
    async with work.write() as executor:
        for statement in statements:
            await executor.execute(text(statement))
        if error is not None:
            raise error
