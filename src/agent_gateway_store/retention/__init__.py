"""What is kept and for how long: holds, pruning into an archive, erasing."""

from __future__ import annotations

from agent_gateway_store.retention.manager import RetentionManager

__all__ = ["RetentionManager"]
