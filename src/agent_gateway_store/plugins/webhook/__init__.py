"""Notifier `webhook`: signed posts to your own receivers, and the check for the receiving end.

Contributes one notifier for each receiver in the settings.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from agent_gateway_store.hooks import hookimpl
from agent_gateway_store.plugins._http import time_limit_s
from agent_gateway_store.plugins.webhook.notifier import WebhookEndpoint, WebhookNotifier, WebhookSettings
from agent_gateway_store.plugins.webhook.receiver import Received, WebhookReceiver

if TYPE_CHECKING:
    from agent_gateway_store.settings import StoreSettings

__all__ = [
    "Received",
    "WebhookEndpoint",
    "WebhookNotifier",
    "WebhookReceiver",
    "WebhookSettings",
    "gateway_store_plugin_settings",
    "gateway_store_register_notifiers",
]


@hookimpl
def gateway_store_register_notifiers(settings: StoreSettings) -> list[WebhookNotifier]:
    """Contribute a notifier for each receiver that `AGENT_GATEWAY_STORE_WEBHOOK_...` names."""
    own = WebhookSettings()
    timeout_s = time_limit_s(settings)
    return [WebhookNotifier(endpoint, own, name=name, timeout_s=timeout_s) for name, endpoint in own.receivers.items()]


@hookimpl
def gateway_store_plugin_settings() -> type[WebhookSettings]:
    """Return the class of its settings."""
    return WebhookSettings
