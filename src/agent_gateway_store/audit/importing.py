"""Events from the files that an export wrote, or that others write alike."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from agent_gateway_store.audit.record import encode_event, hash_of
from agent_gateway_store.audit.selects import FIELDS, JSON_FIELDS
from agent_gateway_store.audit.targets import Format, format_of, read_opened
from agent_gateway_store.models.audit import AuditEvent
from agent_gateway_store.results.arrow import arrow

__all__ = ["events_in", "importable"]

_BATCH_ROWS = 500
_INDEX = "__index_level_"  # of pandas


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
        ValueError: The file is not whole; or a record is malformed, or is not what its content_hash says: the text
            names it and repeats nothing of it.
        MissingExtraError: Parquet or zstd, and pyarrow is not installed.
    """
    records = _lines(path) if format == "jsonl" else _rows(path)
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


def _lines(path: Path) -> Iterator[dict[str, Any] | None]:
    with read_opened(path) as file:
        for number, line in enumerate(file, start=1):
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


def _rows(path: Path) -> Iterator[dict[str, Any] | None]:
    pa = arrow("Reading Parquet")
    from pyarrow import dataset

    try:
        source = dataset.dataset(path, format="parquet", exclude_invalid_files=False)
        names = [name for name in FIELDS if name in source.schema.names]
        unknown = [name for name in source.schema.names if name not in names and not name.startswith(_INDEX)]
        if unknown:
            raise ValueError(f"{path} has columns that no event has ({', '.join(unknown)}): leave them out.")
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
