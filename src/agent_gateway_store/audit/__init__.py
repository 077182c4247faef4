"""The audit log: write events, find them again."""

from agent_gateway_store.audit.log import AuditLog, AuditLogger, WriteOutcome
from agent_gateway_store.audit.query import AuditQuery

__all__ = ["AuditLog", "AuditLogger", "AuditQuery", "WriteOutcome"]
