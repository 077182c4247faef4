"""Human approvals: asked, decided once, used once."""

from agent_gateway_store.approval.changes import ApprovalBackend
from agent_gateway_store.approval.manager import ApprovalManager
from agent_gateway_store.approval.notifier import ApprovalNotifier

__all__ = ["ApprovalBackend", "ApprovalManager", "ApprovalNotifier"]
