"""A connection of SQLite that gives its locks up when it is closed."""

from __future__ import annotations

import sqlite3
from typing import Any
from weakref import WeakSet

__all__ = ["SettledConnection"]


class SettledConnection(sqlite3.Connection):
    """Ends every statement before it closes.

    A task that is cancelled between `UPDATE ... RETURNING` and the reading of its rows leaves the statement half-read.
    `sqlite3_close_v2`, by which Python closes, waits for such statements: the connection and its write lock live on
    until Python's garbage collector meets the cursor, and nobody else can write meanwhile.
    """

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._cursors: WeakSet[sqlite3.Cursor] = WeakSet()

    def cursor(self, *args: Any, **options: Any) -> Any:
        """Return a cursor, and remember it while it lives."""
        cursor = super().cursor(*args, **options)
        self._cursors.add(cursor)
        return cursor

    def close(self) -> None:
        """Close the cursors, then the connection."""
        for cursor in list(self._cursors):
            cursor.close()
        super().close()
