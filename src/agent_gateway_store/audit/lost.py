"""The last resort: an event that no store took is logged, whole, at CRITICAL."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel

from agent_gateway_store.audit.record import EncodedRow, to_values

__all__ = ["log_lost"]

_logger = logging.getLogger("agent_gateway_store.audit.lost")


def log_lost(record: EncodedRow | Mapping[str, Any] | None, cause: BaseException, *, request_id: str = "") -> None:
    """Log an event as one line of JSON: its scrubbed record or its values, else its request id. Never raises."""
    try:
        values = to_values(record) if isinstance(record, tuple) else record or {"request_id": request_id}
        text = json.dumps(values, default=_spelt, ensure_ascii=True)
        _logger.critical("LOST audit event (%s): %s", type(cause).__name__, text)
    except Exception:
        _logger.exception("LOST audit event that could not be spelt: %r", request_id)


def _spelt(value: object) -> object:
    return value.model_dump() if isinstance(value, BaseModel) else str(value)
