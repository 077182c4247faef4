"""The outbox at work: rows are claimed, sent, and their results recorded."""

from agent_gateway_store.delivery.manager import NotificationManager
from agent_gateway_store.delivery.outbox import StoreOutbox
from agent_gateway_store.delivery.worker import DeliveryWorker

__all__ = ["DeliveryWorker", "NotificationManager", "StoreOutbox"]
