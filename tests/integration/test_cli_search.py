"""`gateway-store audit`: filters, pages, statistics, exports and imports."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path

import cli_helpers
import pytest
from cli_helpers import Cli, ask, ids

from commands import Outcome, event_line, gateway_store

url, cli = cli_helpers.url, cli_helpers.cli


@pytest.fixture
def filled(cli: Cli) -> Cli:
    lines = [
        event_line(
            f"r{n}", caller_id=f"agent-{n % 2}", tool_name=f"tool_{n % 3}", decision="DENY" if n > 6 else "ALLOW",
            latency_ms=n, risk_labels=["PII"] if n % 2 else [], timestamp=f"2026-05-0{1 + n // 5}T00:00:0{n}Z",
        )
        for n in range(10)
    ]  # fmt: skip
    assert cli("audit", "write", input="\n".join(lines)).code == 0
    return cli


def test_filters_are_combined_and_pages_lead_on(filled: Cli) -> None:
    """An option that is given twice takes either; times and words are taken as people write them."""

    def found(*options: str) -> list[str]:
        return ids(filled("audit", "search", "--json", *options))

    assert found("--caller", "agent-1", "--decision", "deny") == ["r9", "r7"]
    assert found("--caller", "agent-1", "--caller", "agent-0", "--limit", "20") == [f"r{n}" for n in range(9, -1, -1)]
    assert found("--since", "2026-05-02", "--until", "2026-05-02T00:00:07Z", "--label", "PII") == ["r5"]
    assert found("--text", "TOOL\\_2") == []
    assert found("--text", "TOOL_2") == ["r8", "r5", "r2"]
    first = filled("audit", "search", "--tool", "tool_0", "--limit", "3")
    cursor = first.err.split()[-1]
    assert found("--tool", "tool_0", "--cursor", cursor) == ["r0"]
    other = filled("audit", "search", "--tool", "tool_1", "--cursor", cursor)
    assert (other.code, "not of this listing" in other.err) == (2, True)


def test_a_wrong_option_is_a_usage_error() -> None:
    for arguments, says in (
        (["search", "--since", "soon"], "since must be a time"),
        (["search", "--decision", "maybe"], "decision must be one of"),
        (["search", "--request-id", "r1", "--caller", "a"], "--request-id alone"),
        (["stats", "--by", "weather"], "by must name one or more"),
        (["stats", "--bucket", "1y"], "bucket must be a number"),
        (["tail", "--status", "FINE"], "execution_status must be one of"),
        (["export", "x"], "does not say the format"),
        (["export", "x.jsonl", "--partition-by", "day"], "needs format"),
    ):
        found = gateway_store("audit", *arguments)

        assert (found.code, "Traceback" in found.err) == (2, False)
        assert says in " ".join(found.err.replace("│", " ").split())


def test_stats_are_a_table_or_json(filled: Cli) -> None:
    rows = filled("audit", "stats", "--json", "--by", "caller_id", "--bucket", "1d", "--label", "PII").json["items"]
    table = filled("audit", "stats", "--by", "decision")

    assert [(row["bucket"], row["calls"], row["denials"], row["latency_p95_ms"]) for row in rows] == [
        ("2026-05-01T00:00:00Z", 2, 0, 3),
        ("2026-05-02T00:00:00Z", 3, 2, 9),
    ]
    assert all(word in table.out for word in ("DENY", "ALLOW", "p99 ms"))


def test_what_is_exported_is_imported_elsewhere(filled: Cli, tmp_path: Path) -> None:
    """JSONL, which `audit write` reads, too, and Parquet; nothing is stored twice or overwritten unasked."""
    file = str(tmp_path / "e.jsonl.gz")
    exported = filled("audit", "export", file, "--json", "--decision", "ALLOW")
    filled("audit", "export", str(tmp_path / "days"), "--partition-by", "day")

    def other(*arguments: str) -> Outcome:
        return gateway_store("--database-url", f"sqlite:///{tmp_path}/other.db", "audit", *arguments)

    assert (exported.code, exported.json["rows"], exported.json["files"]) == (0, 7, 1)
    filled("audit", "export", file).assert_fails(1, f"{file} exists already: choose another name", "`--overwrite`")
    assert other("import", file).out == "7 STORED\n"
    assert other("import", str(tmp_path / "days"), "--json").json == {"DUPLICATE": 7, "STORED": 3}
    assert len(ids(other("search", "--json"))) == 10
    other("import", "none.jsonl").assert_fails(1, "none.jsonl does not exist: check the name.")

    # Past refused lines it goes on only if it may: the exit code says that something is missing.
    path = tmp_path / "events.jsonl"
    lines = [event_line(name, timestamp="2026-05-01T00:00:00Z") for name in ("n1", "n2")]
    path.write_text("\n".join((lines[0], json.dumps({"secret": 1}), "{broken", lines[1])))
    other("import", str(path)).assert_fails(1, "Record 2 of")
    went_on = other("import", str(path), "--keep-going")
    assert went_on.code == 1
    assert all(words in went_on.err for words in ("Record 2", "Record 3", "2 records refused: the others are stored."))
    assert len(ids(other("search", "--json"))) == 12


def test_a_file_that_cannot_be_written_is_one_sentence(
    filled: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A folder that is missing; a disk that is full. It names what the user named, and leaves nothing."""

    def full(_descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "of the system")

    out = tmp_path / "out"
    filled("audit", "export", str(out / "e.csv")).assert_fails(1, f"There is no folder {out}: make it first.")
    out.mkdir()
    monkeypatch.setattr(os, "fsync", full)
    for name in ("e.csv", "e.jsonl", "e.parquet"):
        filled("audit", "export", str(out / name)).assert_fails(1, f"{out / name}: No space left", "make room")

    assert list(out.iterdir()) == []


def test_approvals_are_found_by_filters_and_tell_their_story(url: str, cli: Cli) -> None:
    first, second = ask(url, "r-1", caller_id="agent-1"), ask(url, "r-2", caller_id="agent-2")
    cli("approvals", "approve", first, "--approver", "carla", "--note", "go ahead")

    found = ("approvals", "list", "--json", "--caller", "agent-1", "--since", "1h", "--approver", "carla")
    assert ids(cli(*found, "--text", "AHEAD", "--tool", "delete_file")) == ["r-1"]
    assert ids(cli("approvals", "list", "--json", "--status", "approved", "--status", "PENDING")) == ["r-2", "r-1"]
    story = cli("approvals", "history", first, "--json").json["items"]
    steps = [(row["event"], row["by"]) for row in story if row["event"] != "notice"]
    assert steps == [("asked", "agent-1"), ("vote", "carla"), ("decided", "carla")]
    assert "asked" in cli("approvals", "history", second).out
    assert (cli("approvals", "history", "none").code, cli("approvals", "list", "--since", "soon").code) == (4, 2)
