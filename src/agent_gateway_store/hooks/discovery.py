"""Installed plugins, and what they are called."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Iterator
from importlib import metadata

from agent_gateway_store.hooks.markers import PROJECT
from agent_gateway_store.hooks.text import describe, one_line

__all__ = ["identity", "installed", "name_of", "names_in"]

logger = logging.getLogger("agent_gateway_store.hooks")

UNKNOWN = "unknown"


def installed() -> Iterator[tuple[metadata.EntryPoint, metadata.Distribution]]:
    """Yield the entry points of our group, sorted by name, none of them loaded.

    Of a distribution found twice the first on `sys.path` counts. One whose metadata cannot be read is left out: that it
    holds a plugin is not known.
    """
    found: list[tuple[metadata.EntryPoint, metadata.Distribution]] = []
    seen: set[str] = set()
    for distribution in metadata.distributions():
        try:
            entry_points = distribution.entry_points.select(group=PROJECT)
        except Exception as exc:
            logger.debug("The entry points of %s cannot be read: %s", identity(distribution)[0], describe(exc))
            continue
        if not entry_points:
            continue
        package = identity(distribution)[0].lower()
        if package == UNKNOWN or package not in seen:
            seen.add(package)
            found.extend((entry_point, distribution) for entry_point in entry_points)
    return iter(sorted(found, key=lambda pair: pair[0].name))


def identity(distribution: metadata.Distribution) -> tuple[str, str]:
    """Return name and version of a distribution, `unknown` where its metadata does not say."""
    try:
        fields = distribution.metadata
        return one_line(fields["Name"] or UNKNOWN), one_line(fields["Version"] or UNKNOWN)
    except Exception:
        return UNKNOWN, UNKNOWN


def names_in(variable: str) -> frozenset[str]:
    """Return the names in a comma-separated list."""
    return frozenset(name.strip() for name in variable.split(",") if name.strip())


def name_of(plugin: object) -> str:
    """Return what to call a plugin object: its `name`, else the name of the module or class. Raises nothing."""
    own = plugin if inspect.ismodule(plugin) or inspect.isclass(plugin) else type(plugin)
    try:
        name = plugin.__dict__["__name__"] if inspect.ismodule(plugin) else getattr(plugin, "name", None)
    except Exception:
        name = None
    return name if isinstance(name, str) and name.strip() else own.__name__
