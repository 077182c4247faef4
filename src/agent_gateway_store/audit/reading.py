"""From the rows that a driver gives to events. Rows of our own database need no second validation."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from datetime import UTC, datetime
from typing import Any

from agent_gateway_store.audit.selects import FIELDS
from agent_gateway_store.models.audit import AuditEvent, Decision, ExecutionStatus, OutputDecision, RedactionFlag

__all__ = ["events_of"]

_scan: Callable[[str, int], tuple[Any, int]] = vars(json.JSONDecoder())["scan_once"]
_DECISIONS = {str(each): each for each in Decision}
_STATUSES: dict[str | None, ExecutionStatus | None] = {None: None} | {str(each): each for each in ExecutionStatus}
_OUTPUTS = {str(each): each for each in OutputDecision}


def events_of(rows: Iterable[Sequence[Any]]) -> list[AuditEvent]:
    """Return the events of rows that hold `FIELDS`: detached, equal to those that were validated."""
    return list(map(_event, rows))


def _event(row: Sequence[Any]) -> AuditEvent:
    values = dict(zip(FIELDS, row, strict=True))
    stamp = values["timestamp"]
    if type(stamp) is str:
        values["timestamp"] = datetime.fromisoformat(stamp).replace(tzinfo=UTC)
    values["decision"] = _DECISIONS[values["decision"]]
    values["execution_status"] = _STATUSES[values["execution_status"]]
    values["output_decision"] = _OUTPUTS[values["output_decision"]]
    values["sanitized_args"] = _scan(values["sanitized_args"], 0)[0]
    values["risk_labels"] = _scan(values["risk_labels"], 0)[0]
    flags = values["redaction_flags"]
    values["redaction_flags"] = [] if flags == "[]" else [RedactionFlag(**flag) for flag in _scan(flags, 0)[0]]
    return AuditEvent.from_row(values)
