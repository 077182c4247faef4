"""The events of a file or dataset that an export wrote, checked one by one."""

from __future__ import annotations

import gzip
import io
import json
import math
import zlib
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from agent_gateway_store.audit.record import encode_event, hash_of
from agent_gateway_store.audit.selects import FIELDS, JSON_FIELDS
from agent_gateway_store.models.audit import AuditEvent
from agent_gateway_store.results.arrow import arrow
from agent_gateway_store.storage.files import COMPRESSIONS, counted, format_of, progress_bar

# Chosen: rows of a Parquet file that are read at once.
_BATCH_ROWS = 500
# Four times the longest line that an export writes: an event's JSON and texts, every character escaped.
_MAX_LINE_BYTES = 32 * 2**20
# Logs shrink to a tenth, and no further than to a fortieth, since each event holds two hashes that do not shrink.
_UNPACKED_RATIO = 200
# Chosen: what any machine unpacks at once, whatever the ratio.
_UNPACKED_AT_LEAST = 64 * 2**20
# The columns in which pandas stores its index.
_PANDAS_INDEX = "__index_level_"


@contextmanager
def _read_opened(path: Path) -> Iterator[io.BufferedIOBase]:
    """Open a file for reading, decompressed if its suffix says so; ValueError if that fails, also while it is read."""
    compression = COMPRESSIONS.get(path.suffix.lower())
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


@contextmanager
def importing(
    path: Path, given: str | None, *, on_refused: Callable[[str], None] | None, progress: bool | Callable[[int], None]
) -> Iterator[Iterator[AuditEvent]]:
    """Give the events of a file or a dataset while the progress is shown; arguments and errors are of `import_file`."""
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist: check the name.")
    kind = "parquet" if given is None and path.is_dir() else format_of(path, given, None)[0]
    if kind == "csv":
        raise ValueError("CSV cannot be read back exactly: export JSONL or Parquet to import it elsewhere.")
    records = _json_records(path) if kind == "jsonl" else _parquet_records(path)
    # The records hold the file open, also where nobody asks for the rest of them.
    with progress_bar(progress, f"Importing {path.name}") as report, closing(records):
        yield counted(_events_of(records, path, on_refused), report)


def _events_of(
    records: Iterable[dict[str, Any] | ValueError | None], path: Path, on_refused: Callable[[str], None] | None
) -> Iterator[AuditEvent]:
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


def _json_records(path: Path) -> Generator[dict[str, Any] | ValueError | None]:
    with _read_opened(path) as file:
        # Nothing is unpacked of a plain file, whose size may be unknown: it can be a pipe.
        unpacked, most = 0, _most_unpacked(path) if path.suffix.lower() in COMPRESSIONS else math.inf
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


def _parquet_records(path: Path) -> Generator[dict[str, Any] | ValueError | None]:
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
