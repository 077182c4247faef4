"""A connection of SQLite whose locks end when it is closed."""

from __future__ import annotations

import sqlite3
from typing import Any
from weakref import WeakSet


class ClosingConnection(sqlite3.Connection):
    """Ends every statement before it closes.

    A task that is cancelled between `UPDATE ... RETURNING` and the reading of its rows leaves the statement half-read.
    Python closes by `sqlite3_close_v2`, which waits for such statements: the connection keeps its write lock until the
    garbage collector finds the cursor, and until then nobody else can write.
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
