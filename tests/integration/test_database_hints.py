"""What an operator is told to do about a database that refuses or is damaged."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from uuid import uuid4

import pytest
from database_helpers import opened, translated
from sqlalchemy import make_url, text

from agent_gateway_store import errors
from proofs.harness import execute


async def test_a_user_without_rights_is_told_to_get_them(postgres_database: Callable[[], str]) -> None:
    url, role = make_url(postgres_database()), f"reader_{uuid4().hex}"
    admin = opened(url.render_as_string(hide_password=False))
    async with admin.write() as connection:
        await connection.execute(text(f"CREATE ROLE {role} LOGIN PASSWORD 'secret'"))
        await connection.execute(text("CREATE TABLE t (n INTEGER)"))
    user = opened(url.set(username=role, password="secret").render_as_string(hide_password=False))
    with pytest.raises(errors.StoreUnavailableError, match="may not do this: grant it the right to table t"):
        async with user.connection("autocommit") as runner:
            await runner.driver.execute("INSERT INTO t VALUES (1)")  # type: ignore[union-attr]
    async with admin.write() as connection:
        await connection.execute(text(f"ALTER ROLE {role} CONNECTION LIMIT 0"))
    late = opened(url.set(username=role, password="secret").render_as_string(hide_password=False))
    with pytest.raises(errors.StoreUnavailableError, match="or the CONNECTION LIMIT of the role"):
        async with late.connection("autocommit"):
            pass
    await user.close()
    await late.close()
    async with admin.write() as connection:
        await connection.execute(text(f"DROP ROLE {role}"))
    await admin.close()


async def test_what_a_server_says_in_another_language_is_understood(
    migrated_postgres_database: Callable[[], str],
) -> None:
    url, role = migrated_postgres_database(), f"reader_{uuid4().hex}"
    await execute(
        url,
        f"CREATE ROLE {role} LOGIN",
        f"GRANT SELECT, INSERT ON audit_events TO {role}",
        "ALTER TABLE audit_events ENABLE ROW LEVEL SECURITY",
    )
    hints = {
        "SET row_security = off; SELECT * FROM audit_events": "a policy of row-level security hides rows",
        "INSERT INTO audit_events (id) VALUES (1)": "a policy of row-level security refuses the row",
        "INSERT INTO api_keys DEFAULT VALUES": "the database user may not do this: grant it the right to what it asked",
        "CREATE TEMP TABLE t (n int); CREATE TEMP TABLE t (n int)": "what it asked for exists already: rename it",
        "SELECT * FROM missing": "a table or column is missing. Run `gateway-store db upgrade`",
    }
    with translated(make_url(url).set(username=role).render_as_string(hide_password=False)) as there:
        user = opened(there)
        for statement, hint in hints.items():
            with pytest.raises(errors.GatewayStoreError, match=hint):
                async with user.connection("autocommit") as runner:
                    await runner.driver.execute(statement)  # type: ignore[union-attr]
        await user.close()
    await execute(url, f"DROP OWNED BY {role}", f"DROP ROLE {role}")


async def test_a_damaged_file_is_named(tmp_path: Path) -> None:
    path = tmp_path / "damaged.db"
    with closing(sqlite3.connect(path)) as connection:
        connection.execute("CREATE TABLE t (n INTEGER)")
        connection.executemany("INSERT INTO t VALUES (?)", [(number,) for number in range(5_000)])
        connection.commit()
    whole = path.read_bytes()
    path.write_bytes(whole[:4096] + b"\xee" * (len(whole) - 4096))
    database = opened(f"sqlite:///{path}")
    with pytest.raises(errors.StoreUnavailableError, match="damaged: restore it from a backup"):
        async with database.read() as connection:
            await connection.execute(text("SELECT sum(n) FROM t"))
    await database.close()
