"""Records that tests write: valid as they are, any field can be given."""

from __future__ import annotations

import hashlib
import json
from typing import Any
from uuid import uuid4

from agent_gateway_store import ApiKey, ApprovalRequest, AuditEvent, CallerIdentity, ToolCall, TrustLevel

__all__ = ["CALL", "CALLER", "event_fields", "make_event", "make_key", "make_request", "rehash"]

CALL = ToolCall(server="files", tool="delete_file", arguments={"path": "/tmp/report.txt"})
CALLER = CallerIdentity(
    caller_id="dev-agent",
    role="developer",
    trust_level=TrustLevel.MEDIUM,
    environment="staging",
    org_id="acme",
    key_id="k1",
)

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


def make_request(**fields: Any) -> ApprovalRequest:
    """Build a request; every field can be given, `request_id` is fresh unless given."""
    defaults: dict[str, Any] = {
        "request_id": uuid4().hex,
        "caller_id": "dev-agent",
        "tool_call": CALL.model_copy(deep=True),
        "risk_explanation": "deletes a file",
    }
    return ApprovalRequest(**(defaults | fields))


def make_key(**fields: Any) -> ApiKey:
    """Build the row of an API key."""
    defaults: dict[str, Any] = {
        "key_id": "k1",
        "caller_id": "dev-agent",
        "key_hash": "$2b$10$hash",
        "role": "developer",
        "trust_level": 2,
        "environment": "dev",
    }
    return ApiKey(**(defaults | fields))


def rehash(event: AuditEvent) -> str:
    """Anybody's way to the hash of a stored event, as the documentation gives it."""
    document = event.model_dump(mode="json", exclude={"id", "content_hash"})
    document = {name: value for name, value in document.items() if value or name not in ("approval_id", "extra")}
    text = json.dumps(document, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()
