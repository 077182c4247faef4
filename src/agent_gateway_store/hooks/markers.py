"""The decorators that mark hooks and their implementations. Imports nothing but pluggy."""

from __future__ import annotations

from pluggy import HookimplMarker, HookspecMarker

PROJECT = "agent_gateway_store"
"""The pluggy project, and the entry-point group that plugins are found by."""

hookspec = HookspecMarker(PROJECT)
hookimpl = HookimplMarker(PROJECT)
