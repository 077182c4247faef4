"""The files of exports and imports, and the progress bar.

An export is written under another name in the same folder, forced to disk, and only then put under its own.
"""

from __future__ import annotations

import gzip
import io
import json
import os
import secrets
import shutil
import sys
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any, Literal, TypeVar

from pydantic import ValidationError

from agent_gateway_store.audit.record import encode_event, hash_of
from agent_gateway_store.audit.selects import FIELDS, JSON_FIELDS
from agent_gateway_store.models.audit import AuditEvent
from agent_gateway_store.results.arrow import arrow

__all__ = [
    "Compression",
    "Format",
    "counted",
    "events_in",
    "export_format",
    "format_of",
    "importable",
    "opened",
    "partial",
    "progress_bar",
    "sync",
]

T = TypeVar("T")

Format = Literal["jsonl", "csv", "parquet"]
Compression = Literal["gzip", "zstd"]

_FORMATS: dict[str, Format] = {".jsonl": "jsonl", ".ndjson": "jsonl", ".csv": "csv", ".parquet": "parquet"}
_COMPRESSIONS: dict[str, Compression] = {".gz": "gzip", ".zst": "zstd"}
_GZIP_LEVEL = 6  # the default of the gzip command
_BATCH_ROWS = 500  # of a Parquet file that is read at once
# The longest line that an export writes takes a quarter of it: an event's JSON and texts, every character escaped.
_MAX_LINE_BYTES = 32 * 2**20
# Logs shrink to a tenth, and no further than to a fortieth, since each event holds two hashes that do not shrink.
_UNPACKED_RATIO = 200
_UNPACKED_AT_LEAST = 64 * 2**20
_REPORT_ROWS = 100  # rows between two reports of progress
_PANDAS_INDEX = "__index_level_"  # the columns in which pandas keeps its index


def format_of(
    path: Path, given: str | None, compression: str | None, *, default: Format | None = None
) -> tuple[Format, Compression | None]:
    """Return the format and compression that the arguments or else the suffixes of `path` name.

    With neither, it is `default`.

    Raises:
        ValueError: Neither names one, or there is no such format or compression.
    """
    suffixes = [suffix.lower() for suffix in path.suffixes]
    packed = _COMPRESSIONS.get(suffixes[-1]) if suffixes else None
    if compression is not None and compression not in _COMPRESSIONS.values():
        raise ValueError(f'compression must be "gzip" or "zstd", not {compression!r}.')
    if given is None:
        last = suffixes[-2:-1] if packed else suffixes[-1:]
        given = _FORMATS.get(last[0], default) if last else default
        if given is None:
            raise ValueError(
                f"The name {path.name!r} tells no format: let it end in .jsonl, .csv or .parquet (and .gz or .zst), "
                'or give format="jsonl", "csv" or "parquet".'
            )
    if given not in ("jsonl", "csv", "parquet"):
        raise ValueError(f'format must be "jsonl", "csv" or "parquet", not {given!r}.')
    return given, compression or packed  # type: ignore[return-value]


def export_format(
    path: Path, given: str | None, compression: str | None, *, partition_by: str | None, raw: bool
) -> tuple[Format, Compression | None]:
    """Return the format and compression of an export, whose other arguments must go with them.

    Raises:
        ValueError: See `format_of`; or the arguments do not go together.
    """
    if partition_by not in (None, "day"):
        raise ValueError(f'partition_by must be "day" or None, not {partition_by!r}.')
    by_day = partition_by == "day"
    kind, packed = format_of(path, given, compression, default="parquet" if by_day else None)
    if by_day and kind != "parquet":
        raise ValueError('partition_by="day" needs format="parquet".')
    if raw and kind != "csv":
        raise ValueError('raw=True is for format="csv": the others alter nothing.')
    return kind, packed


@contextmanager
def partial(path: Path, *, overwrite: bool) -> Iterator[Path]:
    """Give a name beside `path` to write a file or a folder under; at the end it becomes `path`, at once and whole.

    If the body raises, what was written is removed. A process that is killed leaves it behind as
    `.<name>.<random>.partial`, never under `path`.

    Raises:
        FileExistsError: There is something at `path`, and `overwrite` is False.
        FileNotFoundError: There is no folder to write to.
    """
    if not path.parent.is_dir():
        raise FileNotFoundError(f"There is no folder {path.parent}: make it first.")
    if not overwrite and os.path.lexists(path):
        raise _exists(path)
    written = _beside(path, "partial")
    try:
        yield written
        if written.is_dir():
            _place_folder(written, path, overwrite=overwrite)
        else:
            _place_file(written, path, overwrite=overwrite)
        sync(path.parent)
    except BaseException:
        if written.is_dir():
            shutil.rmtree(written, ignore_errors=True)
        else:
            written.unlink(missing_ok=True)
        raise


