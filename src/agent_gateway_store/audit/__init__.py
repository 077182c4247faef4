"""The audit log: write events, find them again."""

from agent_gateway_store.audit.manager import AuditManager
from agent_gateway_store.audit.outcomes import AuditCounters, WriteOutcome
from agent_gateway_store.audit.query import AuditQuery
from agent_gateway_store.audit.writes import AuditLogger

__all__ = ["AuditCounters", "AuditLogger", "AuditManager", "AuditQuery", "WriteOutcome"]
