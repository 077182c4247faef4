"""`store.audit.import_file` on files that other programs wrote, cut off or changed."""

from __future__ import annotations

import gzip
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import duckdb
import pandas as pd
import polars as pl
import pyarrow as pa
import pytest
from contract_helpers import POSTGRES
from pyarrow import parquet

from agent_gateway_store import AuditEvent, GatewayStore, StoreSettings
from agent_gateway_store.audit import writes
from agent_gateway_store.errors import AuditUnavailableError
from builders import make_event
from cases import cases
from tampering import tamper

pytestmark = POSTGRES


async def _exported(store: GatewayStore, path: Path) -> list[AuditEvent]:
    await store.audit.write_many(
        make_event(request_id=f"r-{number}", risk_labels=["pii"], trace_id=None, sanitized_args={"n": "é"})
        for number in range(3)
    )
    await store.audit.export(path)
    return list(await store.audit.search())


def _by_pandas(path: Path) -> None:
    frame = pd.read_parquet(path)
    frame[frame["request_id"] != "none"].to_parquet(path, index=True)


def _by_polars(path: Path) -> None:
    pl.read_parquet(path).write_parquet(path)


def _by_duckdb(path: Path) -> None:
    with duckdb.connect() as connection:
        connection.execute(f"COPY (FROM '{path}') TO '{path}.copy' (FORMAT parquet)")
    Path(f"{path}.copy").replace(path)


async def test_what_another_program_copied_is_the_same_events(store: GatewayStore, tmp_path: Path) -> None:
    path = tmp_path / "e.parquet"
    await _exported(store, path)
    for rewritten in (_by_polars, _by_duckdb, _by_pandas):
        rewritten(path)
        assert await store.audit.import_file(path) == {"DUPLICATE": 3}, rewritten


@pytest.mark.parametrize("name", ["e.jsonl", "e.parquet"])
async def test_an_export_from_before_a_field_is_the_same_events(store: GatewayStore, tmp_path: Path, name: str) -> None:
    """A file without `approval_id` and `extra`, as an earlier version wrote it."""
    path = tmp_path / name
    await _exported(store, path)
    new = ["approval_id", "extra"]
    if name == "e.parquet":
        parquet.write_table(parquet.read_table(path).drop_columns(new), path)
    else:
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        path.write_text("".join(f"{json.dumps({k: line[k] for k in line if k not in new})}\n" for line in lines))

    assert await store.audit.import_file(path) == {"DUPLICATE": 3}


@pytest.mark.parametrize("name", ["e.jsonl", "e.parquet"])
async def test_an_event_that_was_changed_is_refused(store: GatewayStore, tmp_path: Path, name: str) -> None:
    """By its content_hash; without one it comes in as a new event."""
    path = tmp_path / name
    await _exported(store, path)
    table = parquet.read_table(path) if name == "e.parquet" else None

    def change(**values: Any) -> None:
        if table is None:
            lines = [json.loads(line) for line in path.read_text().splitlines()]
            lines[1] |= values
            path.write_text("".join(f"{json.dumps(line)}\n" for line in lines))
            return
        rows = table.to_pylist()
        rows[1] |= values
        parquet.write_table(pa.Table.from_pylist(rows, schema=table.schema), path)

    change(caller_id="somebody-else")
    with pytest.raises(ValueError, match=r"Record 2 of .* does not fit its content_hash") as caught:
        await store.audit.import_file(path)
    assert "somebody-else" not in str(caught.value)
    change(caller_id="somebody-else", content_hash=None)

    assert await store.audit.import_file(path) == {"DUPLICATE": 2, "STORED": 1}


async def test_an_event_of_another_organisation_keeps_its_content(store: GatewayStore, tmp_path: Path) -> None:
    """A store that is bound stamps its own organisation on events whose hash names another one."""
    await _exported(store, tmp_path / "e.jsonl")

    assert await store.for_org("acme").audit.import_file(tmp_path / "e.jsonl") == {"STORED": 3}


