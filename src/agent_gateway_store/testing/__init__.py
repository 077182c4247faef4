"""What authors of plugins test with: a notifier that records, notices, a conformance suite, and pytest fixtures.

The fixtures come with the package, by the pytest plugin `agent_gateway_store`: `gateway_store`, `sync_gateway_store`,
`recorded_notifications`, `gateway_clock`, and two to override, `gateway_store_plugins` and `gateway_store_settings`.
Names are resolved on first use (PEP 562), so that the plugin costs a test run that does not use it next to nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from agent_gateway_store.testing.conformance import NotifierConformance
    from agent_gateway_store.testing.moving import MovableClock
    from agent_gateway_store.testing.notices import make_notice
    from agent_gateway_store.testing.recording import RecordingNotifier
    from agent_gateway_store.testing.waiting import wait_until

_HOMES = {
    "MovableClock": "moving",
    "NotifierConformance": "conformance",
    "RecordingNotifier": "recording",
    "make_notice": "notices",
    "wait_until": "waiting",
}

__all__ = ["MovableClock", "NotifierConformance", "RecordingNotifier", "make_notice", "wait_until"]


def __getattr__(name: str) -> Any:
    if (home := _HOMES.get(name)) is None:
        raise AttributeError(f"module 'agent_gateway_store.testing' has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(f"agent_gateway_store.testing.{home}"), name)
    return value


def __dir__() -> list[str]:
    return list(__all__)
