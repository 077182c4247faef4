"""What the commands stand on: output, exit codes, the parsing of options."""

from __future__ import annotations

import json
from typing import Any
from uuid import uuid4

import pytest
import typer
from typer.main import get_command

from agent_gateway_store import Page, TrustLevel, errors
from agent_gateway_store.approval.filters import ApprovalFilters
from agent_gateway_store.audit.filters import Filters
from agent_gateway_store.cli import approvals, audit
from agent_gateway_store.cli.context import choose, duration
from agent_gateway_store.cli.errors import CommandError, ExitCode, explain
from agent_gateway_store.cli.output import field_text, print_fields, print_page, say, to_json
from agent_gateway_store.console.audit import FILTERS

pytestmark = pytest.mark.unit


def test_every_error_has_its_exit_code() -> None:
    for error, code in (
        (errors.GatewayStoreError("x"), 1),
        (errors.ApprovalAlreadyDecidedError("x"), 1),
        (errors.ApprovalNotFoundError(), 4),
        (errors.ApprovalExpiredError("x"), 4),
        (errors.ApiKeyNotFoundError("x"), 4),
        (errors.ApiKeyExistsError("x"), 1),
        (errors.InvalidApiKeyError(), 1),
        (errors.SchemaOutOfDateError("x"), 1),
        (errors.StoreUnavailableError("x"), 5),
        (errors.AuditUnavailableError("x"), 5),
        (errors.MissingExtraError("x", extra="slack"), 1),
        (errors.InvalidUrlError("x"), 2),
        (errors.InvalidCursorError("x"), 2),
        (CommandError("x", ExitCode.UNAVAILABLE), 5),
        (RuntimeError("x"), 1),
    ):
        sentence, found = explain(error)
        assert (found, bool(sentence)) == (code, True), error


def test_a_sentence_shows_no_secret() -> None:
    token = "aB3" + "x" * 40

    for error in (errors.GatewayStoreError(f"no {token}"), RuntimeError(f"{token} postgresql://u:hunter2@h/d")):
        sentence, _ = explain(error)

        assert token not in sentence
        assert "hunter2" not in sentence


def test_people_read_tidied_values() -> None:
    """Times to the second, levels by name, tool calls as one line; programs read JSON in printable ASCII."""
    call = {"server": "files", "tool": "read", "arguments": {"n": 1, "p": "a b"}}
    for name, value, text in (
        ("created_at", "2026-01-02T03:04:05.678901Z", "2026-01-02 03:04:05"),
        ("trust_level", 2, "MEDIUM"),
        ("is_active", True, "yes"),
        ("approver_id", None, ""),
        ("risk_labels", ["PII", "EXPORT"], "PII, EXPORT"),
        ("tool_call", call, 'files.read n=1 p="a b"'),
        ("tool_call", call | {"arguments": {}}, "files.read"),
        ("output_payload", {"rows": [1, 2]}, "rows=[1, 2]"),
        ("latency_ms", 12, "12"),
    ):
        assert field_text(name, value) == text
    value = {"a": "\x00\x1b\x7f\x9b\u2028é\ud800"}
    text = to_json(value)
    assert (text.isascii(), text.isprintable(), json.loads(text)) == (True, True, value)


def _print(capsys: pytest.CaptureFixture[str], rows: list[dict[str, Any]], **options: Any) -> tuple[str, str]:
    columns = {"approval_id": "approval id", "caller_id": "caller", "note": "note", "approver_id": "approver"}
    options = {"whole": {"approval_id"}, "optional": {"approver_id"}, "as_json": False} | options
    print_page(Page(rows, next_cursor="more"), columns=columns, **options)
    captured = capsys.readouterr()
    return captured.out, captured.err


def test_a_narrow_terminal_keeps_ids_whole(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """An id that is broken over lines cannot be copied; what is left out is named; a pipe has room for whole rows."""
    row = {"approval_id": str(uuid4()), "caller_id": "dev-agent", "note": "long " * 12, "approver_id": "ann"}

    monkeypatch.setenv("COLUMNS", "80")
    out, err = _print(capsys, [row])
    assert row["approval_id"] in out
    assert max(map(len, out.splitlines())) <= 80
    assert "ann" not in out
    assert "approver" in err
    assert "--cursor more" in err
    out, _ = _print(capsys, [row | {"approval_id": "x" * 100, "note": ""}])
    assert (out.count("x"), "dev-agent" in out) == (100, True)

    monkeypatch.setenv("COLUMNS", "1")
    out, _ = _print(capsys, [row])
    assert row["approval_id"] in "".join(out.split())

    monkeypatch.delenv("COLUMNS")
    out, _ = _print(capsys, [row])
    assert any(all(text.strip() in line for text in row.values()) for line in out.splitlines())


def test_lines_and_fields_carry_no_control_bytes(capsys: pytest.CaptureFixture[str]) -> None:
    say("a\x1b[31m\nb")
    print_fields({"na\x07me": "va\rlue", "x": None})

    assert capsys.readouterr().out == "a\\x1b[31m\\nb\nna\\x07me  va\\rlue\nx\n"


def test_a_duration_is_a_number_with_a_unit() -> None:
    units = {"90s": 90, "15M": 900, " 24h ": 86400, "30d": 2592000, "2w": 1209600, "0s": 0}
    assert {text: duration(text, "--overlap").total_seconds() for text in units} == units
    for text in ("", "soon", "-1h", "1", "1y", "1.5h", "9999999d", "\u0661h"):
        with pytest.raises(typer.BadParameter, match="--overlap"):
            duration(text, "--overlap")
    assert choose(TrustLevel, "medium", "--trust-level") is TrustLevel.MEDIUM
    with pytest.raises(typer.BadParameter, match="UNTRUSTED, LOW, MEDIUM, HIGH, ADMIN"):
        choose(TrustLevel, "god", "--trust-level")


def test_the_command_line_and_the_console_take_each_filter() -> None:
    search, listing = (
        {each.name for each in get_command(group).commands[name].params}  # type: ignore[attr-defined]
        for group, name in ((audit.app, "search"), (approvals.app, "list"))
    )

    assert Filters.__annotations__.keys() <= search
    assert Filters.__annotations__.keys() == set(FILTERS)
    assert ApprovalFilters.__annotations__.keys() <= listing
