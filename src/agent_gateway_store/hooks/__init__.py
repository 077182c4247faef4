"""The plugin contract: markers, hookspecs, loading, isolated dispatch.

Names are resolved on first use (PEP 562), so that `hookimpl` loads nothing but pluggy.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from agent_gateway_store.hooks.delivery import DeliveryReport
    from agent_gateway_store.hooks.dispatch import Dispatcher
    from agent_gateway_store.hooks.lanes import Lanes, gathered
    from agent_gateway_store.hooks.loading import Plugins
    from agent_gateway_store.hooks.markers import hookimpl, hookspec
    from agent_gateway_store.hooks.plugin import PluginRecord
    from agent_gateway_store.hooks.specs import Notifier
    from agent_gateway_store.hooks.text import describe, mask_tokens, one_line

_HOMES = {
    "DeliveryReport": "delivery",
    "Dispatcher": "dispatch",
    "Lanes": "lanes",
    "Notifier": "specs",
    "PluginRecord": "plugin",
    "Plugins": "loading",
    "describe": "text",
    "gathered": "lanes",
    "hookimpl": "markers",
    "hookspec": "markers",
    "mask_tokens": "text",
    "one_line": "text",
}

__all__ = [
    "DeliveryReport",
    "Dispatcher",
    "Lanes",
    "Notifier",
    "PluginRecord",
    "Plugins",
    "describe",
    "gathered",
    "hookimpl",
    "hookspec",
    "mask_tokens",
    "one_line",
]


def __getattr__(name: str) -> Any:
    if (home := _HOMES.get(name)) is None:
        raise AttributeError(f"module 'agent_gateway_store.hooks' has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(f"agent_gateway_store.hooks.{home}"), name)
    return value


def __dir__() -> list[str]:
    return list(__all__)
