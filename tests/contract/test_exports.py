"""Exports and frames: the same events out, in, and out again; safe cells; files whole or not there."""

from __future__ import annotations

import asyncio
import csv
import gzip
import io
import json
import re
import shutil
import sys
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import duckdb
import polars
import pyarrow as pa
import pytest
from contract_helpers import POSTGRES
from pyarrow import dataset, parquet

from agent_gateway_store import AuditEvent, GatewayStore, WriteOutcome, errors
from agent_gateway_store.results import Page
from agent_gateway_store.storage.export import ExportResult, escape_formulas
from builders import make_event
from cases import cases
from proofs.hostile import Hostile

JSON_COLUMNS = ("sanitized_args", "risk_labels", "redaction_flags", "extra")


async def fill(store: GatewayStore, count: int = 30) -> Page[AuditEvent]:
    """Write hostile events; returns them as they are stored, newest first."""
    hostile = Hostile(23)
    await store.audit.write_many(hostile.event() for _ in range(count))
    return await store.audit.list_recent(1_000)


def values(events: Any) -> dict[tuple[str, str], dict[str, Any]]:
    return {(event.request_id, event.org_id): event.model_dump(exclude={"id"}) for event in events}


def comparable(table: pa.Table) -> list[dict[str, Any]]:
    return [
        {name: json.loads(value) if name in JSON_COLUMNS else value for name, value in row.items()}
        for row in table.to_pylist()
    ]


async def test_bulk_frames_are_those_of_a_page(store: GatewayStore) -> None:
    """Columns, types and values of `to_arrow` are those of the listing's, for hostile events and for none."""
    events = await fill(store)
    table = await store.audit.to_arrow()
    none = await store.audit.to_arrow(caller_id="nobody")
    frames = [await store.audit.to_pandas(), await store.audit.to_polars()]

    assert table.schema.equals(events.to_arrow().schema)
    assert comparable(table) == comparable(events.to_arrow())
    assert (none.num_rows, none.schema) == (0, table.schema)
    assert list(none.to_pandas()["decision"].cat.categories) == list(events.to_pandas()["decision"].cat.categories)
    assert list(frames[0].dtypes) == list(events.to_pandas().dtypes)
    assert frames[1].schema == events.to_polars().schema
    assert [len(frame) for frame in frames] == [30, 30]


@POSTGRES
@pytest.mark.parametrize("name", ["e.jsonl", "e.jsonl.gz", "e.ndjson.zst", "e.parquet", "by_day"])
async def test_export_import_export_gives_the_same_events(store: GatewayStore, tmp_path: Path, name: str) -> None:
    events = await fill(store)
    by_day: Any = "day" if name == "by_day" else None
    first = await store.audit.export(tmp_path / name, partition_by=by_day)
    async with GatewayStore(f"sqlite:///{tmp_path}/other.db", redis_url="") as other:
        outcomes = await other.audit.import_file(tmp_path / name)
        again = await other.audit.import_file(tmp_path / name)
        second = await other.audit.export(tmp_path / f"2-{name}", partition_by=by_day)
        moved = await other.audit.list_recent(1_000)

    assert (first.rows, second.rows) == (30, 30)
    assert (outcomes, again) == ({WriteOutcome.STORED: 30}, {WriteOutcome.DUPLICATE: 30})
    assert values(moved) == values(events)
    written = tmp_path / name
    assert first.bytes == sum(each.stat().st_size for each in [written, *written.rglob("*")] if each.is_file())
    if name == "e.parquet":
        tables = [comparable(parquet.read_table(each)) for each in (written, tmp_path / f"2-{name}")]
        rows = [{(row["request_id"], row["org_id"]): row | {"id": None} for row in table} for table in tables]
        assert rows[0] == rows[1]


async def test_jsonl_is_what_the_models_dump(store: GatewayStore, tmp_path: Path) -> None:
    """Each line is `model_dump(mode="json")` of an event, oldest first; gzip is the same, packed."""
    events = await fill(store)
    told: list[int] = []
    result = await store.audit.export(tmp_path / "e.jsonl", progress=told.append)
    await store.audit.export(tmp_path / "e.jsonl.gz")
    text = (tmp_path / "e.jsonl").read_bytes()

    assert [json.loads(line) for line in text.split(b"\n")[:-1]] == [
        each.model_dump(mode="json") for each in events[::-1]
    ]
    assert gzip.decompress((tmp_path / "e.jsonl.gz").read_bytes()) == text
    assert (result.bytes, result.files, result.format, told[-1]) == (len(text), 1, "jsonl", 30)


