"""Steps of migrations that a large table of PostgreSQL goes through while others write to it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from alembic import op
from sqlalchemy import text

# Chosen: a table of 8 MB is read within a tenth of a second. Smaller ones keep the one transaction of an upgrade.
_LARGE_BYTES = 8 * 2**20


def create_index(name: str, table: str, columns: Sequence[str], *, unique: bool = False, **options: Any) -> None:
    """Build an index: on a large table of PostgreSQL CONCURRENTLY, after a commit, so that writers do not wait.

    What an earlier run left is dropped if its build was stopped, and kept if it was complete. Such a run repeats the
    whole migration script, so the other steps of a script that builds one must bear that (`if_not_exists=True`).
    """
    with _outside_transaction(table) as is_outside:
        # Of a small table, too: the commit before a large one's build takes the small ones' indexes along, and a table
        # may have shrunk.
        if _is_invalid(name):
            op.drop_index(op.f(name), table_name=table, postgresql_concurrently=is_outside)
        op.create_index(
            op.f(name),
            table,
            list(columns),
            unique=unique,
            if_not_exists=True,
            postgresql_concurrently=is_outside,
            **options,
        )


def create_check(name: str, table: str, condition: str) -> None:
    """Replace a CHECK constraint of PostgreSQL: on a large table its rows are read while others write."""
    op.drop_constraint(op.f(name), table, type_="check", if_exists=True)
    op.create_check_constraint(op.f(name), table, condition, postgresql_not_valid=True)
    with _outside_transaction(table):
        op.execute(f"ALTER TABLE {table} VALIDATE CONSTRAINT {name}")


@contextmanager
def _outside_transaction(table: str) -> Iterator[bool]:
    """Commit, and run the block outside a transaction, if `table` is large; give whether it is so."""
    if not _on_postgresql() or not _is_large(table):
        yield False
        return
    with op.get_context().autocommit_block():
        # As `LIMITS` of `migrate`, which end with a transaction. A build waits for older transactions of others, but
        # nobody waits for it.
        limits = ("statement_timeout", "lock_timeout")
        for name in limits:
            op.execute(f"SET {name} = 0")
        try:
            yield True
        finally:
            for name in limits:
                op.execute(f"RESET {name}")


def _on_postgresql() -> bool:
    """True unless this is SQLite, or a script is printed."""
    context = op.get_context()
    return context.dialect.name == "postgresql" and not context.as_sql


def _is_large(table: str) -> bool:
    found = text("SELECT pg_relation_size(:table) > :size")
    return bool(op.get_bind().scalar(found, {"table": table, "size": _LARGE_BYTES}))


def _is_invalid(index: str) -> bool:
    if not _on_postgresql():
        return False
    found = text("SELECT NOT indisvalid FROM pg_index WHERE indexrelid = to_regclass(:index)")
    return bool(op.get_bind().scalar(found, {"index": index}))
