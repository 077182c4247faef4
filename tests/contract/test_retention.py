"""Pruning into an archive, with holds: each event is in the table or in the archive, and the log still verifies."""

from __future__ import annotations

import asyncio
import shutil
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest
from contract_helpers import POSTGRES, run_script, store_sealed_by_hand
from erasure_helpers import BEFORE, OLD
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pyarrow import parquet
from sqlalchemy import text

from agent_gateway_store import AuditEvent, GatewayStore, StoreSettings
from agent_gateway_store.archive import Archive
from agent_gateway_store.audit.filters import Filters
from agent_gateway_store.errors import ArchiveError, EventsPrunedError, HoldNotFoundError, UnreadableRowError
from agent_gateway_store.models.evidence import FindingKind
from agent_gateway_store.retention import prune
from builders import make_event
from cases import cases
from tampering import tamper

store = store_sealed_by_hand

NEW = BEFORE + timedelta(days=1)


@pytest.fixture
def small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prune, "_BATCH_ROWS", 7)
    monkeypatch.setattr(prune, "DELETE_ROWS", {"postgresql": 3, "sqlite": 3})


def old_events(count: int, **fields: Any) -> list[AuditEvent]:
    """Events over three days, all of which a prune takes."""
    step = timedelta(days=3) / count
    return [make_event(request_id=f"old-{n}", timestamp=OLD + n * step, **fields) for n in range(count)]


async def request_ids(store: GatewayStore) -> set[str]:
    """Those of the events in the table, without the events of retention itself."""
    return {e.request_id async for e in store.audit.stream() if e.mcp_server != "gateway-store"}


async def doors(store: GatewayStore, tool: str) -> list[AuditEvent]:
    return [event async for event in store.audit.stream(mcp_server="gateway-store", tool_name=tool)]


@pytest.mark.usefixtures("small_batches")
async def test_old_events_move_to_the_archive_and_the_log_verifies(store: GatewayStore, tmp_path: Path) -> None:
    await store.audit.write_many([*old_events(20), make_event(request_id="new", timestamp=NEW)])
    before = {event.request_id: event async for event in store.audit.stream()}

    pruned = await store.retention.prune(BEFORE, by="ops", archive=tmp_path / "archive")

    assert (pruned.events, pruned.held, pruned.remaining) == (20, 0, 0)
    assert await request_ids(store) == {"new"}
    archive = Archive(tmp_path / "archive")
    archived = list(archive.events())
    assert {event.request_id: event for event in archived} == {k: v for k, v in before.items() if k != "new"}
    assert len(archived) == 20
    days = sorted(path.name for path in (tmp_path / "archive").iterdir() if path.is_dir())
    assert days == ["day=2025-03-01", "day=2025-03-02", "day=2025-03-03", "day=2025-03-04"]
    found = await store.evidence.verify(archive=tmp_path / "archive")
    assert (found.ok, found.pruned, found.archived) == (True, 20, 20)
    assert (await store.evidence.verify()).ok
    assert (await store.retention.prune(BEFORE, by="ops", archive=tmp_path / "archive")).events == 0


@POSTGRES
async def test_each_door_writes_an_event(store: GatewayStore, tmp_path: Path) -> None:
    await store.audit.write_many(old_events(3))
    await store.audit.write(make_event(timestamp=NEW))
    await store.retention.hold("case-7", reason="a lawsuit", by="counsel", session_id="none")
    await store.retention.release_hold("case-7", by="counsel")
    await store.retention.prune(BEFORE, by="ops", archive=tmp_path / "archive")

    [hold], [release], [pruned] = [await doors(store, f"audit.{name}") for name in ("hold", "release", "prune")]
    assert (hold.caller_id, hold.sanitized_args["name"], hold.sanitized_args["reason"]) == (
        "counsel", "case-7", "a lawsuit")  # fmt: skip
    assert release.sanitized_args["filters"] == {"session_id": "none"}
    assert (pruned.caller_id, pruned.sanitized_args["positions"]) == ("ops", [[0, 2]])
    await store.retention.prune(datetime(2100, 1, 1, tzinfo=UTC), by="ops", discard=True, below_floor=True)
    assert len(await doors(store, "audit.prune")) == 2
    assert len(await doors(store, "audit.hold")) == 1


