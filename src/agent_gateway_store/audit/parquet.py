"""Tables into Parquet: one file, or a dataset with a folder for each day, as Hive, Spark, Trino and DuckDB read it."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from agent_gateway_store.audit.targets import Compression, sync
from agent_gateway_store.models.audit import AuditEvent
from agent_gateway_store.results.arrow import arrow, arrow_schema

if TYPE_CHECKING:
    import pyarrow as pa

__all__ = ["ParquetFiles"]

_GROUP_ROWS = 100_000
_GROUP_BYTES = 8 * 2**20


class ParquetFiles:
    """Writes tables that come in the order of time.

    Args:
        path: The file, or the folder of the dataset.
        compression: None: zstd.
        by_day: Write `day=2026-05-01/part-0.parquet` for each UTC day.

    Attributes:
        files: How many were written.
    """

    def __init__(self, path: Path, *, compression: Compression | None, by_day: bool) -> None:
        self.files = 0
        self._path, self._compression, self._by_day = path, compression or "zstd", by_day
        arrow("Writing Parquet")
        self._schema = arrow_schema(AuditEvent)
        self._day: str | None = None
        self._file: Path | None = None
        self._writer: Any = None
        self._waiting: list[Any] = []
        self._rows = self._bytes = 0

    def __enter__(self) -> Self:
        if self._by_day:
            self._path.mkdir()
        else:
            self._open(self._path)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None:
            self._waiting.clear()
            if self._writer is not None:
                # Where the disk is full this fails, too, and would hide why the body failed.
                with suppress(Exception):
                    self._writer.close()
            return
        self._close()
        if self._by_day:
            for folder in self._path.iterdir():
                sync(folder)

    def write(self, table: pa.Table) -> None:
        """Take the next table."""
        if not self._by_day:
            self._add(table)
            return
        import pyarrow.compute as pc

        days = pc.strftime(table.column("timestamp"), format="%Y-%m-%d").combine_chunks()
        start = 0
        for run, length in zip(*_runs(days), strict=True):
            if run != self._day:
                self._close()
                self._day = run
                folder = self._path / f"day={run}"
                folder.mkdir()
                self._open(folder / "part-0.parquet")
            self._add(table.slice(start, length))
            start += length

    def _add(self, table: pa.Table) -> None:
        self._waiting.append(table)
        self._rows += table.num_rows
        self._bytes += table.nbytes
        if self._rows >= _GROUP_ROWS or self._bytes >= _GROUP_BYTES:
            self._flush()

    def _flush(self) -> None:
        if self._waiting:
            self._writer.write_table(arrow().concat_tables(self._waiting), row_group_size=self._rows)
            self._waiting.clear()
            self._rows = self._bytes = 0
            arrow().default_memory_pool().release_unused()

    def _open(self, path: Path) -> None:
        from pyarrow import parquet

        self._file = path
        self._writer = parquet.ParquetWriter(path, self._schema, compression=self._compression)
        self.files += 1

    def _close(self) -> None:
        if self._writer is not None and self._file is not None:
            self._flush()
            self._writer.close()
            sync(self._file)
            self._writer = self._file = None


def _runs(days: Any) -> tuple[list[str], list[int]]:
    """Return the values of a sorted array and how often each occurs."""
    import pyarrow.compute as pc

    encoded = pc.run_end_encode(days)
    ends = encoded.run_ends.to_pylist()
    return encoded.values.to_pylist(), [end - start for start, end in zip([0, *ends], ends, strict=False)]
