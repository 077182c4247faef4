"""The sealed log of audit events, and proofs from it that others can check."""

from agent_gateway_store.evidence.proof import Evidence, check

__all__ = ["Evidence", "check"]
