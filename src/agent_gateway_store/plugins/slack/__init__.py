"""Notifier `slack`: approvals in a channel, with buttons, and the callback for the clicks.

Contributes its notifier if a bot token and a channel are set.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from agent_gateway_store.hooks import hookimpl
from agent_gateway_store.plugins._http import time_limit_s
from agent_gateway_store.plugins.slack.api import SlackSettings
from agent_gateway_store.plugins.slack.callback import SlackCallback, SlackReply
from agent_gateway_store.plugins.slack.notifier import SlackNotifier

if TYPE_CHECKING:
    from agent_gateway_store.settings import StoreSettings

__all__ = [
    "SlackCallback",
    "SlackNotifier",
    "SlackReply",
    "SlackSettings",
    "gateway_store_plugin_settings",
    "gateway_store_register_notifiers",
]


@hookimpl
def gateway_store_register_notifiers(settings: StoreSettings) -> list[SlackNotifier]:
    """Contribute the notifier, if `AGENT_GATEWAY_STORE_SLACK_BOT_TOKEN` and `..._CHANNEL` are set."""
    own = SlackSettings()
    if not own.posts:
        return []
    timeout_s = min(own.timeout_seconds, time_limit_s(settings))
    return [SlackNotifier(own.model_copy(update={"timeout_seconds": timeout_s}))]


@hookimpl
def gateway_store_plugin_settings() -> type[SlackSettings]:
    """Return the class of its settings."""
    return SlackSettings