def _beside(path: Path, suffix: str) -> Path:
    # Within what a file system takes for one name, 255 bytes.
    name = path.name.encode()[:200].decode("utf-8", "ignore")
    return path.with_name(f".{name}.{secrets.token_hex(6)}.{suffix}")


def _place_file(written: Path, path: Path, *, overwrite: bool) -> None:
    sync(written)
    if overwrite:
        written.replace(path)
        return
    try:
        # Unlike a rename this fails if somebody else was faster.
        path.hardlink_to(written)
    except FileExistsError:
        raise _exists(path) from None
    except OSError:  # a file system without links
        written.rename(path)
    else:
        written.unlink()


def _place_folder(written: Path, path: Path, *, overwrite: bool) -> None:
    sync(written)
    old = None
    if overwrite and os.path.lexists(path):
        old = _beside(path, "old")
        path.rename(old)
    try:
        written.rename(path)
    except OSError:
        if old is not None:
            old.rename(path)
        raise
    if old is not None:
        shutil.rmtree(old) if old.is_dir() and not old.is_symlink() else old.unlink()


def sync(path: Path) -> None:
    """Have what is at `path` written to disk; a folder's names too, where the system can."""
    if path.is_dir():
        with suppress(OSError):
            _fsync(path)
        return
    _fsync(path)


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _exists(path: Path) -> FileExistsError:
    return FileExistsError(f"{path} is there already: choose another name, or overwrite it on purpose.")


@contextmanager
def opened(path: Path, compression: Compression | None) -> Iterator[Callable[[bytes], object]]:
    """Open a new file and give what writes to it.

    Raises:
        MissingExtraError: zstd, and pyarrow is not installed.
    """
    if compression == "zstd":
        pa = arrow("Compressing by zstd")
        with pa.OSFile(str(path), "wb") as file, pa.CompressedOutputStream(file, "zstd") as stream:
            yield stream.write
    elif compression == "gzip":
        # No time in the head, so that the same events give the same file.
        with path.open("xb") as file, gzip.GzipFile("", "wb", _GZIP_LEVEL, file, mtime=0) as packed:
            yield packed.write
    else:
        with path.open("xb") as file:
            yield file.write


@contextmanager
def _read_opened(path: Path) -> Iterator[IO[bytes]]:
    """Open a file for reading, unpacked if its suffix says so.

    Raises:
        ValueError: It cannot be unpacked; also while it is read.
        MissingExtraError: zstd, and pyarrow is not installed.
    """
    packed = _COMPRESSIONS.get(path.suffix.lower())
    if packed is None:
        with path.open("rb") as plain:
            yield plain
        return
    try:
        with _unpacked(path, packed) as file:
            yield file
    except (EOFError, zlib.error, OSError) as exc:
        if getattr(exc, "errno", None) is not None:  # the system's word, not the unpacker's
            raise
        raise ValueError(f"{path} cannot be unpacked to its end: check that the file is whole.") from exc


@contextmanager
def _unpacked(path: Path, packed: Compression) -> Iterator[Any]:
    if packed == "gzip":
        with gzip.open(path, "rb") as file:
            yield file
        return
    pa = arrow("Reading zstd")
    with pa.OSFile(str(path), "rb") as whole, pa.CompressedInputStream(whole, "zstd") as stream:
        yield io.BufferedReader(stream)


def importable(path: Path, given: str | None) -> Format:
    """Return the format of a file (or of a dataset's folder) to import.

    Raises:
        FileNotFoundError: There is nothing at `path`.
        ValueError: The format is not known, or cannot be read back.
    """
    if not path.exists():
        raise FileNotFoundError(f"There is no {path}: check the name.")
    found = "parquet" if given is None and path.is_dir() else format_of(path, given, None)[0]
    if found == "csv":
        raise ValueError("CSV cannot be read back exactly: export JSONL or Parquet to import it elsewhere.")
    return found


def events_in(path: Path, format: Format) -> Iterator[AuditEvent]:  # noqa: A002
    """Yield the events of a file or a dataset, in its order.

    Raises:
        ValueError: The file is not whole, or unpacks to more than any log does; or a record is malformed, or is not
            what its content_hash says: the text names it and repeats nothing of it.
        MissingExtraError: Parquet or zstd, and pyarrow is not installed.
    """
    records = _json_records(path) if format == "jsonl" else _parquet_records(path)
    for number, record in enumerate(records, start=1):
        if record is None:
            continue
        try:
            event = AuditEvent(**{name: value for name, value in record.items() if name != "id"})
        except ValidationError as exc:
            faults = "; ".join(
                f"{'.'.join(map(str, fault['loc']))}: {fault['msg']}"
                for fault in exc.errors(include_input=False, include_url=False, include_context=False)
            )
            raise _malformed(path, number, faults) from None
        if event.content_hash is not None and hash_of(encode_event(event)) != event.content_hash:
            raise ValueError(
                f"Record {number} of {path} is not what its content_hash says, so it was changed after its export: "
                "import the file as it was, or leave content_hash out."
            )
        yield event


