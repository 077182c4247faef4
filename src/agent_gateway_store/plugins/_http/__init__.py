"""HTTP from the bundled notifiers to the outside: which addresses, for how long, and how much is read."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from agent_gateway_store.settings import StoreSettings

__all__ = ["time_limit_s"]


def time_limit_s(settings: StoreSettings) -> float:
    """Return the seconds for one delivery: a little less than the plugin has, so that our own error says why."""
    # Half a second is left for rendering the notice and for its thread, which take milliseconds on an idle machine.
    return max(settings.plugin_timeout_seconds - 0.5, settings.plugin_timeout_seconds / 2)
