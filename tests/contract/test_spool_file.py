"""The file of the spool: synced and limited in size, read as older versions left it, shared by several processes."""

from __future__ import annotations

import os
import shutil
import sqlite3
import subprocess
import sys
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from contract_helpers import POSTGRES
from sqlalchemy import make_url

from agent_gateway_store import ExecutionStatus, GatewayStore, StoreSettings, WriteOutcome
from agent_gateway_store.audit.record import encode_event, key_of, to_values
from agent_gateway_store.audit.spool import Spool
from agent_gateway_store.errors import StoreUnavailableError
from builders import make_event
from proofs.harness import eventually, identity_of, migrated, spool_is_empty, spooled_ids

HERE = make_url("sqlite:///here.db")


def rows(*names: str) -> list[dict[str, Any]]:
    return [to_values(encode_event(make_event(request_id=name))) for name in names]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "spool.db"


async def test_every_connection_to_the_file_syncs_and_has_the_size_limit(path: Path) -> None:
    """WAL with synchronous=FULL, so that a commit is on disk; and each connection knows how large the file may be."""
    spool = Spool(path, HERE, "identity")
    await spool.add([to_values(encode_event(make_event()))])
    engine = await spool.engine()
    found = []
    for _ in range(2):
        async with engine.connect() as connection:
            for name in ("journal_mode", "synchronous", "max_page_count"):
                found.append((await connection.exec_driver_sql(f"PRAGMA {name}")).scalar())
        await engine.dispose()
    await spool.close()

    assert found == ["wal", 2, 2**18] * 2


OLDER = """
CREATE TABLE spooled_events (
    request_id TEXT, org_id TEXT, trace_id TEXT, session_id TEXT, parent_request_id TEXT, timestamp DATETIME,
    caller_id TEXT, caller_role TEXT, key_id TEXT, environment TEXT, mcp_server TEXT, tool_name TEXT,
    raw_args_hash TEXT, sanitized_args JSON, risk_labels JSON, risk_score FLOAT, matched_policy_rule TEXT,
    policy_version TEXT, decision TEXT, approver_id TEXT, execution_status TEXT, latency_ms BIGINT,
    output_hash TEXT, output_decision TEXT, output_policy_rationale TEXT, redaction_flags JSON,
    llm_explanation TEXT, deterministic_rationale TEXT, content_hash TEXT, target TEXT NOT NULL, spooled_at
    DATETIME NOT NULL, error TEXT,
    id INTEGER NOT NULL PRIMARY KEY AUTOINCREMENT
);
CREATE INDEX ix_spooled_events_target_id ON spooled_events (target, id);
"""
"""The spool as the revision 0003_due_by_notifier wrote it."""


async def test_spool_of_an_older_version_takes_every_status(tmp_path: Path, path: Path) -> None:
    """A file from before a status was known keeps events with it, and they are replayed as they were."""
    with closing(sqlite3.connect(path)) as older:
        older.executescript(OLDER)
    url = migrated(f"sqlite:///{tmp_path}/gateway.db")
    spool = Spool(path, make_url(url), await identity_of(url))
    events = [make_event(request_id=str(each), execution_status=each, extra={"n": 1}) for each in ExecutionStatus]
    await spool.add([to_values(encode_event(each)) for each in events])
    await spool.close()
    async with GatewayStore(url, redis_url="", settings=StoreSettings(audit_spool_path=path)) as store:
        await eventually(lambda: spool_is_empty(store))
        found = await store.audit.list_recent()

    assert {event.execution_status for event in found} == set(ExecutionStatus)


ALTERED = {
    "a newer decision": "decision = 'NEWER_WORD'",
    "no json": "sanitized_args = '{bad'",
    "no time": "timestamp = 'yesterday'",
    "no utf-8": "tool_name = CAST(x'ff' AS TEXT)",
    "nothing": "caller_id = NULL",
    "another value": "risk_score = risk_score + 0.25",
    "another hash, as over a newer field": "content_hash = printf('%064d', 1)",
}