@POSTGRES
@cases(
    ("arguments", "words"),
    [
        ({"before": "400d"}, "discard=True"),
        ({"before": "400d", "archive": "a", "discard": True}, "discard=True"),
        ({"before": "30d", "discard": True}, "183 days"),
        ({"before": "400d", "discard": True, "by": " "}, "by must not be blank"),
        ({"before": "400d", "archive": "a\udcff"}, "rename the folder"),
    ],
)
async def test_what_must_be_said_is_asked_for(store: GatewayStore, arguments: dict[str, Any], words: str) -> None:
    """An archive or that there is none; an age above the floor; by whom. Nothing goes."""
    await store.audit.write_many(old_events(2))
    with pytest.raises(ValueError, match=words):
        await store.retention.prune(**{"by": "ops", **arguments})
    assert len(await request_ids(store)) == 2


@pytest.mark.usefixtures("small_batches")
async def test_held_events_stay_until_the_hold_is_released(store: GatewayStore, tmp_path: Path) -> None:
    """Also those that arrived after it was placed; a filter of a missing value holds nothing else back."""
    await store.audit.write_many([*old_events(10), make_event(timestamp=NEW)])
    await store.retention.hold("case", reason="r", by="counsel", session_id=["s-1", "s-2"])
    await store.audit.write(make_event(request_id="late", session_id="s-1", timestamp=OLD))
    # The newest event stays in any case.
    await store.audit.write(make_event(timestamp=NEW))

    pruned = await store.retention.prune(BEFORE, by="ops", archive=tmp_path / "a", max_seconds=60)

    assert (pruned.events, pruned.held, pruned.remaining) == (10, 1, 0)
    assert "late" in await request_ids(store)
    [hold] = await store.retention.holds()
    assert (hold.name, hold.by, hold.filters) == ("case", "counsel", {"session_id": ["s-1", "s-2"]})
    with pytest.raises(ValueError, match="already"):
        await store.retention.hold("case", reason="r", by="counsel")
    await store.retention.release_hold("case", by="counsel")
    assert (await store.retention.prune(BEFORE, by="ops", archive=tmp_path / "a")).events == 1
    with pytest.raises(HoldNotFoundError, match="no hold 'case'"):
        await store.retention.release_hold("case", by="counsel")
    assert (await store.evidence.verify(archive=tmp_path / "a")).archived == 11


@POSTGRES
@pytest.mark.parametrize("given", ["a\0b", "a\ud800b", "x" * 3_000_000], ids=["nul", "surrogate", "long"])
async def test_what_no_database_holds_is_replaced_in_names_and_reasons(store: GatewayStore, given: str) -> None:
    """As in an event: a hold is found by what it was called, and covers the text that it names."""
    await store.audit.write_many([make_event(timestamp=OLD, llm_explanation=given[:900]), make_event(timestamp=NEW)])
    held = await store.retention.hold(given, reason=given, by=given, text=given[:900])

    assert await store.retention.holds() == [held]
    assert (await store.retention.prune(BEFORE, by=given, discard=True)).held == 1
    assert await store.retention.release_hold(given, by=given) == held
    assert (await store.retention.prune(BEFORE, by=given, discard=True)).events == 1
    # As earlier versions stored a long name.
    await store.retention.hold("case", reason="r", by="c")
    await tamper(store.database.engine, f"UPDATE audit_holds SET name = '{'x' * 600}'")
    assert (await store.retention.release_hold("x" * 600, by="c")).name == "x" * 600


