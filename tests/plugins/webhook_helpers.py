"""A notifier `webhook` that posts to a test's server."""

from __future__ import annotations

import base64
import secrets
from typing import Any

from notifier_helpers import Server

from agent_gateway_store.plugins.webhook import WebhookEndpoint, WebhookNotifier, WebhookSettings


def new_secret() -> str:
    return "whsec_" + base64.b64encode(secrets.token_bytes(32)).decode()


SECRET, OLD_SECRET = new_secret(), new_secret()


def notifier_for(server: Server, *keys: str, **fields: Any) -> WebhookNotifier:
    """A notifier that posts to a test's server."""
    endpoint = WebhookEndpoint(url=server.url, secrets=keys or (SECRET,))  # type: ignore[arg-type]
    settings = {"allow_http": True, "allow_private": True, "timeout_seconds": 5} | fields
    return WebhookNotifier(endpoint, WebhookSettings(**settings))