def _json_records(path: Path) -> Iterator[dict[str, Any] | None]:
    with _read_opened(path) as file:
        unpacked = 0
        for number, line in enumerate(iter(lambda: file.readline(_MAX_LINE_BYTES + 1), b""), start=1):
            if len(line) > _MAX_LINE_BYTES:
                raise _malformed(path, number, f"a line of more than {_MAX_LINE_BYTES // 2**20} MiB")
            unpacked += len(line)
            _check_unpacked(path, unpacked)
            if not line.strip():
                yield None
                continue
            try:
                record = json.loads(line)
            except (ValueError, RecursionError):
                raise _malformed(path, number, "not JSON") from None
            if not isinstance(record, dict):
                raise _malformed(path, number, "not a JSON object")
            yield record


def _check_unpacked(path: Path, size: int) -> None:
    """Refuse a file that was made to fill the memory or to never end.

    Raises:
        ValueError: It unpacks to more than any log of events does.
    """
    if size > _UNPACKED_AT_LEAST and size > _UNPACKED_RATIO * path.stat().st_size:
        raise ValueError(
            f"{path} unpacks to more than {_UNPACKED_RATIO} times its size, as no log does: check where it is from."
        )


def _parquet_records(path: Path) -> Iterator[dict[str, Any] | None]:
    pa = arrow("Reading Parquet")
    from pyarrow import dataset

    try:
        source = dataset.dataset(path, format="parquet", exclude_invalid_files=False)
        names = [name for name in FIELDS if name in source.schema.names]
        unknown = [name for name in source.schema.names if name not in names and not name.startswith(_PANDAS_INDEX)]
        if unknown:
            raise ValueError(f"{path} has columns that no event has ({', '.join(unknown)}): leave them out.")
        for fragment in source.get_fragments():
            # As the file says of itself, before the compression; each of its groups of rows is read at once.
            groups = fragment.row_groups
            _check_unpacked(Path(fragment.path), sum(group.total_byte_size for group in groups))
        number = 0
        for batch in source.to_batches(columns=names, batch_size=_BATCH_ROWS, batch_readahead=1, fragment_readahead=1):
            for record in batch.to_pylist():
                number += 1
                for name in record.keys() & set(JSON_FIELDS):
                    record[name] = _read(record[name], path, number, name)
                yield record
    except pa.ArrowInvalid as exc:
        raise ValueError(f"{path} is not Parquet: check that the file is whole.") from exc


def _read(text: Any, path: Path, number: int, name: str) -> Any:
    if not isinstance(text, str):
        return text
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        raise _malformed(path, number, f"{name}: not JSON") from None


def _malformed(path: Path, number: int, fault: str) -> ValueError:
    return ValueError(f"Record {number} of {path} is malformed ({fault}): correct it and import again.")


@contextmanager
def progress_bar(progress: bool | Callable[[int], None], text: str) -> Iterator[Callable[[int], None]]:
    """Give what receives the number of rows done so far: a progress bar (True), the caller's function, or nothing."""
    if callable(progress):
        yield progress
    elif progress:
        with _shown(text) as report:
            yield report
    else:
        yield lambda _rows: None


def counted(items: Iterable[T], report: Callable[[int], None]) -> Iterator[T]:
    """Yield `items`, and report every now and then and at the end how many there were."""
    number = 0
    for number, item in enumerate(items, start=1):
        yield item
        if not number % _REPORT_ROWS:
            report(number)
    report(number)


@contextmanager
def _shown(text: str) -> Iterator[Callable[[int], None]]:
    """Show how many rows are done and how fast; gives what is called with their number, from any thread."""
    from rich.console import Console
    from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}", markup=False),
        TextColumn("{task.completed:,} rows"),
        TextColumn("{task.fields[rate]}", markup=False),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=Console(file=sys.stderr), transient=False) as bar:
        task = bar.add_task(text, total=None, rate="")

        def report(rows: int) -> None:
            elapsed = bar.tasks[0].elapsed or 0.0
            bar.update(task, completed=rows, rate=f"{rows / elapsed:,.0f} rows/s" if elapsed else "")

        yield report