FILTERS = st.fixed_dictionaries(
    {},
    optional={
        "caller_id": st.sampled_from(["a", "b", ["a", "b"]]),
        "session_id": st.sampled_from(["s", ["s", "t"]]),
        "decision": st.sampled_from(["ALLOW", ["DENY", "ALLOW"]]),
        "risk_label": st.sampled_from(["pii", ["pii", 'a"b']]),
        "min_risk_score": st.sampled_from([0.2, 0.8]),
        "since": st.sampled_from([OLD, (OLD + timedelta(days=1)).isoformat()]),
        "until": st.sampled_from([OLD + timedelta(days=2)]),
        "text": st.sampled_from(["READ", "50%"]),
    },
)
EVENTS = st.fixed_dictionaries(
    {
        "caller_id": st.sampled_from(["a", "b", "c"]),
        "session_id": st.sampled_from([None, "s", "t"]),
        "decision": st.sampled_from(["ALLOW", "DENY"]),
        "risk_labels": st.lists(st.sampled_from(["pii", 'a"b', "x"]), max_size=2),
        "risk_score": st.sampled_from([0.1, 0.5, 0.9]),
        "timestamp": st.sampled_from([OLD + timedelta(days=n) for n in range(4)]),
        "tool_name": st.sampled_from(["read_file", "50%_off", "write"]),
    }
)


@pytest.mark.system
@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rows=st.lists(EVENTS, min_size=1, max_size=12), holds=st.lists(FILTERS, max_size=3))
def test_random_holds_keep_what_a_search_finds(
    tmp_path: Path, rows: list[Any], holds: list[Any], sqlite_template: Path
) -> None:
    asyncio.run(_hold_and_prune(tmp_path, sqlite_template, rows, holds))


async def _hold_and_prune(folder: Path, template: Path, rows: list[Any], holds: list[Any]) -> None:
    url, archive = f"sqlite:///{folder}/{id(rows)}.db", folder / f"{id(rows)}"
    (folder / f"{id(rows)}.db").write_bytes(template.read_bytes())
    async with GatewayStore(url, redis_url="", settings=StoreSettings(audit_seal_seconds=0)) as store:
        await store.audit.write_many([make_event(request_id=f"r-{n}", **row) for n, row in enumerate(rows)])
        await store.audit.write(make_event(request_id="newest", timestamp=NEW))
        expected = {event.request_id for each in holds for event in await store.audit.search(limit=100, **each)}
        expected = {each for each in expected if each.startswith("r-")}
        for number, each in enumerate(holds):
            await store.retention.hold(f"h-{number}", reason="r", by="c", **each)

        pruned = await store.retention.prune(BEFORE, by="ops", archive=archive)

        assert await request_ids(store) - {"newest"} == expected
        assert (pruned.events, pruned.held) == (len(rows) - len(expected), len(expected))
        assert {event.request_id for event in Archive(archive).events()} == {
            f"r-{n}" for n in range(len(rows))
        } - expected
        assert (await store.evidence.verify(archive=archive)).ok
    for path in folder.glob(f"{id(rows)}.db*"):
        path.unlink()
    shutil.rmtree(archive)


@POSTGRES
@pytest.mark.usefixtures("small_batches")
async def test_a_prune_whose_time_is_up_says_what_remains(store: GatewayStore, tmp_path: Path) -> None:
    await store.audit.write_many([*old_events(20), make_event(timestamp=NEW)])
    assert (await store.retention.prune(BEFORE, by="ops", archive=tmp_path / "a", max_seconds=0)).remaining == 20
    seen: list[int] = []
    pruned = await store.retention.prune(BEFORE, by="ops", archive=tmp_path / "a", progress=seen.append)
    assert (pruned.events, seen) == (20, [7, 14, 20])


