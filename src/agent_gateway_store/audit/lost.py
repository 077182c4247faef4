"""The last resort: an event that no store took is logged, whole, at CRITICAL."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from typing import Any

from agent_gateway_store.models.audit import AuditEvent

__all__ = ["log_lost"]

_logger = logging.getLogger("agent_gateway_store.audit.lost")


def log_lost(row: Mapping[str, Any] | None, event: AuditEvent, cause: BaseException) -> None:
    """Log `event` as one line of JSON: its scrubbed row, or its request id where there is none. Never raises."""
    try:
        document = {"request_id": event.request_id} if row is None else {**row, "timestamp": str(row["timestamp"])}
        text = json.dumps(document, default=lambda value: value.model_dump(), ensure_ascii=True)
        _logger.critical("LOST audit event (%s): %s", type(cause).__name__, text)
    except Exception:
        _logger.exception("LOST audit event that could not be spelt")
