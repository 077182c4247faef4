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
    from agent_gateway_store.models import (
        ApiKey,
        ApprovalRequest,
        ApprovalResult,
        ApprovalScope,
        ApprovalStatus,
        ApprovalVote,
        AuditEvent,
        CallerIdentity,
        Decision,
        ExecutionStatus,
        IssuedKey,
        Notice,
        NotificationDelivery,
        OutputDecision,
        RedactionFlag,
        ToolCall,
        TrustLevel,
    )
    from agent_gateway_store.results import Page, Stats
    from agent_gateway_store.settings import StoreSettings
    from agent_gateway_store.store import GatewayStore
    from agent_gateway_store.sync import SyncGatewayStore

_HOMES = {
    "ApiKey": "models",
    "ApprovalManager": "approval",
    "ApprovalNotifier": "approval",
    "ApprovalRequest": "models",
    "ApprovalResult": "models",
    "ApprovalScope": "models",
    "ApprovalStatus": "models",
    "ApprovalVote": "models",
    "AuditEvent": "models",
    "AuditLogger": "audit",
    "AuditQuery": "audit",
    "CallerIdentity": "models",
    "Decision": "models",
    "ExecutionStatus": "models",
    "GatewayStore": "store",
    "IssuedKey": "models",
    "NotificationDelivery": "models",
    "Notice": "models",
    "OutputDecision": "models",
    "Page": "results",
    "RedactionFlag": "models",
    "Stats": "results",
    "StoreSettings": "settings",
    "SyncGatewayStore": "sync",
    "ToolCall": "models",
    "TrustLevel": "models",
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
    if (home := _HOMES.get(name)) is None:
        raise AttributeError(f"module 'agent_gateway_store' has no attribute {name!r}")
    value = getattr(import_module(f"agent_gateway_store.{home}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
