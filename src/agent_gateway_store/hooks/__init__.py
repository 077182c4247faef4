"""The plugin contract: markers, hookspecs, loading, isolated dispatch.

The decorators that mark hooks and their implementations stand here, and nothing but pluggy is imported for them.
"""

from __future__ import annotations

from pluggy import HookimplMarker, HookspecMarker

PROJECT = "agent_gateway_store"
"""The pluggy project, and the entry-point group that plugins are found by."""

hookspec = HookspecMarker(PROJECT)
hookimpl = HookimplMarker(PROJECT)
