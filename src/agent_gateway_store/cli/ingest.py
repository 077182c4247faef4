"""Audit events from JSON lines."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, NamedTuple

import typer

from agent_gateway_store.cli.context import new_store
from agent_gateway_store.cli.errors import CommandError, ExitCode, spell_validation
from agent_gateway_store.cli.output import complain

if TYPE_CHECKING:
    from agent_gateway_store.models.audit import AuditEvent

__all__ = ["Line", "ingest"]

INVALID = "INVALID"


class Line(NamedTuple):
    """What became of one line.

    Attributes:
        line: Its number, from 1.
        outcome: A `WriteOutcome`, or INVALID.
        request_id: Of its event; None where there is none.
        error: Why it is INVALID.
    """

    line: int
    outcome: str
    request_id: str | None = None
    error: str | None = None


def ingest(ctx: typer.Context, lines: Iterable[bytes], report: Callable[[Line], None]) -> None:
    """Write an event for each line that holds one, and report every line; blank lines are skipped.

    Raises:
        CommandError: At the end, if a line was malformed or an event was lost.
    """
    from anyio.from_thread import start_blocking_portal

    counts = {INVALID: 0, "LOST": 0, "SPOOLED": 0}
    # The main thread waits for input and takes Ctrl-C, while the store's loop runs in a thread of its own.
    with start_blocking_portal() as portal:
        store = new_store(ctx)
        try:
            portal.call(store.open)
            for number, text in enumerate(lines, start=1):
                if text.strip():
                    line = _take(number, text, lambda event: portal.call(store.audit.write, event))
                    counts[line.outcome] = counts.get(line.outcome, 0) + 1
                    report(line)
        finally:
            portal.call(store.close)
    if counts["SPOOLED"]:
        complain(f"{_count(counts['SPOOLED'], 'event')} kept in the local spool until the database is back.")
    if counts["LOST"]:
        raise CommandError(
            f"{_count(counts['LOST'], 'event')} could not be stored: check the database with `gateway-store doctor`.",
            ExitCode.UNAVAILABLE,
        )
    if counts[INVALID]:
        raise CommandError(f"{_count(counts[INVALID], 'malformed line')}: correct and write again; the rest is stored.")


def _take(number: int, text: bytes, write: Callable[[AuditEvent], str]) -> Line:
    event, fault = _parse(text)
    if event is None:
        complain(f"Line {number} is malformed: {fault}.")
        return Line(number, INVALID, error=fault)
    return Line(number, str(write(event)), event.request_id)


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


def _parse(text: bytes) -> tuple[AuditEvent | None, str]:
    from pydantic import ValidationError

    from agent_gateway_store.models.audit import AuditEvent

    try:
        fields: Any = json.loads(text)
    except RecursionError:
        return None, "nested too deeply"
    except ValueError:
        return None, "not JSON"
    if not isinstance(fields, dict):
        return None, "not a JSON object"
    try:
        return AuditEvent(**fields), ""
    except ValidationError as exc:
        return None, spell_validation(exc)