async def test_the_file_is_closed_where_its_events_cannot_be_stored(
    own_database_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With most of it unread; the error, and with it the frames that read, is kept."""
    path = tmp_path / "e.jsonl"
    monkeypatch.setattr(writes, "BULK_ROWS", 50)
    settings = StoreSettings(audit_mode="strict", audit_seal_seconds=0)
    async with GatewayStore(own_database_url, redis_url="", settings=settings) as store:
        await store.audit.write_many(make_event() for _ in range(300))
        await store.audit.export(path)
        await tamper(store.database.engine, "ALTER TABLE audit_events RENAME TO elsewhere")
        with pytest.raises(AuditUnavailableError):
            await store.audit.import_file(path)

        assert str(path) not in map(os.path.realpath, Path("/proc/self/fd").iterdir())


@cases("packing", [".gz", ".zst"])
async def test_a_packed_file_that_is_not_whole_is_one_sentence(
    store: GatewayStore, tmp_path: Path, packing: str
) -> None:
    path = tmp_path / f"e.jsonl{packing}"
    await _exported(store, path)
    whole = path.read_bytes()
    broken = [whole[:-12], b"{}\n"]
    if packing == ".gz":
        broken.append(gzip.compress(b"\n")[:-8] + bytes(8))

    for content in broken:
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"cannot be decompressed to its end: check that the file is complete"):
            await store.audit.import_file(path)


async def test_a_column_that_no_event_has_is_refused(store: GatewayStore, tmp_path: Path) -> None:
    path = tmp_path / "e.parquet"
    await _exported(store, path)
    table = parquet.read_table(path)
    parquet.write_table(table.append_column("source", pa.array(["x"] * 3)), path)

    with pytest.raises(ValueError, match=r"has columns that an event does not have \(source\)"):
        await store.audit.import_file(path)


def _bomb_of_blank_lines(path: Path) -> None:
    with gzip.open(path, "wb") as file:
        for _ in range(80):
            file.write((b" " * 1023 + b"\n") * 1024)


def _endless_line(path: Path) -> None:
    with gzip.open(path, "wb") as file:
        for _ in range(40):
            file.write(b" " * 2**20)


def _bomb_of_columns(path: Path) -> None:
    rows = pa.table({"caller_id": pa.array(["x" * 2**20] * 100)})
    parquet.write_table(rows, path, use_dictionary=False, compression="zstd")


@pytest.mark.parametrize(
    ("name", "made", "words"),
    [
        ("blank.jsonl.gz", _bomb_of_blank_lines, "more than 200 times its size"),
        ("long.jsonl.gz", _endless_line, "a line of more than 32 MiB"),
        ("columns.parquet", _bomb_of_columns, "more than 200 times its size"),
    ],
    ids=["blank lines", "one line", "columns"],
)
async def test_what_was_made_to_fill_the_memory_is_refused(
    store: GatewayStore, tmp_path: Path, name: str, made: Callable[[Path], None], words: str
) -> None:
    """A small file that unpacks without end, or a line without end: one sentence, and nothing is stored."""
    made(tmp_path / name)

    with pytest.raises(ValueError, match=words):
        await store.audit.import_file(tmp_path / name)

    assert not await store.audit.list_recent()


@pytest.mark.parametrize("name", ["e.jsonl", "e.parquet"])
async def test_an_import_can_go_on_past_what_it_refuses(store: GatewayStore, tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    await _exported(store, path)
    if name == "e.jsonl":
        lines = path.read_text().splitlines()
        changed = json.dumps(json.loads(lines[2]) | {"caller_id": "mallory"})
        path.write_text("\n".join((lines[0], "{broken", "[]", '{"request_id": "x"}', changed, lines[1])))
        numbers = [2, 3, 4, 5]
    else:
        rows = parquet.read_table(path).to_pylist()
        rows[1] |= {"sanitized_args": "{broken"}
        rows[2] |= {"caller_id": "mallory"}
        parquet.write_table(pa.Table.from_pylist(rows), path)
        numbers = [2, 3]
    refused: list[str] = []

    outcomes = await store.audit.import_file(path, on_refused=refused.append)

    assert outcomes == {"DUPLICATE": 2 if name == "e.jsonl" else 1}
    assert [int(sentence.split()[1]) for sentence in refused] == numbers
    with pytest.raises(ValueError, match="Record 2"):
        await store.audit.import_file(path)
