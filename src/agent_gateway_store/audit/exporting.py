"""Exports of any size: one snapshot, flat memory, and no partial file under the final name."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import aclosing
from dataclasses import dataclass
from functools import partial as partial_of
from pathlib import Path

from agent_gateway_store.audit.bulk import blocks, in_thread
from agent_gateway_store.audit.filters import Criteria
from agent_gateway_store.audit.lines import csv_head, csv_line, json_line
from agent_gateway_store.audit.parquet import ParquetFiles
from agent_gateway_store.audit.selects import oldest, parameters
from agent_gateway_store.audit.targets import Compression, Format, opened, partial
from agent_gateway_store.storage.database import Database
from agent_gateway_store.storage.streaming import Rows, streamed

__all__ = ["ExportResult", "export"]

_BATCH_ROWS = 2_000
_BLOCK_BYTES = 2**20


@dataclass(frozen=True)
class ExportResult:
    """What was exported.

    Attributes:
        path: The file, or the folder of a dataset.
        format: jsonl, csv or parquet.
        rows: How many events.
        files: How many files: 1, or one for each day.
        bytes: Their size on disk.
    """

    path: Path
    format: Format
    rows: int
    files: int
    bytes: int


async def export(
    database: Database,
    found: Criteria,
    path: Path,
    *,
    format: Format,  # noqa: A002  as the public method has it
    compression: Compression | None,
    by_day: bool,
    raw: bool,
    overwrite: bool,
    tell: Callable[[int], None],
) -> ExportResult:
    """Write the events that match to `path`, oldest first.

    Args:
        database: Where they are.
        found: Which.
        path: Of the file or the dataset.
        format: What is written.
        compression: None: none; of Parquet: zstd.
        by_day: A Parquet dataset with a folder for each UTC day.
        raw: Leave CSV as it is.
        overwrite: Replace what is at `path`.
        tell: Is told the rows written so far.
    """
    with partial(path, overwrite=overwrite) as written:
        if format == "parquet":
            rows, files = await _parquet(database, found, written, compression, by_day, tell)
        else:
            rows, files = await _lines(database, found, written, format, compression, raw, tell), 1
        size = sum(each.stat().st_size for each in _files(written))
    return ExportResult(path, format, rows, files, size)


async def _parquet(
    database: Database,
    found: Criteria,
    path: Path,
    compression: Compression | None,
    by_day: bool,
    tell: Callable[[int], None],
) -> tuple[int, int]:
    rows = 0
    with ParquetFiles(path, compression=compression, by_day=by_day) as target:

        def take(table: object) -> None:
            nonlocal rows
            target.write(table)
            rows += table.num_rows  # type: ignore[attr-defined]
            tell(rows)

        await blocks(database, found, take, oldest_first=True, block_bytes=_BLOCK_BYTES)
    return rows, target.files


async def _lines(
    database: Database,
    found: Criteria,
    path: Path,
    format: Format,  # noqa: A002
    compression: Compression | None,
    raw: bool,
    tell: Callable[[int], None],
) -> int:
    dialect = database.engine.dialect
    line = json_line if format == "jsonl" else csv_line(raw=raw)
    done = 0
    with opened(path, compression) as write:

        def take(rows: Rows) -> None:
            write("".join(map(line, rows)).encode())

        if format == "csv":
            write(csv_head().encode())
        query, values = oldest(dialect, found), parameters(dialect, found.values)
        async with aclosing(streamed(database, query, values, batch=_BATCH_ROWS)) as batches:
            async for rows in batches:
                await in_thread(partial_of(take, rows))
                done += len(rows)
                tell(done)
    return done


def _files(path: Path) -> list[Path]:
    return [each for each in path.rglob("*") if each.is_file()] if path.is_dir() else [path]
