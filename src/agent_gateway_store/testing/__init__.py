"""For the tests of plugins and gateways: a notifier that records, notices, a conformance suite, and pytest fixtures.

The fixtures come with the package, by the pytest plugin `agent_gateway_store`: `gateway_store`, `sync_gateway_store`,
`recorded_notifications`, `gateway_clock`, and two to override, `gateway_store_plugins` and `gateway_store_settings`.
`NotifierConformance` is loaded on first use, so that the pytest plugin, which every test run loads, loads no pydantic.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from agent_gateway_store.testing.doubles import MovableClock, RecordingNotifier, make_notice, wait_until

if TYPE_CHECKING:
    from agent_gateway_store.testing.conformance import NotifierConformance

__all__ = ["MovableClock", "NotifierConformance", "RecordingNotifier", "make_notice", "wait_until"]


def __getattr__(name: str) -> Any:
    if name != "NotifierConformance":
        raise AttributeError(f"module 'agent_gateway_store.testing' has no attribute {name!r}")
    from agent_gateway_store.testing.conformance import NotifierConformance

    return NotifierConformance
