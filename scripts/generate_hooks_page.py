"""Write `docs/reference/hooks.md` from the hookspecs: run this file after changing one of them.

The examples are written on the page itself, each behind its hook, and stay as they are.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from agent_gateway_store.hooks import PROJECT, specs

PAGE = Path(__file__).parents[1] / "docs" / "reference" / "hooks.md"

HEAD = """# Plugin hooks

A plugin is a module, object or class with functions marked `@hookimpl`, or a bare notifier. It is found by its entry
point in the group `agent_gateway_store`, or given to the store: `GatewayStore(plugins=[...])`. A function may leave out
arguments it does not need. `from agent_gateway_store import hookimpl` loads neither SQLModel nor SQLAlchemy.

Every plugin is loaded, called and reported alone, in threads of its own, so none can stop, stall or see another. How to
begin: [Write a notifier](../how-to/write-a-notifier.md), [Test plugins](../how-to/testing-plugins.md).
"""

TAIL = """## The shape of a notifier

::: agent_gateway_store.hooks.specs.Notifier
    options:
      heading_level: 3

## Values that hooks are given

[`Notice`](models.md#notice), [`AuditEvent`](models.md#auditevent), [`StoreSettings`](settings.md), and:

::: agent_gateway_store.models.values.PendingApproval
    options:
      heading_level: 3
      members: []

## What became of the plugins

`store.plugins.records` holds one `PluginRecord` per plugin. `gateway-store plugins list` shows them, and how their
settings stand; an active one that does nothing before its settings are given it calls `idle`.

::: agent_gateway_store.hooks.plugin.PluginRecord
    options:
      heading_level: 3
      members: []
      merge_init_into_class: false

::: agent_gateway_store.hooks.plugin.SettingsState
    options:
      heading_level: 3
      members: []
      merge_init_into_class: false

::: agent_gateway_store.hooks.dispatch.DeliveryReport
    options:
      heading_level: 3
      members: []
      merge_init_into_class: false
"""


def hooks() -> dict[str, Callable[..., Any]]:
    """Return the hookspecs by name, in the order of their module."""
    found = {
        name: function
        for name, function in inspect.getmembers(specs, inspect.isfunction)
        if hasattr(function, f"{PROJECT}_spec")
    }
    return dict(sorted(found.items(), key=lambda item: inspect.getsourcelines(item[1])[1]))


def generate() -> str:
    """Return the text of the page."""
    rows = "".join(_row(name, function) for name, function in hooks().items())
    table = f"| Hook | Arguments | Async | What for |\n| --- | --- | --- | --- |\n{rows}"
    page = PAGE.read_text(encoding="utf-8")
    return "\n".join([HEAD, table, *(_section(name, page) for name in hooks()), TAIL])


def _row(name: str, function: Callable[..., Any]) -> str:
    signature = inspect.signature(function)
    summary = (inspect.getdoc(function) or "").split(". ")[0].partition("\n")[0].rstrip(".")
    arguments = ", ".join(f"`{argument}`" for argument in signature.parameters)
    may_be_async = "may be" if "Awaitable" in str(signature.return_annotation) else "no"
    anchor = f"agent_gateway_store.hooks.specs.{name}"
    return f"| [`{name}`](#{anchor}) | {arguments} | {may_be_async} | {summary} |\n"


def _section(name: str, page: str) -> str:
    directive = f"::: agent_gateway_store.hooks.specs.{name}\n"
    example = re.search(rf"^{directive}(\n```python\n.*?^```\n)", page, re.DOTALL | re.MULTILINE)
    return directive + (example[1] if example else "")


if __name__ == "__main__":
    PAGE.write_text(generate(), encoding="utf-8")
