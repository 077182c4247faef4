"""The files of exports and imports, and the progress bar.

An export is written under another name in the same folder, forced to disk, and only then renamed.
"""

from __future__ import annotations

import gzip
import io
import json
import math
import os
import secrets
import shutil
import sys
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any, Literal, TypeVar

from pydantic import ValidationError

from agent_gateway_store.audit.record import encode_event, hash_of
from agent_gateway_store.audit.selects import FIELDS, JSON_FIELDS
from agent_gateway_store.models.audit import AuditEvent
from agent_gateway_store.results.arrow import arrow
from agent_gateway_store.storage.permissions import create_file

T = TypeVar("T")

Format = Literal["jsonl", "csv", "parquet"]
Compression = Literal["gzip", "zstd"]

_FORMATS: dict[str, Format] = {".jsonl": "jsonl", ".ndjson": "jsonl", ".csv": "csv", ".parquet": "parquet"}
_COMPRESSIONS: dict[str, Compression] = {".gz": "gzip", ".zst": "zstd"}
# The default of the gzip command.
_GZIP_LEVEL = 6
# Chosen: rows of a Parquet file that are read at once.
_BATCH_ROWS = 500
# Four times the longest line that an export writes: an event's JSON and texts, every character escaped.
_MAX_LINE_BYTES = 32 * 2**20
# Logs shrink to a tenth, and no further than to a fortieth, since each event holds two hashes that do not shrink.
_UNPACKED_RATIO = 200
# Chosen: what any machine unpacks at once, whatever the ratio.
_UNPACKED_AT_LEAST = 64 * 2**20
# Chosen: rows between two reports of progress.
_REPORT_ROWS = 100
# The limit of most file systems for one name is 255 bytes; the rest is for what `_beside` adds.
_NAME_BYTES = 200
# The columns in which pandas stores its index.
_PANDAS_INDEX = "__index_level_"


