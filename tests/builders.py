"""Records that tests write: valid as they are, any field can be given."""

from __future__ import annotations

from typing import Any
from uuid import uuid4

from agent_gateway_store.models.audit import AuditEvent

__all__ = ["event_fields", "make_event"]

_HASHED = AuditEvent.hash_args({"path": "/etc/hosts"})


def event_fields(**fields: Any) -> dict[str, Any]:
    """Return the fields of an audit event; `request_id` is fresh unless given."""
    return {
        "request_id": uuid4().hex,
        "caller_id": "dev-agent",
        "caller_role": "developer",
        "environment": "dev",
        "mcp_server": "files",
        "tool_name": "read_file",
        "raw_args_hash": _HASHED,
        "sanitized_args": {"path": "/etc/hosts"},
        "risk_score": 0.1,
        "matched_policy_rule": "allow-reads",
        "decision": "ALLOW",
        "latency_ms": 12,
        "deterministic_rationale": "reads are allowed",
    } | fields


def make_event(**fields: Any) -> AuditEvent:
    """Build an audit event of these fields."""
    return AuditEvent(**event_fields(**fields))