@POSTGRES
async def test_parquet_is_read_by_others(store: GatewayStore, tmp_path: Path) -> None:
    """One file, and a dataset with a folder for each UTC day, hold the same, for DuckDB and Polars, too."""
    times = [datetime(2026, 5, 1, 22, tzinfo=UTC) + timedelta(hours=hour) for hour in range(30)]
    await store.audit.write_many(make_event(request_id=f"r-{n:02}", timestamp=at) for n, at in enumerate(times))
    await store.audit.export(tmp_path / "e.parquet", decision="ALLOW", compression="zstd")
    result = await store.audit.export(tmp_path / "days", partition_by="day", compression="gzip")
    one = parquet.read_table(tmp_path / "e.parquet")
    days = dataset.dataset(tmp_path / "days", partitioning="hive")

    assert one.schema.equals((await store.audit.to_arrow()).schema)
    assert sorted(each.name for each in (tmp_path / "days").iterdir()) == [f"day=2026-05-0{n}" for n in (1, 2, 3)]
    assert (result.rows, result.files) == (30, 3)
    assert days.to_table(filter=dataset.field("day") == "2026-05-01").num_rows == 2
    assert days.to_table().drop_columns("day").select(one.column_names).to_pylist() == one.to_pylist()

    source = f"read_parquet('{tmp_path}/days/*/*.parquet', hive_partitioning = true)"
    query = f"SELECT CAST(day AS VARCHAR), request_id, timestamp, decision FROM {source} ORDER BY request_id"
    with duckdb.connect() as connection:
        connection.execute("SET TimeZone = 'UTC'")
        rows = connection.execute(query).fetchall()
    frame = polars.read_parquet(tmp_path / "days", hive_partitioning=True).sort("request_id")
    columns = frame.select(polars.col("day").cast(polars.String), "request_id", "timestamp", "decision")
    assert rows == [(f"{at:%Y-%m-%d}", f"r-{n:02}", at, "ALLOW") for n, at in enumerate(times)]
    assert columns.rows() == rows


HOSTILE_STARTS = (
    *("\tx", "\rx", "=1+1", "+1", "-1", "@SUM(A1)", "\t=1", "\r=1", "\n=1", " =1", "\u00a0=1", "\ufeff=1"),
    *("\u200b+1", "\uff1d1", "\uff0b1", "\uff0d1", "\uff201", "\x0b=1", "|x", "a\n=1", "a\r\n \t@x", '"=1'),
    *("x;=1", 'x; "=1', "x\t@1", ";\uff1d1", "=cmd|' /C calc'!A0"),
)
_SIGNS = tuple("=+-@\uff1d\uff0b\uff0d\uff20")


def begins_formula(cell: str) -> bool:
    """OWASP's list, full-width signs, behind blanks, in every line of the cell."""
    if cell[:1] in ("\t", "\r", "\n"):
        return True
    lines = re.split(r"[\r\n]", cell)
    invisible = "".join(map(chr, (*range(0x21), 0xA0, 0xAD, 0x180E, *range(0x200B, 0x2010), 0x2060, 0x3000, 0xFEFF)))
    return any(line.lstrip(invisible).strip()[:1] in _SIGNS for line in lines if line.strip(invisible))


def split_by(separator: str, path: Path) -> list[str]:
    """The cells that a program with another list separator finds; our quotes stand inside of them."""
    rows = csv.reader(io.StringIO(path.read_bytes().decode(), newline=""), delimiter=separator)
    return [cell.lstrip('"\t') for row in rows for cell in row]


def test_long_runs_of_blanks_take_linear_time() -> None:
    for run in ("\n", " ", ";", '"', "\t;"):
        for text in ("x" + run * 200_000, run * 200_000):
            assert len(escape_formulas(f"{text}x")) <= len(text) + 2
            assert len(escape_formulas(f"{text}=1")) <= len(text) + 4


