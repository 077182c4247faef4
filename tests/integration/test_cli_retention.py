"""`gateway-store retention` and what `doctor` says of it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from builders import event_fields
from commands import gateway_store

OLD = {"request_id": "old", "timestamp": "2025-03-01T12:00:00Z"}


@pytest.fixture
def url(migrated_postgres_database: Callable[[], str]) -> str:
    """A database with an old event and one of today."""
    made = migrated_postgres_database()
    lines = [json.dumps(event_fields(**fields)) for fields in (OLD, {"request_id": "new"})]
    gateway_store("--database-url", made, "audit", "write", input="\n".join(lines))
    return made


def test_commands_answer_in_json_and_doctor_tells_what_they_did(url: str, tmp_path: Path) -> None:
    """Prune, hold, find, erase, release; then how the last prune ended, what is held, and how the log grows."""

    def retention(*arguments: str) -> dict[str, object]:
        found: dict[str, object] = gateway_store("--database-url", url, "retention", *arguments, "--json").json
        return found

    archive = str(tmp_path / "a")
    hold = retention("hold", "case", "--caller", "someone", "--reason", "r", "--by", "counsel")
    pruned = retention("prune", "--before", "400d", "--archive", archive, "--by", "ops")
    found = retention("find", "--caller", "dev-agent", "--archive", archive)
    doctor = gateway_store("--database-url", url, "doctor", "--json").json["retention"]
    erased = retention("erase", "old", "--reason", "r", "--by", "dpo", "--archive", archive)
    listed = retention("holds")
    released = retention("release", "case", "--by", "counsel")
    approvals = retention("prune-approvals", "--before", "400d", "--discard", "--by", "ops")

    assert (hold["name"], released["name"]) == ("case", "case")
    assert listed["items"] == [hold]
    assert pruned == {"events": 1, "files": 1, "held": 0, "remaining": 0}
    assert [item["request_id"] for item in found["items"]] == ["new", "old"]  # type: ignore[attr-defined]
    assert (erased["position"], erased["archived"]) == (0, True)
    assert approvals["approvals"] == 0
    assert (doctor["holds"], doctor["held_events"], doctor["events"]) == (["case"], 0, 3)
    assert doctor["last_prune"].endswith("by ops, 1 events: done")
    assert doctor["bytes"] > 0
    assert doctor["bytes_per_day"] > 0
    verified = gateway_store("--database-url", url, "evidence", "verify", "--archive", archive, "--json").json
    assert (verified["ok"], verified["erased"], verified["archived"]) == (True, 1, 1)


def test_what_cannot_be_done_is_one_sentence_and_an_exit_code() -> None:
    gateway_store("audit", "write", input=json.dumps(event_fields(**OLD)))
    gateway_store("retention", "hold", "all", "--reason", "r", "--by", "c")
    for arguments, code, words in (
        ("prune --before 400d --by ops", 2, "--discard"),
        ("prune --before 30d --by ops --discard", 2, "--below-floor"),
        ("prune --before soon --by ops --discard", 2, "before must be a time"),
        ("release case --by ops", 4, "There is no hold"),
        ("erase never-was --reason r --by dpo", 4, "never-was"),
        ("erase old --reason r --by dpo", 7, "held by 'all'"),
        ("prune --before 400d --by ops --archive /dev/null/a", 1, "/dev/null/a"),
    ):
        gateway_store("retention", *arguments.split()).assert_fails(code, words)

    assert len(gateway_store("audit", "search", "--caller", "dev-agent", "--json").json["items"]) == 1
