"""The archive: pruned events as Parquet files by day, which DuckDB, Polars and Spark read as they are."""

from __future__ import annotations

from agent_gateway_store.archive.reader import Archive
from agent_gateway_store.models.retention import ArchiveVerification

__all__ = ["Archive", "ArchiveVerification"]
