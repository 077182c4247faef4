"""The outbox at work: rows are claimed, sent, and marked."""

from agent_gateway_store.delivery.outbox import StoreOutbox
from agent_gateway_store.delivery.service import Notifications
from agent_gateway_store.delivery.worker import DeliveryWorker

__all__ = ["DeliveryWorker", "Notifications", "StoreOutbox"]
