"""From an event to the row that is stored: scrubbed, flagged, hashed."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from datetime import datetime
from typing import Any

from agent_gateway_store.models.audit import AuditEvent, RedactionFlag
from agent_gateway_store.models.columns import UTC_MAX, UTC_MIN
from agent_gateway_store.models.scrub import MAX_KEY_BYTES, Scrubber

__all__ = ["REUSED_LABEL", "UNSTORABLE", "content_hash", "event_row", "reused_row"]

UNSTORABLE = "UNSTORABLE"
REUSED_LABEL = "REQUEST_ID_REUSED"

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
_encode = json.JSONEncoder(sort_keys=True, separators=(",", ":"), ensure_ascii=False, check_circular=False).encode


def event_row(event: AuditEvent, *, org_id: str | None = None) -> dict[str, Any]:
    """Return the row for `event`, column name to value, with its `content_hash` and without `id`.

    The event itself is not changed. What no database can hold is replaced and noted in `redaction_flags`.

    Args:
        event: Any event that could be constructed.
        org_id: Organisation to stamp; None keeps the event's own.
    """
    row = {name: event.__dict__[name] for name in _COLUMNS}
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
    row["content_hash"] = content_hash(row)
    return row


_COLUMNS = tuple(name for name in AuditEvent.model_fields if name not in ("id", "content_hash"))


def _scrub_texts(row: dict[str, Any], scrubber: Scrubber) -> None:
    everything = "".join([text for name in (*_SHORT, *_LONG) if (text := row[name]) is not None])
    if len(everything) <= MAX_KEY_BYTES and everything.isascii() and "\0" not in everything:
        return
    for name in _SHORT:
        if row[name] is not None:
            row[name] = scrubber.text(name, row[name], limit=MAX_KEY_BYTES)
    for name in _LONG:
        if row[name] is not None:
            row[name] = scrubber.text(name, row[name])


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


def content_hash(row: Mapping[str, Any]) -> str:
    """Return the SHA-256 by which two events are the same one: 64 hex digits.

    It is taken over `json.dumps(document, sort_keys=True, separators=(",", ":"), ensure_ascii=False)` in UTF-8, where
    the document is `event.model_dump(mode="json", exclude={"id", "content_hash"})` of the stored event.
    """
    document = {name: row[name] for name in _COLUMNS}
    stamp: datetime = row["timestamp"]
    document["timestamp"] = stamp.isoformat()[:-6] + "Z"
    if document["redaction_flags"]:
        document["redaction_flags"] = [flag.__dict__ for flag in document["redaction_flags"]]
    return hashlib.sha256(_encode(document).encode()).hexdigest()


def reused_row(row: Mapping[str, Any]) -> dict[str, Any]:
    """Return `row` as it is kept when its request_id already belongs to another event.

    The id is derived from the content, so that the same event under the same used id gives the same row again.
    """
    kept = dict(row)
    digest = row["content_hash"]
    base = row["request_id"].encode()[: MAX_KEY_BYTES - len(digest) - 1].decode("utf-8", "ignore")
    kept["request_id"] = f"{base}~{digest}"
    kept["risk_labels"] = [*row["risk_labels"], REUSED_LABEL]
    kept["content_hash"] = content_hash(kept)
    return kept
