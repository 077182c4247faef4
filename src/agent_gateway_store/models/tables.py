"""The whole schema: every table is in the `metadata` that is imported from here."""

from __future__ import annotations

from agent_gateway_store.models import (  # noqa: F401  each adds its tables
    approval,
    audit,
    delivery,
    evidence,
    keys,
    retention,
    shipping,
)
from agent_gateway_store.models.base import metadata

__all__ = ["metadata"]
