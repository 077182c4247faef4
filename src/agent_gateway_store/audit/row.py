"""From an event to the row that is stored: scrubbed, flagged, hashed. The hot path of every write."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from datetime import datetime
from typing import Any

from agent_gateway_store.models.audit import AuditEvent, RedactionFlag
from agent_gateway_store.models.columns import UTC_MAX, UTC_MIN
from agent_gateway_store.models.scrub import MAX_KEY_BYTES, Scrubber

__all__ = ["COLUMNS", "REUSED_LABEL", "UNSTORABLE", "EventRow", "event_row"]

UNSTORABLE = "UNSTORABLE"
REUSED_LABEL = "REQUEST_ID_REUSED"

COLUMNS = tuple(name for name in AuditEvent.model_fields if name != "id")
"""The columns of a row, in the order of `EventRow.record`."""

_SHORT = (
    "request_id",
    "org_id",
    "trace_id",
    "session_id",
    "parent_request_id",
    "caller_id",
    "key_id",
    "environment",
    "mcp_server",
    "tool_name",
    "approver_id",
)
_LONG = (
    "caller_role",
    "matched_policy_rule",
    "policy_version",
    "output_hash",
    "output_policy_rationale",
    "llm_explanation",
    "deterministic_rationale",
)
_LARGEST_BIGINT = 2**63 - 1

_text = json.encoder.encode_basestring
# What `JSONEncoder.encode` makes anew at each call, made once; absent on other interpreters than CPython.
_make_encoder: Any = getattr(json.encoder, "c_make_encoder", None)
_chunks = _make_encoder and _make_encoder(None, str, _text, None, ":", ",", True, False, True)
_encoder = json.JSONEncoder(sort_keys=True, separators=(",", ":"), ensure_ascii=False, check_circular=False)


def _encode(value: Any) -> str:
    return "".join(_chunks(value, 0)) if _chunks else _encoder.encode(value)


class EventRow:
    """One event as it is stored.

    Attributes:
        values: Column name to value, as the column types take it, with `content_hash`, without `id`.
        chars: About how much memory it takes.
    """

    __slots__ = ("_args_json", "_flags_json", "_labels_json", "chars", "values")

    def __init__(self, values: dict[str, Any]) -> None:
        self.values = values
        labels, flags = values["risk_labels"], values["redaction_flags"]
        self._args_json = _encode(values["sanitized_args"])
        self._labels_json = _encode(labels) if labels else "[]"
        self._flags_json = _encode([flag.__dict__ for flag in flags]) if flags else "[]"
        self.chars = len(self._args_json)

    @property
    def key(self) -> tuple[str, str]:
        """What must be unique: request_id and org_id."""
        return self.values["request_id"], self.values["org_id"]

    @property
    def content_hash(self) -> str:
        """By which two events are the same one."""
        return self.values["content_hash"]  # type: ignore[no-any-return]

    def record(self) -> tuple[Any, ...]:
        """Return the values in the order of `COLUMNS`, JSON as text: what a driver takes without further ado."""
        values = self.values.copy()
        values["sanitized_args"] = self._args_json
        values["risk_labels"] = self._labels_json
        values["redaction_flags"] = self._flags_json
        return tuple(values.values())

    def seal(self) -> None:
        """Set `content_hash`: SHA-256 (64 hex digits) of the canonical event.

        It is taken over `json.dumps(document, sort_keys=True, separators=(",", ":"), ensure_ascii=False)` in UTF-8,
        where the document is `event.model_dump(mode="json", exclude={"id", "content_hash"})` of the stored event.
        Written out field by field here, because this is most of the cost of a write.
        """
        row = self.values
        stamp: datetime = row["timestamp"]
        document = (
            f'{{"approver_id":{_optional(row["approver_id"])}'
            f',"caller_id":{_text(row["caller_id"])}'
            f',"caller_role":{_text(row["caller_role"])}'
            f',"decision":"{row["decision"].value}"'
            f',"deterministic_rationale":{_text(row["deterministic_rationale"])}'
            f',"environment":{_text(row["environment"])}'
            f',"execution_status":{_optional(row["execution_status"])}'
            f',"key_id":{_optional(row["key_id"])}'
            f',"latency_ms":{row["latency_ms"]:d}'
            f',"llm_explanation":{_optional(row["llm_explanation"])}'
            f',"matched_policy_rule":{_text(row["matched_policy_rule"])}'
            f',"mcp_server":{_text(row["mcp_server"])}'
            f',"org_id":{_text(row["org_id"])}'
            f',"output_decision":"{row["output_decision"].value}"'
            f',"output_hash":{_optional(row["output_hash"])}'
            f',"output_policy_rationale":{_optional(row["output_policy_rationale"])}'
            f',"parent_request_id":{_optional(row["parent_request_id"])}'
            f',"policy_version":{_optional(row["policy_version"])}'
            f',"raw_args_hash":{_text(row["raw_args_hash"])}'
            f',"redaction_flags":{self._flags_json}'
            f',"request_id":{_text(row["request_id"])}'
            f',"risk_labels":{self._labels_json}'
            f',"risk_score":{float.__repr__(row["risk_score"])}'
            f',"sanitized_args":{self._args_json}'
            f',"session_id":{_optional(row["session_id"])}'
            f',"timestamp":"{stamp.isoformat()[:-6]}Z"'
            f',"tool_name":{_text(row["tool_name"])}'
            f',"trace_id":{_optional(row["trace_id"])}}}'
        )
        self.chars = len(document)
        row["content_hash"] = hashlib.sha256(document.encode()).hexdigest()

    @classmethod
    def restored(cls, values: dict[str, Any]) -> EventRow:
        """Return a row that was stored elsewhere before, as it was."""
        return cls({name: values[name] for name in COLUMNS})

    def under_derived_id(self) -> EventRow:
        """Return the row as it is kept when its request_id belongs to another event already.

        The id is derived from the content, so that the same event under the same used id gives the same row again.
        """
        values = dict(self.values)
        base = values["request_id"].encode()[: MAX_KEY_BYTES - len(self.content_hash) - 1].decode("utf-8", "ignore")
        values["request_id"] = f"{base}~{self.content_hash}"
        if REUSED_LABEL not in values["risk_labels"]:
            values["risk_labels"] = [*values["risk_labels"], REUSED_LABEL]
        row = EventRow(values)
        row.seal()
        return row


def _optional(text: str | None) -> str:
    return "null" if text is None else _text(text)


def event_row(event: AuditEvent, *, org_id: str | None = None) -> EventRow:
    """Return the row for `event`, which itself is not changed.

    What no database can hold is replaced and noted in `redaction_flags`.

    Args:
        event: Any event that could be constructed.
        org_id: Organisation to stamp; None keeps the event's own.
    """
    given: Mapping[str, Any] = event.__dict__
    row = {name: given[name] for name in COLUMNS}
    if org_id is not None:
        row["org_id"] = org_id
    scrubber = Scrubber()
    _scrub_texts(row, scrubber)
    row["sanitized_args"] = scrubber.json("sanitized_args", row["sanitized_args"])
    if row["risk_labels"]:
        row["risk_labels"] = scrubber.json("risk_labels", row["risk_labels"])
    row["risk_score"] = scrubber.number("risk_score", row["risk_score"])
    if row["latency_ms"] > _LARGEST_BIGINT:
        row["latency_ms"] = _LARGEST_BIGINT
        scrubber.report("latency_ms")
    if row["timestamp"] in (UTC_MIN, UTC_MAX):
        scrubber.report("timestamp")
    if row["redaction_flags"] or scrubber.replaced:
        row["redaction_flags"] = _flags(row["redaction_flags"], scrubber)
    sealed = EventRow(row)
    sealed.seal()
    return sealed


def _scrub_texts(row: dict[str, Any], scrubber: Scrubber) -> None:
    everything = "".join([text for name in _SHORT_AND_LONG if (text := row[name]) is not None])
    if len(everything) <= MAX_KEY_BYTES and everything.isascii() and "\0" not in everything:
        return
    for name in _SHORT:
        if row[name] is not None:
            row[name] = scrubber.text(name, row[name], limit=MAX_KEY_BYTES)
    for name in _LONG:
        if row[name] is not None:
            row[name] = scrubber.text(name, row[name])


_SHORT_AND_LONG = (*_SHORT, *_LONG)


def _flags(given: list[RedactionFlag], scrubber: Scrubber) -> list[RedactionFlag]:
    kept = [
        RedactionFlag.model_construct(
            field=scrubber.text(f"redaction_flags[{index}]", flag.field),
            reason=scrubber.text(f"redaction_flags[{index}]", flag.reason),
            original_hash=flag.original_hash
            and scrubber.text(f"redaction_flags[{index}]", flag.original_hash, limit=MAX_KEY_BYTES),
        )
        for index, flag in enumerate(given)
    ]
    return kept + [
        RedactionFlag.model_construct(field=place, reason=UNSTORABLE, original_hash=digest)
        for place, digest in scrubber.replaced
    ]
