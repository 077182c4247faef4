"""What is left of an event and of an approval that were erased, and of what arrives later under the event's id."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from agent_gateway_store.audit.document import hash_of_stored
from agent_gateway_store.audit.record import REUSED_LABEL, EncodedRow, encode_event, to_values
from agent_gateway_store.audit.selects import FIELDS
from agent_gateway_store.models.approval import BLANK_HASH, ERASED
from agent_gateway_store.models.audit import AuditEvent, RedactionFlag

BLANK: dict[str, Any] = {
    "raw_args_hash": BLANK_HASH,
    "sanitized_args": {},
    "risk_labels": [],
    "output_hash": None,
    "output_policy_rationale": None,
    "redaction_flags": [RedactionFlag(field="*", reason="ERASED")],
    "llm_explanation": None,
    "deterministic_rationale": ERASED,
    "extra": {},
}
"""Arguments, labels, free texts, and hashes of content. Besides these go `content_hash` and the salt of the leaf."""

BLANK_TEXTS = BLANK | {
    "sanitized_args": "{}",
    "risk_labels": "[]",
    "redaction_flags": '[{"field":"*","original_hash":null,"reason":"ERASED"}]',
    "extra": "{}",
}
"""The same as the drivers give it."""

BLANK_APPROVAL: dict[str, Any] = {
    "tool_call_hash": BLANK_HASH,
    "risk_explanation": ERASED,
    "output_payload": None,
    "output_hash": None,
    "approver_note": "",
}
"""Besides these go the arguments of the call, the outcome, and the notes of the votes."""

IS_ERASED = (
    f"((content_hash IS NULL AND deterministic_rationale = '{ERASED}')"
    " OR (mcp_server = 'gateway-store' AND tool_name = 'audit.erase' AND caller_role = 'operator'"
    " AND matched_policy_rule = '' AND decision = 'ALLOW' AND execution_status = 'SUCCESS'))"
)
"""SQL: the id of this row is that of an erased event. The second, by the fields of `doors.DOOR_FIELDS`, holds it where
the event is in an archive."""

_DERIVED = re.compile(r"~[0-9a-f]{64}\Z")


def _blank_id(row: Mapping[str, Any]) -> str:
    """Return the id under which an erased event stands: its own, or one without the hash of what it was.

    Only an id of `with_derived_id` holds that, and a label says so: long ids look the same, and callers choose any.
    """
    request_id: str = row["request_id"]
    try:
        # Nobody can tell from the hash: that of an event from another organisation, or from before a hook, is another.
        if REUSED_LABEL in json.loads(row["risk_labels"]):
            return _DERIVED.sub(f"~erased-{row['position']}", request_id)
    except Exception:  # noqa: S110
        # A database can be made to hold what is not an event: every error means the same.
        pass
    return request_id


def blank_row(row: Mapping[str, Any]) -> dict[str, Any]:
    """Return what is left of an event with its position, as the drivers give it."""
    return {**row, **BLANK_TEXTS, "request_id": _blank_id(row), "content_hash": None, "salt": None}


def blank_hash(row: Mapping[str, Any]) -> str:
    """Return the hash of what is left of an event, by which the log names it."""
    blank = blank_row(row)
    return hash_of_stored([blank[name] for name in FIELDS[1:]])


def blanked(row: EncodedRow) -> EncodedRow:
    """Return a row that arrived after an event under its id was erased: it is kept blanked, with a hash of that."""
    return encode_event(AuditEvent(**to_values(row) | BLANK))