@POSTGRES
async def test_five_thousand_hostile_cells_are_no_formula(store: GatewayStore, tmp_path: Path) -> None:
    """None begins a formula by OWASP's list; raw leaves every cell as it is; both are RFC 4180."""
    hostile = Hostile(5)
    names = (
        *("caller_id", "caller_role", "mcp_server", "tool_name", "matched_policy_rule", "environment"),
        *("llm_explanation", "session_id", "policy_version", "deterministic_rationale"),
    )
    cells = [start + hostile.text()[:50] for start in HOSTILE_STARTS for _ in range(25)]
    events = [make_event(**dict(zip(names, cells[number:] + cells[:number], strict=False))) for number in range(500)]
    await store.audit.write_many(events)
    await store.audit.export(tmp_path / "safe.csv")
    await store.audit.export(tmp_path / "raw.csv", raw=True)
    safe, raw = (
        list(csv.DictReader(io.StringIO((tmp_path / name).read_bytes().decode(), newline="")))
        for name in ("safe.csv", "raw.csv")
    )
    stored = [event.model_dump(mode="json") for event in (await store.audit.list_recent(1_000))[::-1]]
    checked = [row[name] for row in safe for name in names]

    assert len(checked) == 5_000
    assert sum(map(begins_formula, (row[name] for row in raw for name in names))) > 4_000
    assert [cell for cell in checked if begins_formula(cell)] == []
    for separator in ";\t":
        assert sum(map(begins_formula, split_by(separator, tmp_path / "raw.csv"))) > 100
        assert [cell for cell in split_by(separator, tmp_path / "safe.csv") if begins_formula(cell)] == []
    assert [{name: row[name] for name in names} for row in raw] == [
        {name: row[name] for name in names} for row in stored
    ]
    assert [[escape_formulas(row[name]) for name in names] for row in raw] == [
        [row[name] for name in names] for row in safe
    ]


@POSTGRES
async def test_none_and_empty_text_differ_in_csv(store: GatewayStore, tmp_path: Path) -> None:
    await store.audit.write(make_event(session_id=None, trace_id=""))
    await store.audit.export(tmp_path / "e.csv")
    head, line = (tmp_path / "e.csv").read_text().splitlines()
    fields = dict(zip(head.split(","), line.split(","), strict=False))

    assert (fields['"session_id"'], fields['"trace_id"']) == ("", '""')


