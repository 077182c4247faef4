"""Shipping: audit events to sinks, each at least once and in order, behind a cursor that survives everything."""

from agent_gateway_store.shipping.manager import SinkManager
from agent_gateway_store.shipping.shipper import Shipper

__all__ = ["Shipper", "SinkManager"]
