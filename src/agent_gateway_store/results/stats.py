"""`Stats`: what an aggregation returns."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from datetime import timedelta
from typing import Any, Self

from agent_gateway_store.results.frames import Column
from agent_gateway_store.results.page import Page

__all__ = ["METRICS", "Stats"]

METRICS = (
    Column("calls", "integer"),
    Column("denials", "integer"),
    Column("approvals", "integer"),
    Column("errors", "integer"),
    Column("latency_p50_ms", "number"),
    Column("latency_p95_ms", "number"),
    Column("latency_p99_ms", "number"),
)


class Stats(Page[dict[str, Any]]):
    """Counts and latencies, a row for each group: the group's columns, then `METRICS`.

    Attributes:
        by: Names of the columns that the events were grouped by; the time bucket is not among them.
        bucket: Length of a time bucket; None: not grouped by time. Rows then have `bucket`, its start in UTC.
    """

    def __init__(
        self,
        items: Iterable[Mapping[str, Any]] = (),
        *,
        by: str | Iterable[str] = (),
        bucket: timedelta | None = None,
        next_cursor: str | None = None,
    ) -> None:
        self.by = (by,) if isinstance(by, str) else tuple(by)
        self.bucket = bucket
        super().__init__(map(dict, items), next_cursor=next_cursor, columns=tuple(c.name for c in self.frame_columns()))

    def frame_columns(self) -> tuple[Column, ...]:
        """Return the columns of its frame."""
        start = () if self.bucket is None else (Column("bucket", "time"),)
        return (*start, *(Column(name, "category") for name in self.by), *METRICS)

    def _of(self, items: Iterable[dict[str, Any]]) -> Self:
        return type(self)(items, by=self.by, bucket=self.bucket)