@POSTGRES
async def test_a_failed_export_leaves_nothing(
    store: GatewayStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither under the name nor beside it; what was there before stays, unless it is to be replaced."""
    await store.audit.write(make_event())
    folder = tmp_path / "out"
    folder.mkdir()
    (folder / "there.jsonl").write_text("before")

    def broken(_rows: int) -> None:
        raise RuntimeError("no")

    for name in ("a.jsonl", "a.csv", "a.parquet", "there.jsonl"):
        with pytest.raises(RuntimeError, match="no"):
            await store.audit.export(folder / name, progress=broken, overwrite=True)
    with pytest.raises(RuntimeError, match="no"):
        await store.audit.export(folder / "days", partition_by="day", progress=broken)
    with pytest.raises(FileExistsError, match=r"there\.jsonl exists already"):
        await store.audit.export(folder / "there.jsonl")
    assert [each.name for each in folder.iterdir()] == ["there.jsonl"]
    assert (folder / "there.jsonl").read_text() == "before"
    await store.audit.export(folder / "there.jsonl", overwrite=True)
    await store.audit.export(folder / "there.jsonl", overwrite=True, partition_by="day", format="parquet")
    await store.audit.export(folder / "there.jsonl", overwrite=True, partition_by="day", format="parquet")

    assert [each.name for each in folder.iterdir()] == ["there.jsonl"]
    assert dataset.dataset(folder / "there.jsonl", partitioning="hive").count_rows() == 1
    assert ExportResult.__dataclass_params__.frozen  # type: ignore[attr-defined]


async def test_a_cancelled_read_leaves_nothing_behind(store: GatewayStore, tmp_path: Path) -> None:
    """No file and no connection in use, at whatever moment it is cancelled; the store goes on."""
    await store.audit.write_many(make_event() for _ in range(1_500))
    reads: list[Callable[[], Any]] = [
        lambda: store.audit.export(tmp_path / "e.jsonl"),
        lambda: store.audit.export(tmp_path / "e.parquet"),
        lambda: store.audit.export(tmp_path / "days", partition_by="day"),
        store.audit.to_arrow,
        store.audit.stats,
    ]
    for number in range(15):
        task = asyncio.create_task(reads[number % len(reads)]())
        await asyncio.sleep(0.001 * (number // len(reads)) ** 2)
        task.cancel()
        await asyncio.wait([task])
        assert task.cancelled() or task.exception() is None
        assert [each for each in tmp_path.iterdir() if each.suffix == ".partial"] == []
        for each in (tmp_path / "e.jsonl", tmp_path / "e.parquet"):
            each.unlink(missing_ok=True)
        shutil.rmtree(tmp_path / "days", ignore_errors=True)

    assert (await store.audit.stats())[0]["calls"] == 1_500


async def test_a_database_in_memory_survives_a_broken_read(tmp_path: Path) -> None:
    """It lives in one connection, which an export that fails must not take with it."""

    def broken(_rows: int) -> None:
        raise RuntimeError("no")

    async with GatewayStore("sqlite://", redis_url="") as memory:
        await memory.audit.write(make_event())
        for name in ("e.jsonl", "e.parquet"):
            with pytest.raises(RuntimeError, match="no"):
                await memory.audit.export(tmp_path / name, progress=broken)
        async for event in memory.audit.stream():
            await memory.audit.write(make_event(caller_id=f"after-{event.caller_id}"))

        assert len(await memory.audit.list_recent()) == 2


@POSTGRES
@cases(
    ("arguments", "says"),
    [
        ({"path": "x"}, "does not say the format"),
        ({"path": "x.xlsx"}, "does not say the format"),
        ({"path": "x.jsonl", "format": "xml"}, "format must be"),
        ({"path": "x.jsonl", "compression": "rar"}, "compression must be"),
        ({"path": "x.jsonl", "partition_by": "week"}, "partition_by must be"),
        ({"path": "x.jsonl", "format": "csv", "partition_by": "day"}, "needs format"),
        ({"path": "x.jsonl", "raw": True}, "raw=True is for"),
        ({"path": "x.jsonl", "decision": "MAYBE"}, "decision must be one of"),
    ],
)
async def test_wrong_arguments_write_nothing(
    store: GatewayStore, tmp_path: Path, arguments: dict[str, Any], says: str
) -> None:
    out = tmp_path / "out"
    out.mkdir(exist_ok=True)
    given = dict(arguments)
    with pytest.raises(ValueError, match=says):
        await store.audit.export(out / given.pop("path"), **given)

    assert list(out.iterdir()) == []


@POSTGRES
async def test_malformed_files_are_one_sentence(store: GatewayStore, tmp_path: Path) -> None:
    """The record is named, its content is not repeated, and what stood before it is stored."""
    good = make_event(request_id="good").model_dump_json()
    for content, says in (
        (f"{good}\n\n{{secret", "Record 3 of .*not JSON"),
        (f"{good}\n[1]", "Record 2 of .*not a JSON object"),
        (f'{good}\n{{"secret": 1}}', r"Record 2 of .*request_id: Field required"),
        ("[" * 100_000, "Record 1 of .*not JSON"),
    ):
        (tmp_path / "e.jsonl").write_text(content)
        with pytest.raises(ValueError, match=says) as caught:
            await store.audit.import_file(tmp_path / "e.jsonl")
        assert 'secret"' not in str(caught.value)
    await store.audit.export(tmp_path / f"{'é' * 120}.parquet")
    table = parquet.read_table(tmp_path / f"{'é' * 120}.parquet")
    place = table.column_names.index("sanitized_args")
    parquet.write_table(table.set_column(place, "sanitized_args", pa.array(["{secret"])), tmp_path / "e.parquet")
    with pytest.raises(ValueError, match=r"Record 1 of .*sanitized_args: not JSON"):
        await store.audit.import_file(tmp_path / "e.parquet")
    (tmp_path / "e.parquet").write_bytes(b"PAR1 this is none")
    with pytest.raises(ValueError, match="is not Parquet"):
        await store.audit.import_file(tmp_path / "e.parquet")
    with pytest.raises(ValueError, match="CSV cannot be read back"):
        await store.audit.import_file(tmp_path / "e.jsonl", format="csv")  # type: ignore[arg-type]
    with pytest.raises(FileNotFoundError, match=r"none\.jsonl does not exist"):
        await store.audit.import_file(tmp_path / "none.jsonl")

    assert await store.audit.get_by_request_id("good") is not None


@POSTGRES
async def test_without_pyarrow_parquet_says_what_to_install(
    store: GatewayStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(errors.MissingExtraError, match=r"Writing Parquet needs .*\[notebook\]"):
        await store.audit.export(tmp_path / "e.parquet")
    assert list(tmp_path.glob("*e.parquet*")) == []
    (tmp_path / "e.parquet").touch()
    with pytest.raises(errors.MissingExtraError, match=r"Reading Parquet needs .*\[notebook\]"):
        await store.audit.import_file(tmp_path / "e.parquet")
