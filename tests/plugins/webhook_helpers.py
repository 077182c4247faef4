"""A notifier `webhook` that posts to a test's server, by names that lead where a test says."""

from __future__ import annotations

import base64
import secrets
from typing import Any

from notifier_helpers import Server

from agent_gateway_store.plugins.webhook import WebhookEndpoint, WebhookNotifier, WebhookSettings


def new_secret() -> str:
    return "whsec_" + base64.b64encode(secrets.token_bytes(32)).decode()


SECRET, OLD_SECRET = new_secret(), new_secret()


def notifier_for(
    target: Server | str, *keys: str, answers: list[list[str]] | None = None, **fields: Any
) -> WebhookNotifier:
    """A notifier that posts to a test's server, or to a URL.

    Args:
        target: Where to; a server may be posted to, whereas of a URL nothing is allowed that the settings do not allow.
        keys: Its secrets; default: `SECRET`.
        answers: To what names resolve, look-up by look-up; the last stays. None: nothing is to be resolved.
        fields: Its settings.
    """

    async def resolver(host: str, port: int) -> list[str]:
        assert answers is not None, "nothing was to be resolved"
        return answers.pop(0) if len(answers) > 1 else answers[0]

    is_ours = {"allow_http": True, "allow_private": True} if isinstance(target, Server) else {}
    settings = WebhookSettings(**({"timeout_seconds": 4} | is_ours | fields))
    url = target.url if isinstance(target, Server) else target
    return WebhookNotifier(WebhookEndpoint(url=url, secrets=keys or (SECRET,)), settings, resolver=resolver)  # type: ignore[arg-type]