def format_of(
    path: Path, given: str | None, compression: str | None, *, default: Format | None = None
) -> tuple[Format, Compression | None]:
    """Return the format and compression that the arguments or else the suffixes of `path` name.

    With neither, it is `default`.

    Raises:
        ValueError: Neither names one, or the format or compression does not exist.
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
                f"The name {path.name!r} does not say the format: let it end in .jsonl, .csv or .parquet (and .gz or "
                '.zst), or give format="jsonl", "csv" or "parquet".'
            )
    if given not in ("jsonl", "csv", "parquet"):
        raise ValueError(f'format must be "jsonl", "csv" or "parquet", not {given!r}.')
    return given, compression or packed  # type: ignore[return-value]


def export_format(
    path: Path, given: str | None, compression: str | None, *, partition_by: str | None, raw: bool
) -> tuple[Format, Compression | None]:
    """Return the format and compression of an export, after a check that its other arguments fit.

    Raises:
        ValueError: See `format_of`; or the arguments do not fit together.
    """
    if partition_by not in (None, "day"):
        raise ValueError(f'partition_by must be "day" or None, not {partition_by!r}.')
    by_day = partition_by == "day"
    kind, packed = format_of(path, given, compression, default="parquet" if by_day else None)
    if by_day and kind != "parquet":
        raise ValueError('partition_by="day" needs format="parquet".')
    if raw and kind != "csv":
        raise ValueError('raw=True is for format="csv": the other formats never alter data.')
    return kind, packed


@contextmanager
def partial(path: Path, *, overwrite: bool, as_folder: bool = False) -> Iterator[Path]:
    """Yield a name beside `path` for a file or folder; at the end that becomes `path`, at once and complete.

    If the body raises, the file or folder is removed. If the process is killed it stays as `.<name>.<random>.partial`,
    never under `path`. A link stays, and what it leads to is replaced.

    Raises:
        FileExistsError: `path` exists, and `overwrite` is False; or it is no regular file, nor, with `as_folder`, a
            dataset of days.
        FileNotFoundError: The folder of `path` does not exist.
    """
    if not overwrite and os.path.lexists(path):
        raise _exists(path)
    if not _is_replaceable(path, as_folder=as_folder):
        raise FileExistsError(f"{path} is not a file or dataset of an export: choose another name.")
    # Of a link, what it leads to is replaced.
    path = Path(os.path.realpath(path))
    if not path.parent.is_dir():
        raise FileNotFoundError(f"There is no folder {path.parent}: make it first.")
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


def _is_replaceable(path: Path, *, as_folder: bool) -> bool:
    # A device or a pipe would be gone, and so would a folder with all that is in it.
    if as_folder and path.is_dir():
        return all(each.is_dir() and each.name.startswith("day=") for each in path.iterdir())
    return path.is_file() or not path.exists()


def _beside(path: Path, suffix: str) -> Path:
    name = path.name.encode()[:_NAME_BYTES].decode("utf-8", "ignore")
    return path.with_name(f".{name}.{secrets.token_hex(6)}.{suffix}")


def _place_file(written: Path, path: Path, *, overwrite: bool) -> None:
    sync(written)
    if overwrite:
        written.replace(path)
        return
    try:
        # Unlike a rename, a link fails if another process has made the file meanwhile.
        path.hardlink_to(written)
    except FileExistsError:
        raise _exists(path) from None
    except OSError:
        # A file system without hard links.
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
    """Force the file at `path` to disk, or the names in a folder where the system can do that."""
    # Windows opens no folders, and forces to disk only what may be written.
    with suppress(OSError) if path.is_dir() else nullcontext():
        descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _exists(path: Path) -> FileExistsError:
    return FileExistsError(
        f"{path} exists already: choose another name, or pass overwrite=True (`--overwrite` on the command line)."
    )


@contextmanager
def opened(path: Path, compression: Compression | None) -> Iterator[Callable[[bytes], object]]:
    """Open a new file, for its owner alone, and yield the function that writes to it.

    Raises:
        MissingExtraError: zstd, and pyarrow is not installed.
    """
    pa = arrow("Compressing by zstd") if compression == "zstd" else None
    create_file(path)
    if pa is not None:
        with pa.OSFile(str(path), "wb") as file, pa.CompressedOutputStream(file, "zstd") as stream:
            yield stream.write
    elif compression == "gzip":
        # No time in the header, so that the same events give the same file.
        with path.open("wb") as file, gzip.GzipFile("", "wb", _GZIP_LEVEL, file, mtime=0) as packed:
            yield packed.write
    else:
        with path.open("wb") as file:
            yield file.write


@contextmanager
def _read_opened(path: Path) -> Iterator[io.BufferedIOBase]:
    """Open a file for reading, decompressed if its suffix says so.

    Raises:
        ValueError: It cannot be decompressed; also while it is read.
        MissingExtraError: zstd, and pyarrow is not installed.
    """
    compression = _COMPRESSIONS.get(path.suffix.lower())
    try:
        if compression == "zstd":
            pa = arrow("Reading zstd")
            with pa.OSFile(str(path), "rb") as whole, pa.CompressedInputStream(whole, "zstd") as stream:
                yield io.BufferedReader(stream)
        else:
            with gzip.open(path, "rb") if compression == "gzip" else path.open("rb") as file:
                yield file
    except (EOFError, zlib.error, OSError) as exc:
        # An error with a number is the system's; those of the decompressors have none.
        if compression is None or getattr(exc, "errno", None) is not None:
            raise
        raise ValueError(f"{path} cannot be decompressed to its end: check that the file is complete.") from exc


def importable(path: Path, given: str | None) -> Format:
    """Return the format of a file (or of a dataset's folder) to import.

    Raises:
        FileNotFoundError: `path` does not exist.
        ValueError: The format is not known, or cannot be imported.
    """
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist: check the name.")
    found = "parquet" if given is None and path.is_dir() else format_of(path, given, None)[0]
    if found == "csv":
        raise ValueError("CSV cannot be read back exactly: export JSONL or Parquet to import it elsewhere.")
    return found


def events_in(
    path: Path,
    format: Format,  # noqa: A002
    *,
    on_refused: Callable[[str], None] | None = None,
) -> Iterator[AuditEvent]:
    """Yield the events of a file or a dataset, in its order.

    Args:
        on_refused: Called with a sentence for each record that is refused, which is then left out; None: it is raised.

    Raises:
        ValueError: The file is incomplete, or unpacks to more than any log does; or a record is malformed, or does not
            fit its content_hash: the message names its number and repeats nothing of it.
        MissingExtraError: Parquet or zstd, and pyarrow is not installed.
    """
    records = _json_records(path) if format == "jsonl" else _parquet_records(path)
    for number, record in enumerate(records, start=1):
        if record is None:
            continue
        event = record if isinstance(record, ValueError) else _event_of(record, path, number)
        if isinstance(event, AuditEvent):
            yield event
        elif on_refused is None:
            raise event
        else:
            on_refused(str(event))


def _event_of(record: dict[str, Any], path: Path, number: int) -> AuditEvent | ValueError:
    try:
        event = AuditEvent(**{name: value for name, value in record.items() if name != "id"})
    except ValidationError as exc:
        faults = "; ".join(
            f"{'.'.join(map(str, fault['loc']))}: {fault['msg']}"
            for fault in exc.errors(include_input=False, include_url=False, include_context=False)
        )
        return _malformed(path, number, faults)
    if event.content_hash is not None and hash_of(encode_event(event)) != event.content_hash:
        return ValueError(
            f"Record {number} of {path} does not fit its content_hash, so it was changed after its export: "
            "import the file as it was exported, or leave content_hash out."
        )
    return event


def _json_records(path: Path) -> Iterator[dict[str, Any] | ValueError | None]:
    with _read_opened(path) as file:
        # Nothing is unpacked of a plain file, whose size may be unknown: it can be a pipe.
        unpacked, most = 0, _most_unpacked(path) if path.suffix.lower() in _COMPRESSIONS else math.inf
        for number, line in enumerate(iter(lambda: file.readline(_MAX_LINE_BYTES + 1), b""), start=1):
            if len(line) > _MAX_LINE_BYTES:
                raise _malformed(path, number, f"a line of more than {_MAX_LINE_BYTES // 2**20} MiB")
            unpacked += len(line)
            if unpacked > most:
                raise _unpacks_too_far(path)
            if not line.strip():
                yield None
                continue
            try:
                record = json.loads(line)
            except (ValueError, RecursionError):
                yield _malformed(path, number, "not JSON")
                continue
            yield record if isinstance(record, dict) else _malformed(path, number, "not a JSON object")


def _most_unpacked(path: Path) -> int:
    """Return to how many bytes a file of events may unpack; beyond, it was made to fill the memory or to never end."""
    return max(_UNPACKED_AT_LEAST, _UNPACKED_RATIO * path.stat().st_size)


def _unpacks_too_far(path: Path) -> ValueError:
    return ValueError(
        f"{path} unpacks to more than {_UNPACKED_RATIO} times its size, as no log does: check where it is from."
    )


def _parquet_records(path: Path) -> Iterator[dict[str, Any] | ValueError | None]:
    pa = arrow("Reading Parquet")
    from pyarrow import dataset

    try:
        source = dataset.dataset(path, format="parquet", exclude_invalid_files=False)
        names = [name for name in FIELDS if name in source.schema.names]
        unknown = [name for name in source.schema.names if name not in names and not name.startswith(_PANDAS_INDEX)]
        if unknown:
            raise ValueError(f"{path} has columns that an event does not have ({', '.join(unknown)}): leave them out.")
        for fragment in source.get_fragments():
            # As the file says of itself, before the compression; each of its groups of rows is read at once.
            file = Path(fragment.path)
            if sum(group.total_byte_size for group in fragment.row_groups) > _most_unpacked(file):
                raise _unpacks_too_far(file)
        number = 0
        for batch in source.to_batches(columns=names, batch_size=_BATCH_ROWS, batch_readahead=1, fragment_readahead=1):
            for record in batch.to_pylist():
                number += 1
                yield _with_json(record, path, number)
    except pa.ArrowInvalid as exc:
        raise ValueError(f"{path} is not Parquet: check that the file is complete.") from exc


def _with_json(record: dict[str, Any], path: Path, number: int) -> dict[str, Any] | ValueError:
    for name in JSON_FIELDS:
        if isinstance(record.get(name), str):
            try:
                record[name] = json.loads(record[name])
            except (ValueError, RecursionError):
                return _malformed(path, number, f"{name}: not JSON")
    return record


def _malformed(path: Path, number: int, fault: str) -> ValueError:
    return ValueError(f"Record {number} of {path} is malformed ({fault}): correct it and import again.")


@contextmanager
def progress_bar(progress: bool | Callable[[int], None], text: str) -> Iterator[Callable[[int], None]]:
    """Yield the function that receives the number of rows done so far, from any thread.

    It moves a progress bar (True), is the caller's own, or does nothing (False).
    """
    if callable(progress) or not progress:
        yield progress if callable(progress) else lambda _rows: None
        return
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


def counted(items: Iterable[T], report: Callable[[int], None]) -> Iterator[T]:
    """Yield `items`, and report their number every hundred items and at the end."""
    number = 0
    for number, item in enumerate(items, start=1):
        yield item
        if not number % _REPORT_ROWS:
            report(number)
    report(number)
