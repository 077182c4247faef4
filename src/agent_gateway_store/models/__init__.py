"""Tables and values. No I/O. Names are resolved on first use, so that the values load no ORM."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from agent_gateway_store.models.approval import ApprovalRequest, ApprovalResult, ApprovalScope, ApprovalVote
    from agent_gateway_store.models.audit import AuditEvent, Decision, ExecutionStatus, OutputDecision, RedactionFlag
    from agent_gateway_store.models.base import StoreModel, metadata
    from agent_gateway_store.models.delivery import DeliveryStatus, NotificationDelivery
    from agent_gateway_store.models.identity import ApiKey, CallerIdentity, IssuedKey, TrustLevel
    from agent_gateway_store.models.values import ApprovalStatus, Notice, PendingApproval, ToolCall

_HOMES = {
    "ApiKey": "identity",
    "ApprovalRequest": "approval",
    "ApprovalResult": "approval",
    "ApprovalScope": "approval",
    "ApprovalStatus": "values",
    "ApprovalVote": "approval",
    "AuditEvent": "audit",
    "CallerIdentity": "identity",
    "Decision": "audit",
    "DeliveryStatus": "delivery",
    "ExecutionStatus": "audit",
    "IssuedKey": "identity",
    "NotificationDelivery": "delivery",
    "Notice": "values",
    "OutputDecision": "audit",
    "PendingApproval": "values",
    "RedactionFlag": "audit",
    "StoreModel": "base",
    "ToolCall": "values",
    "TrustLevel": "identity",
    "metadata": "base",
}

__all__ = [
    "ApiKey",
    "ApprovalRequest",
    "ApprovalResult",
    "ApprovalScope",
    "ApprovalStatus",
    "ApprovalVote",
    "AuditEvent",
    "CallerIdentity",
    "Decision",
    "DeliveryStatus",
    "ExecutionStatus",
    "IssuedKey",
    "Notice",
    "NotificationDelivery",
    "OutputDecision",
    "PendingApproval",
    "RedactionFlag",
    "StoreModel",
    "ToolCall",
    "TrustLevel",
    "metadata",
]


def __getattr__(name: str) -> Any:
    if (home := _HOMES.get(name)) is None:
        raise AttributeError(f"module 'agent_gateway_store.models' has no attribute {name!r}")
    module = import_module(f"agent_gateway_store.models.{home}")
    if name == "metadata":
        for table_module in ("approval", "audit", "delivery", "identity"):
            import_module(f"agent_gateway_store.models.{table_module}")
    value = globals()[name] = getattr(module, name)
    return value
