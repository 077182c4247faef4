"""Events of about 500 bytes, as a gateway writes them."""

from __future__ import annotations

from collections.abc import Iterator
from uuid import uuid4

from agent_gateway_store import AuditEvent

HASH = "0f" * 32
RATIONALE = "rule allow-reads matched: tool read_file of server files is allowed for role developer"


def event(number: int) -> AuditEvent:
    """Return one event; `number` spreads callers and tools."""
    return AuditEvent(**fields(number))


def fields(number: int) -> dict[str, object]:
    """Return the fields of one event."""
    return {
        "request_id": uuid4().hex,
        "trace_id": HASH[:32],
        "session_id": f"session-{number % 100}",
        "caller_id": f"agent-{number % 50}",
        "caller_role": "developer",
        "key_id": "0123456789ab",
        "environment": "prod",
        "mcp_server": "files",
        "tool_name": f"tool_{number % 20}",
        "raw_args_hash": HASH,
        "sanitized_args": {"path": "/srv/data/report.csv", "lines": number % 1000, "encoding": "utf-8"},
        "risk_labels": ["READ"],
        "risk_score": 0.25,
        "matched_policy_rule": "allow-reads",
        "decision": "ALLOW",
        "execution_status": "SUCCESS",
        "latency_ms": number % 300,
        "output_hash": HASH,
        "deterministic_rationale": RATIONALE,
    }


def events(count: int) -> Iterator[AuditEvent]:
    """Yield `count` events, one at a time."""
    return map(event, range(count))
