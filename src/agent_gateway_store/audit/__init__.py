"""The audit log: write events, find them again."""

from agent_gateway_store.audit.log import AuditLog, AuditLogger
from agent_gateway_store.audit.outcomes import AuditCounters, WriteOutcome
from agent_gateway_store.audit.query import AuditQuery

__all__ = ["AuditCounters", "AuditLog", "AuditLogger", "AuditQuery", "WriteOutcome"]
