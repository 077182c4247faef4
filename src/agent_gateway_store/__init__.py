"""The system of record of an AI-agent tool gateway: audit log, human approvals, API keys.

Names are resolved on first use (PEP 562), so that `from agent_gateway_store import hookimpl` loads no ORM.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from agent_gateway_store import errors
    from agent_gateway_store.approval import ApprovalManager, ApprovalNotifier
    from agent_gateway_store.audit import AuditLogger, AuditQuery, WriteOutcome
    from agent_gateway_store.hooks import hookimpl
    from agent_gateway_store.models.approval import ApprovalRequest, ApprovalResult, ApprovalScope, ApprovalVote
    from agent_gateway_store.models.audit import AuditEvent, Decision, ExecutionStatus, OutputDecision, RedactionFlag
    from agent_gateway_store.models.delivery import NotificationDelivery
    from agent_gateway_store.models.keys import ApiKey, CallerIdentity, IssuedKey, TrustLevel
    from agent_gateway_store.models.values import ApprovalStatus, Notice, ToolCall
    from agent_gateway_store.results import Page, Stats
    from agent_gateway_store.settings import StoreSettings
    from agent_gateway_store.store import GatewayStore
    from agent_gateway_store.sync import SyncGatewayStore

_NAMES = {
    "approval": ("ApprovalManager", "ApprovalNotifier"),
    "audit": ("AuditLogger", "AuditQuery", "WriteOutcome"),
    "hooks": ("hookimpl",),
    "models.approval": ("ApprovalRequest", "ApprovalResult", "ApprovalScope", "ApprovalVote"),
    "models.audit": ("AuditEvent", "Decision", "ExecutionStatus", "OutputDecision", "RedactionFlag"),
    "models.delivery": ("NotificationDelivery",),
    "models.keys": ("ApiKey", "CallerIdentity", "IssuedKey", "TrustLevel"),
    "models.values": ("ApprovalStatus", "Notice", "ToolCall"),
    "results": ("Page", "Stats"),
    "settings": ("StoreSettings",),
    "store": ("GatewayStore",),
    "sync": ("SyncGatewayStore",),
}
_MODULES = {name: module for module, names in _NAMES.items() for name in names}

__all__ = [
    "ApiKey",
    "ApprovalManager",
    "ApprovalNotifier",
    "ApprovalRequest",
    "ApprovalResult",
    "ApprovalScope",
    "ApprovalStatus",
    "ApprovalVote",
    "AuditEvent",
    "AuditLogger",
    "AuditQuery",
    "CallerIdentity",
    "Decision",
    "ExecutionStatus",
    "GatewayStore",
    "IssuedKey",
    "Notice",
    "NotificationDelivery",
    "OutputDecision",
    "Page",
    "RedactionFlag",
    "Stats",
    "StoreSettings",
    "SyncGatewayStore",
    "ToolCall",
    "TrustLevel",
    "WriteOutcome",
    "errors",
    "hookimpl",
]


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        return version("agent-gateway-store")
    if name == "errors":
        return import_module("agent_gateway_store.errors")
    if (module := _MODULES.get(name)) is None:
        raise AttributeError(f"module 'agent_gateway_store' has no attribute {name!r}")
    value = getattr(import_module(f"agent_gateway_store.{module}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
