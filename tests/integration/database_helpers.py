"""What the tests of engines and sessions share: an empty database of each kind, and a transaction of statements."""

from __future__ import annotations

from pathlib import Path

import asyncpg
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


async def set_defaults(url: str, **settings: str) -> None:
    """Set what every later connection to the database of `url` begins with."""
    connection = await asyncpg.connect(url.replace("+asyncpg", ""))
    try:
        for name, value in settings.items():
            # DateStyle is a list, which quotes would make one word.
            given = value if name == "DateStyle" else f"'{value}'"
            await connection.execute(f'ALTER DATABASE "{url.rpartition("/")[2]}" SET {name} = {given}')
    finally:
        await connection.close()
