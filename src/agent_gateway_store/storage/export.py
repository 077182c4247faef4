"""Exports of any size as JSONL, CSV or Parquet: one snapshot, constant memory, no partial file under the final name."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import aclosing, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from operator import add
from os import PathLike
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, NamedTuple, Self

from agent_gateway_store.results.arrow import arrow, arrow_schema
from agent_gateway_store.results.cells import Column
from agent_gateway_store.storage.arrow import arrow_blocks, by_day, in_thread
from agent_gateway_store.storage.database import Database
from agent_gateway_store.storage.files import (
    FOLDER_MODE,
    Compression,
    Format,
    create_file,
    export_format,
    opened,
    partial,
    progress_bar,
    sync,
)
from agent_gateway_store.storage.statements import Statement
from agent_gateway_store.storage.streaming import Rows, built, streamed

if TYPE_CHECKING:
    import pyarrow as pa

# Chosen: with rows of 5 kB about 10 MB.
_BATCH_ROWS = 2_000
# Chosen: bounds memory, where a few blocks are held at once, as text and as tables.
_BLOCK_BYTES = 2**20
# Chosen: a row group of Parquet ends after so many rows, because readers skip whole groups,
_GROUP_ROWS = 100_000
# or after so many bytes, because a group is in memory until it is written.
_GROUP_BYTES = 8 * 2**20


@dataclass(frozen=True)
class ExportResult:
    """What was exported.

    Attributes:
        path: The file, or the folder of a dataset.
        format: jsonl, csv or parquet.
        rows: How many events or approvals.
        files: How many files: 1, or one for each day.
        bytes: Their size on disk.
    """

    path: Path
    format: Format
    rows: int
    files: int
    bytes: int


@dataclass(frozen=True)
class Source:
    """What is exported."""

    # Its rows hold `columns`: JSON and ids as text, and no time beyond what Python can hold.
    statement: Statement
    values: Mapping[str, Any]
    columns: tuple[Column, ...]
    # The column whose UTC day names the folders of a dataset.
    day: str


class ExportOptions(NamedTuple):
    """The options of `AuditManager.export`, in its order."""

    format: str | None
    compression: str | None
    partition_by: str | None
    raw: bool
    overwrite: bool
    progress: bool | Callable[[int], None]


async def export_rows(
    database: Database,
    source: Source,
    path: str | PathLike[str],
    options: ExportOptions,
) -> ExportResult:
    """Write the rows of `source` to `path` in their order; options and errors as of `AuditManager.export`."""
    format, compression, partition_by, raw, overwrite, progress = options  # noqa: A001  as the public methods have it
    files, target_path, by_day = 1, Path(path), partition_by == "day"
    kind, packed = export_format(target_path, format, compression, partition_by=partition_by, raw=raw)
    with (
        progress_bar(progress, f"Exporting to {target_path.name}") as report,
        partial(target_path, overwrite=overwrite, as_folder=by_day) as written,
    ):
        if kind == "parquet":
            with ParquetFiles(
                written, source.columns, compression=packed, day=source.day if by_day else None
            ) as target:

                def write_table(table: pa.Table) -> None:
                    target.write(table)
                    report(target.rows)

                await arrow_blocks(
                    database, source.statement, source.values, source.columns, write_table, block_bytes=_BLOCK_BYTES
                )
            rows, files = target.rows, target.files
        else:
            with opened(written, packed) as write:
                if kind == "csv":
                    write(csv_head(source.columns).encode())
                line = json_line(source.columns) if kind == "jsonl" else csv_line(source.columns, raw=raw)
                rows = await _write_lines(database, source, write, line, report)
        size = sum(each.stat().st_size for each in (written, *written.rglob("*")) if each.is_file())
    return ExportResult(target_path, kind, rows, files, size)


async def _write_lines(
    database: Database,
    source: Source,
    write: Callable[[bytes], object],
    line: Callable[[Sequence[Any]], str],
    report: Callable[[int], None],
) -> int:
    def write_rows(rows: Rows) -> None:
        write(built(query, rows, lambda some: "".join(map(line, some)).encode()))

    done = 0
    query = source.statement.compiled(database.engine.dialect)
    async with aclosing(streamed(database, query, source.values, batch=_BATCH_ROWS)) as batches:
        async for rows in batches:
            await in_thread(write_rows, rows)
            done += len(rows)
            report(done)
    return done


_quoted = json.encoder.encode_basestring

# The beginning of a formula to a spreadsheet (the list of OWASP's "CSV Injection", with the full-width signs that some
# fold), also after blanks. A cell begins where ours begins; but also inside it after a line end, a tab or a semicolon,
# if the spreadsheet ignores our quotes because its list separator is another one (in much of Europe `;`).
_BLANKS = r"\s\x00-\x20\u00ad\u180e\u200b-\u200f\u2060\ufeff"
_SIGNS = r"[=+\-@\uff1d\uff0b\uff0d\uff20]"
_FORMULA_FIRST = re.compile(rf"\A(?=[\t\r\n]|[{_BLANKS}]*{_SIGNS})")
# Possessive (`++`), and only from the beginning of a run: otherwise a long run without a sign takes quadratic time.
_FORMULA_LATER = re.compile(rf'(?<![{_BLANKS}";])[{_BLANKS}";]++(?={_SIGNS})')


def json_line(columns: tuple[Column, ...]) -> Callable[[Sequence[Any]], str]:
    """Return the function that writes a row as a line of JSON, as `model_dump(mode="json")` of its record gives it."""
    names = tuple(f"{_quoted(column.name)}:" for column in columns)
    times, jsons = _places(columns, "time"), _places(columns, "json")

    def line(row: Sequence[Any]) -> str:
        fields = list(map(_json, row))
        for index in times:
            if row[index] is not None:
                fields[index] = f'"{_utc(row[index])}"'
        for index in jsons:
            if row[index] is not None:
                fields[index] = row[index]
        return "{" + ",".join(map(add, names, fields)) + "}\n"

    return line


def _places(columns: tuple[Column, ...], kind: str) -> tuple[int, ...]:
    return tuple(index for index, column in enumerate(columns) if column.kind == kind)


def _json(value: Any) -> str:
    if value is None:
        return "null"
    return _quoted(value) if isinstance(value, str) else repr(value)


def _utc(value: Any) -> str:
    moment = datetime.fromisoformat(value).replace(tzinfo=UTC) if isinstance(value, str) else value
    return f"{moment.isoformat()[:-6]}Z"


def csv_head(columns: tuple[Column, ...]) -> str:
    """Return the line of names."""
    return ",".join(f'"{column.name}"' for column in columns) + "\r\n"


def csv_line(columns: tuple[Column, ...], *, raw: bool) -> Callable[[Sequence[Any]], str]:
    """Return the function that writes a row as a line of CSV (RFC 4180).

    Text is in quotes; None is an empty field without quotes. Unless `raw`, texts go through `escape_formulas`.
    """
    tame: Callable[[str], str] = (lambda text: text) if raw else escape_formulas
    times = _places(columns, "time")

    def field(value: Any) -> str:
        if value is None:
            return ""
        if isinstance(value, str):
            text = tame(value)
            return '"' + (text.replace('"', '""') if '"' in text else text) + '"'
        return repr(value)

    def line(row: Sequence[Any]) -> str:
        fields = list(map(field, row))
        for index in times:
            if row[index] is not None:
                fields[index] = f'"{_utc(row[index])}"'
        return ",".join(fields) + "\r\n"

    return line


def escape_formulas(text: str) -> str:
    """Return `text` with an apostrophe wherever a spreadsheet could see the beginning of a formula (CSV injection)."""
    tame = text if text.isascii() and text[:1].isalnum() else _FORMULA_FIRST.sub("'", text)
    if ";" in text or "\n" in text or "\r" in text or "\t" in text:
        return _FORMULA_LATER.sub(_split, tame)
    return tame


def _split(found: re.Match[str]) -> str:
    run = found[0]
    place = max(map(run.rfind, ";\t\r\n")) + 1
    return f"{run[:place]}'{run[place:]}" if place else run


class ParquetFiles:
    """Writes tables, ordered by time, to a file or to `day=2026-05-01/part-0.parquet` and so on; counts both."""

    def __init__(
        self, path: Path, columns: tuple[Column, ...], *, compression: Compression | None, day: str | None
    ) -> None:
        self.files = self.rows = 0
        self._path, self._compression, self._by = path, compression or "zstd", day
        arrow("Writing Parquet")
        self._schema = arrow_schema(columns)
        self._day: str | None = None
        self._file: Path | None = None
        self._writer: Any = None
        self._waiting: list[Any] = []
        self._rows = self._bytes = 0

    def __enter__(self) -> Self:
        if self._by is not None:
            self._path.mkdir(FOLDER_MODE)
        else:
            self._open(self._path)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None:
            self._waiting.clear()
            if self._writer is not None:
                # If the disk is full this fails as well, and would hide the error of the body.
                with suppress(Exception):
                    self._writer.close()
            return
        self._close()
        if self._by is not None:
            for folder in self._path.iterdir():
                sync(folder)

    def write(self, table: pa.Table) -> None:
        """Write the next table; its rows may wait in memory until a row group is full."""
        self.rows += table.num_rows
        if self._by is None:
            self._add(table)
            return
        for day, rows in by_day(table, self._by):
            if day != self._day:
                self._close()
                self._day = day
                folder = self._path / f"day={day}"
                folder.mkdir(FOLDER_MODE)
                self._open(folder / "part-0.parquet")
            self._add(rows)

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
            # Otherwise Arrow's allocator keeps the memory of each group for some time.
            arrow().default_memory_pool().release_unused()

    def _open(self, path: Path) -> None:
        from pyarrow import parquet

        create_file(path)
        self._file = path
        self._writer = parquet.ParquetWriter(path, self._schema, compression=self._compression)
        self.files += 1

    def _close(self) -> None:
        if self._writer is not None and self._file is not None:
            self._flush()
            self._writer.close()
            sync(self._file)
            self._writer = self._file = None
