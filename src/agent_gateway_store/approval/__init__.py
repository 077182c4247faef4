"""Human approvals: asked, decided once, used once."""

from agent_gateway_store.approval.manager import ApprovalBackend, ApprovalManager
from agent_gateway_store.approval.notifier import ApprovalNotifier

__all__ = ["ApprovalBackend", "ApprovalManager", "ApprovalNotifier"]