@POSTGRES
async def test_a_row_that_cannot_be_read_holds_up_no_other(
    database_url: str, path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """It is quarantined as it is, and named once; a version that can read it brings it in when it opens a store."""
    spool = Spool(path, make_url(database_url), await identity_of(database_url))
    await spool.add(rows("first", *ALTERED, "last"))
    with closing(sqlite3.connect(path)) as other:
        kept = other.execute("SELECT * FROM spooled_events WHERE id = 2").fetchone()
        for row_id, change in enumerate(ALTERED.values(), 2):
            other.execute(f"UPDATE spooled_events SET {change} WHERE id = {row_id}")
        other.commit()
    new = make_event(request_id="new")
    for outcome, named in ((WriteOutcome.STORED, range(2, 9)), (WriteOutcome.DUPLICATE, ())):
        caplog.clear()
        async with GatewayStore(database_url, redis_url="") as store:
            assert await store.audit.flush() == 0
            assert await store.audit.write(new) is outcome
            assert [event.request_id for event in await store.audit.list_recent()] == ["new", "last", "first"]
        assert await spool.counts() == (0, len(ALTERED))
        said = [record.getMessage() for record in caplog.records if record.levelname == "ERROR"]
        assert [line.partition(" of ")[0] for line in said] == [f"Row {row_id}" for row_id in named]
    with closing(sqlite3.connect(path)) as other:
        other.execute("UPDATE spooled_events SET decision = ? WHERE id = 2", [make_event().decision.value])
        assert other.execute("SELECT * FROM spooled_events WHERE id = 2").fetchone()[:-2] == kept[:-2]
        other.commit()
    async with GatewayStore(database_url, redis_url="") as store:
        assert (await store.audit.flush(), store.audit.counters.replayed) == (0, 1)
        assert "a newer decision" in {event.request_id for event in await store.audit.list_recent()}
    assert await spool.counts() == (0, len(ALTERED) - 1)
    await spool.close()


async def test_a_file_that_was_replaced_or_removed_takes_nothing_more(path: Path) -> None:
    """Another one is made in its place: what went to the old one would be gone with this process."""
    slow, fast = Spool(path, HERE, "identity"), Spool(path, HERE, "identity")
    old, one, other = rows("old", "one", "other")
    await slow.add([old])
    await fast.add([old])
    path.rename(path.with_name("moved.db"))
    path.touch()
    await fast.add([one])
    await slow.add([other])
    assert spooled_ids(path.with_name("moved.db")) == ["old", "old"]
    assert sorted(spooled_ids(path)) == ["one", "other"]
    path.unlink()
    path.touch()
    await slow.add([old])

    assert spooled_ids(path) == ["old"]
    for file in path.parent.glob("spool.db*"):
        file.unlink()
    await slow.add([one])

    assert spooled_ids(path) == ["one"]
    await slow.close()
    await fast.close()


async def test_rows_of_a_file_that_was_moved_away_are_removed_from_no_other(path: Path) -> None:
    """What was read there was replayed; under its id another process may have spooled a new row meanwhile."""
    slow, fast = Spool(path, HERE, "identity"), Spool(path, HERE, "identity")
    old, new = rows("old", "new")
    await slow.add([old])
    await fast.add([old])
    seen = [row_id for row_id, _ in await slow.waiting(10)]
    path.rename(path.with_name("moved.db"))
    path.with_name("spool.db-wal").unlink()
    path.write_text("Not a database." * 100)
    with pytest.raises(StoreUnavailableError):
        await slow.remove(seen)
    path.unlink()
    await fast.add([new])

    await slow.remove(seen)

    assert [key_of(row)[0] for _, row in await slow.waiting(10)] == ["new"]
    await slow.remove_stored()
    assert spooled_ids(path) == ["new"]
    await slow.close()
    await fast.close()


@pytest.mark.parametrize("is_read", [False, True])
async def test_another_spool_put_in_place_of_a_running_one_keeps_its_rows(path: Path, is_read: bool) -> None:
    """The log of the running one is brought into the file that was moved, and not into that one."""
    other, running = Spool(path.with_name("other.db"), HERE, "identity"), Spool(path, HERE, "identity")
    old, one, new = rows("old", "one", "new")
    await other.add([old])
    await other.close()
    await running.add([one])
    with closing(sqlite3.connect(path, isolation_level=None)) as reader:
        if is_read:
            # It keeps the log from being emptied.
            reader.execute("BEGIN")
            reader.execute("SELECT * FROM spooled_events").fetchall()
        path.rename(path.with_name("moved.db"))
        other.path.rename(path)
        await running.add([new])
    await running.close()

    assert spooled_ids(path.with_name("moved.db")) == ["one"]
    assert spooled_ids(path) == ["old", "new"]
    assert len(list(path.parent.glob("spool.db-*"))) == is_read


async def test_the_log_of_a_spool_that_was_moved_away_is_set_aside_and_named(
    path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Its gateway is idle, or was killed: what it acknowledged comes into its file later, or is put there by hand."""
    idle, following = Spool(path, HERE, "identity"), Spool(path, HERE, "identity")
    old, new = rows("old", "new")
    moved, killed = path.with_name("moved.db"), path.with_name("killed.db")
    await idle.add([old])
    path.rename(moved)
    await following.add([new])
    (aside,) = path.parent.glob("spool.db-wal.*")
    shutil.copy(moved, killed)
    shutil.copy(aside, killed.with_name("killed.db-wal"))
    await following.close()
    path.unlink()
    caplog.clear()
    await following.check()

    assert f"{aside} holds events of a spool that was moved away" in caplog.text
    assert spooled_ids(killed) == ["old"]
    await idle.close()
    assert spooled_ids(moved) == ["old"]
    await following.close()
    await following.check()
    assert not list(path.parent.glob("spool.db-wal.*"))
    await following.close()


async def test_the_place_of_a_removed_row_is_not_given_again(path: Path) -> None:
    """One process replays rows that another has replayed already, while a third spools: the new row stays."""
    slow, fast = Spool(path, HERE, "identity"), Spool(path, HERE, "identity")
    old, new = rows("old", "new")
    await slow.add([old])
    seen = [row_id for row_id, _ in await slow.waiting(10)]
    await fast.remove(seen)
    await fast.add([new])

    await slow.remove(seen)

    assert spooled_ids(path) == ["new"]
    await slow.close()
    await fast.close()


FULL_DISK = """
import asyncio, sys
from pathlib import Path
from sqlalchemy import make_url
from agent_gateway_store.audit.record import encode_event, to_values
from agent_gateway_store.audit.spool import Spool
from agent_gateway_store.errors import StoreUnavailableError
from builders import make_event

async def main():
    spool = Spool(Path(sys.argv[1], "spool.db"), make_url("sqlite:///here.db"), "identity")
    row = to_values(encode_event(make_event(sanitized_args={"text": "x" * 1_500})))
    added = 0
    try:
        while True:
            await spool.add([row] * 50)
            added += 50
    except StoreUnavailableError:
        # What others write takes the rest.
        with Path(sys.argv[1], "other").open("wb", buffering=0) as other:
            try:
                while other.write(b"x" * 4096):
                    pass
            except OSError:
                pass
    assert added > 1_000
    removed = 0
    while rows := await spool.waiting(500):
        await spool.remove([row_id for row_id, _ in rows])
        removed += len(rows)
    assert (added, await spool.counts()) == (removed, (0, 0))
    await spool.add([row])
    await spool.close()

asyncio.run(main())
"""


@pytest.mark.system
@pytest.mark.skipif(
    shutil.which("unshare") is None or subprocess.run(["unshare", "-rm", "true"], check=False).returncode != 0,
    reason="this user may not mount a small disk",
)
def test_a_spool_that_fills_its_disk_can_be_emptied(tmp_path: Path) -> None:
    """To remove rows takes room as well, which is kept in reserve."""
    mount = 'mount -t tmpfs -o size=24m tmpfs "$1" && exec "$2" -c "$3" "$1"'
    command = ["unshare", "-rm", "sh", "-c", mount, "sh", str(tmp_path), sys.executable, FULL_DISK]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False, env=env)

    assert (done.returncode, done.stderr) == (0, "")
