"""What the tests of plugins need: distributions to install, a short patience."""

from __future__ import annotations

import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from agent_gateway_store.hooks.manager import BLOCK_VARIABLE, LOAD_VARIABLE, Plugins
from agent_gateway_store.hooks.plugin import PluginRecord
from agent_gateway_store.settings import StoreSettings

GOOD = """
    from agent_gateway_store import hookimpl

    class Good:
        name = "NAME"
        async def notify_pending(self, notice): ...
        async def notify_decision(self, notice): ...

    @hookimpl
    def gateway_store_register_notifiers(settings):
        return [Good()]
"""
Install = Callable[..., None]


@pytest.fixture
def settings() -> StoreSettings:
    """Settings with a short patience."""
    return StoreSettings(plugin_timeout_seconds=0.2)


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Install]:
    """Make a distribution with one plugin module and put it on sys.path."""
    before = set(sys.modules)

    def make(name: str, code: str = GOOD, *, version: str = "1.0", entry: str | None = None, lines: str = "") -> None:
        module = f"fake_{name.replace('-', '_')}"
        folder = tmp_path / f"site-{module}"
        info = folder / f"{module}-{version}.dist-info"
        info.mkdir(parents=True)
        (folder / f"{module}.py").write_text(textwrap.dedent(code).replace("NAME", name), encoding="utf-8")
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: fake-{name}\nVersion: {version}\n")
        (info / "entry_points.txt").write_text(f"[agent_gateway_store]\n{entry or name} = {module}\n{lines}")
        monkeypatch.syspath_prepend(str(folder))

    yield make
    for name in set(sys.modules) - before:
        if name.startswith("fake_"):
            del sys.modules[name]


def load(*names: str, given: tuple[object, ...] = (), block: str = "") -> Plugins:
    """Load the named installed plugins only, whatever else is installed here."""
    return Plugins(given, environ={LOAD_VARIABLE: ",".join(names), BLOCK_VARIABLE: block})


def record(plugins: Plugins, name: str) -> PluginRecord:
    """Return the only record of `name`."""
    (found,) = [record for record in plugins.records if record.name == name]
    return found
