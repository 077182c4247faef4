"""What keeps a planner from an index that its statistics make look good."""

from __future__ import annotations

from typing import Any

from sqlalchemy import ColumnElement, Text, cast, literal_column

__all__ = ["unindexed"]


def unindexed(text: ColumnElement[Any]) -> ColumnElement[Any]:
    """Return a text column as an expression of the same value, for which no index is used."""
    return cast(text, Text()).op("||")(literal_column("''"))
