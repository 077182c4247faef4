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

_MODULES = {
    "ApiKey": "models.keys",
    "ApprovalManager": "approval",
    "ApprovalNotifier": "approval",
    "ApprovalRequest": "models.approval",
    "ApprovalResult": "models.approval",
    "ApprovalScope": "models.approval",
    "ApprovalStatus": "models.values",
    "ApprovalVote": "models.approval",
    "AuditEvent": "models.audit",
    "AuditLogger": "audit",
    "AuditQuery": "audit",
    "CallerIdentity": "models.keys",
    "Decision": "models.audit",
    "ExecutionStatus": "models.audit",
    "GatewayStore": "store",
    "IssuedKey": "models.keys",
    "NotificationDelivery": "models.delivery",
    "Notice": "models.values",
    "OutputDecision": "models.audit",
    "Page": "results",
    "RedactionFlag": "models.audit",
    "Stats": "results",
    "StoreSettings": "settings",
    "SyncGatewayStore": "sync",
    "ToolCall": "models.values",
    "TrustLevel": "models.keys",
    "WriteOutcome": "audit",
    "hookimpl": "hooks",
}

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