@POSTGRES
async def test_files_stay_small_where_large_events_follow_many_small_ones(
    store: GatewayStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By their number alone, the large ones would make a file that takes much memory to write and to read."""
    monkeypatch.setattr(prune, "_BATCH_BYTES", 2**19)
    at = OLD + timedelta(days=4)
    large = [make_event(timestamp=at, sanitized_args={"text": f"{n:05}" * 1_000}) for n in range(400)]
    await store.audit.write_many([*old_events(700), *large, make_event(request_id="new", timestamp=NEW)])

    pruned = await store.retention.prune(BEFORE, by="ops", archive=tmp_path / "archive")

    assert (pruned.events, pruned.remaining) == (1_100, 0)
    files = [parquet.read_metadata(path) for path in (tmp_path / "archive").glob("day=*/*.parquet")]
    assert sum(each.num_rows for each in files) == 1_100
    assert max(each.row_group(0).total_byte_size for each in files) < 2**20
    assert (await store.evidence.verify(archive=tmp_path / "archive")).ok


async def test_the_newest_event_stays(store: GatewayStore) -> None:
    """Cursors are marked by it, and SQLite must not give its id again."""
    await store.audit.write_many(old_events(3))
    await store.retention.prune(BEFORE, by="ops", discard=True)
    assert await request_ids(store) == {"old-2"}


@pytest.mark.usefixtures("small_batches")
class TestFollowers:
    """A reader of changes misses nothing that it had not read: it is told, or goes on."""

    async def test_one_that_has_read_it_all_goes_on(self, store: GatewayStore, tmp_path: Path) -> None:
        await store.audit.write_many(old_events(10))
        page = await store.audit.changes("beginning", limit=100)
        assert len(page) == 10
        await store.audit.write(make_event(request_id="new", timestamp=NEW))
        await store.retention.prune(BEFORE, by="ops", archive=tmp_path / "a")
        again = await store.audit.changes(page.next_cursor or "")
        assert [e.request_id for e in again if e.mcp_server != "gateway-store"] == ["new"]

    async def test_one_behind_is_told_where_the_events_are(self, store: GatewayStore, tmp_path: Path) -> None:
        begin = await store.audit.changes("now")
        await store.audit.write_many(old_events(10))
        middle = await store.audit.changes("beginning", limit=4)
        new = await store.audit.changes(begin.next_cursor or "", limit=4)
        await store.audit.write(make_event(timestamp=NEW))
        await store.retention.prune(BEFORE, by="ops", archive=tmp_path / "a")
        for page in (begin, middle, new):
            with pytest.raises(EventsPrunedError, match="archive") as raised:
                await store.audit.changes(page.next_cursor or "")
            assert raised.value.archive == str(tmp_path / "a")

    async def test_one_that_begins_after_a_prune_reads_what_is_left(self, store: GatewayStore) -> None:
        await store.audit.write_many(old_events(10, session_id="s")[:2])
        await store.audit.write_many(old_events(10)[2:])
        await store.audit.write(make_event(request_id="new", timestamp=NEW))
        await store.retention.hold("h", reason="r", by="c", session_id="s")
        await store.retention.prune(BEFORE, by="ops", discard=True)
        found: list[str] = []
        page = await store.audit.changes("beginning", limit=1)
        while page:
            found += [event.request_id for event in page if event.mcp_server != "gateway-store"]
            page = await store.audit.changes(page.next_cursor or "", limit=1)
        assert found == ["old-0", "old-1", "new"]


APPROVALS = [UUID(int=n) for n in range(1, 4)]
ROWS: list[dict[str, Any]] = [
    {
        **{name: f"{name}-{n}" for name in ("trace_id", "session_id", "parent_request_id", "caller_id", "key_id")},
        **{name: f"{name}-{n}" for name in ("org_id", "environment", "mcp_server", "tool_name", "approver_id")},
        "request_id": f"r-{n}",
        "approval_id": APPROVALS[n - 1],
        "raw_args_hash": f"{n}" * 64,
        "decision": ["ALLOW", "DENY", "APPROVAL_REQUIRED"][n - 1],
        "output_decision": ["ALLOW", "REDACT", "DENY"][n - 1],
        "execution_status": ["SUCCESS", "TIMEOUT", "TOOL_ERROR"][n - 1],
        "risk_labels": [f"label-{n}"],
        "risk_score": 0.9 if n == 1 else 0.1,
        "timestamp": OLD + timedelta(days=n),
        "llm_explanation": f"because\0{n}",
    }
    for n in (1, 2, 3)
]
ALONE = ("min_risk_score", "since", "until", "text")
VALUES: dict[str, Any] = {name: value for name, value in ROWS[0].items() if name in Filters.__annotations__} | {
    "risk_label": "label-1",
    "min_risk_score": 0.5,
    "since": OLD + timedelta(days=2),
    "until": OLD + timedelta(days=2),
    # NUL is kept, and looked for, as another character.
    "text": "BECAUSE\0" + "1",
}


@POSTGRES
class TestArchiveFolder:
    """What is in the folder is what was written, or it is found."""

    @pytest.fixture
    async def archive(self, store: GatewayStore, tmp_path: Path) -> Path:
        await store.audit.write_many([*old_events(6), make_event(timestamp=NEW)])
        await store.retention.prune(BEFORE, by="ops", archive=tmp_path / "archive")
        return tmp_path / "archive"

    @pytest.mark.system
    async def test_a_flipped_byte_in_any_file_is_found(self, store: GatewayStore, archive: Path) -> None:
        for path in [*archive.rglob("*.parquet"), archive / "manifest.jsonl"]:
            whole = path.read_bytes()
            for place in range(0, len(whole), max(1, len(whole) // 7)):
                path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
                assert not Archive(archive).verify().ok, (path, place)
            path.write_bytes(whole[:-1] + b" ")
            assert not Archive(archive).verify().ok
            assert not (await store.evidence.verify(archive=archive)).ok
            path.write_bytes(whole)
        assert Archive(archive).verify().ok

    async def test_what_is_missing_is_found_by_the_log(self, store: GatewayStore, archive: Path) -> None:
        lines = (archive / "manifest.jsonl").read_text().splitlines(keepends=True)
        (archive / "manifest.jsonl").write_text("".join(lines[1:]))
        assert Archive(archive).verify().ok
        found = await store.evidence.verify(archive=archive)
        assert {finding.kind for finding in found.findings} == {FindingKind.MISSING}
        (archive / "manifest.jsonl").write_text("".join(lines))
        next(archive.rglob("*.parquet")).unlink()
        assert {finding.kind for finding in Archive(archive).verify().findings} == {FindingKind.MISSING}

    async def test_what_a_killed_run_left_is_removed(self, store: GatewayStore, archive: Path) -> None:
        """Files that the manifest does not name, and half a line; nothing that is read sees them."""
        first = next(archive.rglob("*.parquet"))
        (first.parent / "999-abc.parquet").write_bytes(first.read_bytes())
        (first.parent / ".999-abc.parquet.partial").write_bytes(b"half")
        with (archive / "manifest.jsonl").open("a") as file:
            file.write('{"file": "day=2025')
        assert (Archive(archive).verify().ok, len(Archive(archive).verify().remarks)) == (True, 2)
        assert len(list(Archive(archive).events())) == 6
        await store.retention.prune(BEFORE, by="ops", archive=archive)
        assert Archive(archive).verify().remarks == ()
        assert Archive(archive).verify().events == 6

    async def test_a_folder_of_other_things_is_no_archive(self, store: GatewayStore, tmp_path: Path) -> None:
        (tmp_path / "full").mkdir()
        (tmp_path / "full" / "thesis.tex").write_text("!")
        with pytest.raises(ArchiveError, match="not empty"):
            await store.retention.prune(BEFORE, by="ops", archive=tmp_path / "full")

    async def test_filters_mean_what_they_mean_in_a_search(self, store: GatewayStore, tmp_path: Path) -> None:
        rows: list[dict[str, Any]] = [
            {"caller_id": "a", "session_id": "s", "risk_labels": ["pii", 'a"b'], "risk_score": 0.9},
            {"caller_id": "b", "decision": "DENY", "tool_name": "50%_off", "risk_labels": ["x"]},
            {"org_id": "acme", "timestamp": OLD + timedelta(days=2), "risk_labels": [", "]},
            {"caller_id": "ab", "llm_explanation": "Reads", "risk_labels": ["y", "z"]},
        ]
        filters: list[dict[str, Any]] = [
            {"caller_id": ["a", "b"]}, {"session_id": "s"}, {"decision": "DENY"}, {"risk_label": 'a"b'},
            {"risk_label": ["pii", ", "]}, {"min_risk_score": 0.5}, {"since": OLD + timedelta(days=1)},
            {"until": OLD + timedelta(days=1)}, {"text": "50%"}, {"org_id": "acme", "text": "READ"},
        ]  # fmt: skip
        await self.found_alike(store, tmp_path / "a", rows, filters)

    @pytest.mark.system
    async def test_every_filter_of_a_search_is_one_of_the_archive(self, store: GatewayStore, tmp_path: Path) -> None:
        """One value and several of each filter that there is: none of them finds everything, or nothing."""
        wanted = [
            {name: value}
            for name, given in VALUES.items()
            for value in ([given] if name in ALONE else [given, [given], [given, *other_values(name)]])
        ]
        assert VALUES.keys() == Filters.__annotations__.keys()
        assert set(await self.found_alike(store, tmp_path / "a", ROWS, wanted)) == {1, 2}

    async def found_alike(
        self, store: GatewayStore, folder: Path, rows: list[dict[str, Any]], wanted: list[dict[str, Any]]
    ) -> list[int]:
        """Require that the archive finds the events that a search found before; return how many by each filter."""
        await store.audit.write_many([make_event(**{"timestamp": OLD, **row}) for row in rows])
        await store.audit.write(make_event(timestamp=NEW))
        found = [{e.request_id: e for e in await store.audit.search(**each) if e.timestamp < BEFORE} for each in wanted]
        await store.retention.prune(BEFORE, by="ops", archive=folder)
        archive = Archive(folder)
        for filters, expected in zip(wanted, found, strict=True):
            assert {event.request_id: event for event in archive.events(**filters)} == expected, filters
            table = archive.to_arrow(**filters)
            assert set(table.column("request_id").to_pylist()) == set(expected), filters
        return [len(each) for each in found]


def other_values(name: str) -> list[Any]:
    """The value of the second row, where it has one that a filter takes."""
    value = ROWS[1]["risk_labels"][0] if name == "risk_label" else ROWS[1][name]
    return [value]


@pytest.mark.system
@pytest.mark.parametrize("stride", [11, pytest.param(1, marks=pytest.mark.slow)])
async def test_a_pruner_killed_at_any_step_loses_nothing(
    stride: int, store: GatewayStore, database_url: str, tmp_path: Path
) -> None:
    """After each kill -9 every event is in the table or in the archive, and the log verifies."""
    archive = tmp_path / "a"
    # Every eleventh step, as each takes a second; `-m slow` takes every one.
    kills = await asyncio.to_thread(
        *(run_script, "pruning_process.py", database_url, archive, stride), loads=["pyarrow.dataset", "pyarrow.parquet"]
    )
    assert kills >= 40 // stride
    await store.audit.write(make_event(request_id="newest", timestamp=NEW))
    await store.retention.prune(BEFORE, by="ops", archive=archive)
    archived = [event.request_id for event in Archive(archive).events()]
    assert await request_ids(store) == {"newest"}
    assert len(archived) == len(set(archived)) == 6 * (kills + 1)
    assert (await store.evidence.verify(archive=archive)).archived == len(archived)


@POSTGRES
async def test_the_last_runs_are_kept(store: GatewayStore) -> None:
    """How each ended, so that `doctor` can tell; also one that fails when all is done but the counts."""
    await store.audit.write_many([*old_events(3), make_event(timestamp=NEW)])
    await store.retention.prune(BEFORE, by="ops", discard=True)
    await store.retention.prune(BEFORE, by="ops", discard=True, max_seconds=0)
    await store.retention.hold("altered", reason="r", by="ops")
    await tamper(store.database.engine, "UPDATE audit_holds SET filters = '[1]'")
    with pytest.raises(UnreadableRowError):
        await store.retention.prune(BEFORE, by="ops", discard=True, max_seconds=0)
    async with store.database.read() as connection:
        found = (await connection.execute(text("SELECT result, events FROM audit_prunes ORDER BY id"))).all()
    assert found == [("done", 3), ("the time was up", 0), ("failed: UnreadableRowError", 0)]
