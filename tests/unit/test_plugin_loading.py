"""Plugins are found and loaded one by one: a broken one costs a record, never the others."""

from __future__ import annotations

import logging
import sys
import tomllib
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from types import ModuleType

import pytest

import plugin_helpers
from agent_gateway_store import hookimpl
from agent_gateway_store.hooks.manager import BLOCK_VARIABLE, LOAD_VARIABLE, Plugins
from agent_gateway_store.hooks.plugin import PluginRecord
from agent_gateway_store.settings import StoreSettings
from agent_gateway_store.testing import RecordingNotifier
from plugin_helpers import GOOD, Install, load, record

pytestmark = pytest.mark.unit

settings, install = plugin_helpers.settings, plugin_helpers.install


class TestInstalled:
    """Plugins found by their entry point."""

    def test_good_plugin_is_recorded_and_used(self, install: Install, settings: StoreSettings) -> None:
        """Name, version, package and hooks are known; its notifier is there."""
        install("good", version="2.3")

        plugins = load("good")

        assert record(plugins, "good") == PluginRecord(
            "good", "2.3", "fake-good", ("gateway_store_register_notifiers",), "active", None
        )
        assert list(plugins.notifiers(settings)) == ["good"]

    def test_variables_are_read_from_the_environment(self, install: Install, monkeypatch: pytest.MonkeyPatch) -> None:
        install("one")
        monkeypatch.setenv("AGENT_GATEWAY_STORE_BLOCK_PLUGINS", " one , two")

        assert record(Plugins(), "one").state == "blocked"

    @pytest.mark.parametrize(
        ("environ", "errors"),
        [
            ({}, {"one": None, "two": None}),
            ({LOAD_VARIABLE: ""}, dict.fromkeys(("one", "two"), f"not named in {LOAD_VARIABLE}")),
            (
                {LOAD_VARIABLE: "one,slak"},
                {"one": None, "two": f"not named in {LOAD_VARIABLE}", "slak": "no such plugin is installed"},
            ),
            (
                {LOAD_VARIABLE: "one,two", BLOCK_VARIABLE: "one"},
                {"one": f"named in {BLOCK_VARIABLE}", "two": None},
            ),
        ],
        ids=["unset", "empty", "named", "blocked"],
    )
    def test_variables_say_what_is_loaded(
        self, install: Install, environ: dict[str, str], errors: dict[str, str | None]
    ) -> None:
        """Unset is all, empty is none, blocking wins; what is not loaded is not imported; a name nobody has is told."""
        install("one")
        install("two")

        plugins = Plugins(environ=environ)

        for name, error in errors.items():
            state = "active" if error is None else "broken" if name == "slak" else "blocked"
            assert record(plugins, name).state == state
            assert (error or "") in (record(plugins, name).error or "")
            assert (f"fake_{name}" in sys.modules) is (error is None)
        assert record(plugins, "one").distribution == "fake-one"

    @pytest.mark.parametrize(
        ("code", "error"),
        [
            ("import no_such_library", "ModuleNotFoundError: No module named 'no_such_library'"),
            ("raise ValueError('password=hunter2')", "ValueError: password=***"),
            ("raise SystemExit(3)", "SystemExit: 3"),
            ("raise GeneratorExit", "GeneratorExit"),
            ("import asyncio; raise asyncio.CancelledError", "CancelledError"),
            ("def broken(:", "SyntaxError: "),
            ("x = 1", "nothing in it is marked with @hookimpl"),
            (GOOD.replace("(settings)", "(setings)"), "PluginValidationError: "),
            (GOOD.replace("register_notifiers", "register_notifier"), "no hook gateway_store_register_notifier"),
        ],
    )
    def test_bad_plugin_is_recorded_among_good_ones(
        self, install: Install, settings: StoreSettings, caplog: pytest.LogCaptureFixture, code: str, error: str
    ) -> None:
        """Whatever happens on import, the plugins before and after it work."""
        install("a-good")
        install("bad", code)
        install("z-good")

        plugins = load("a-good", "bad", "z-good")

        assert record(plugins, "bad").state == "broken"
        assert error in (record(plugins, "bad").error or "")
        assert record(plugins, "bad").distribution == "fake-bad"
        assert list(plugins.notifiers(settings)) == ["a-good", "z-good"]
        assert [(r.name, r.levelno) for r in caplog.records] == [("agent_gateway_store.hooks", logging.WARNING)]
        assert "Plugin bad is broken: " in caplog.text

    def test_keyboard_interrupt_gets_through(self, install: Install) -> None:
        install("bad", "raise KeyboardInterrupt")

        with pytest.raises(KeyboardInterrupt):
            load("bad")

    def test_unreadable_metadata_stops_nobody(self, install: Install) -> None:
        """A distribution whose entry points cannot be parsed is passed over."""
        install("odd", lines="[other]\nthis is no entry point\n")
        install("good")

        assert record(load("good"), "good").state == "active"

    def test_name_taken_twice(self, install: Install, settings: StoreSettings) -> None:
        """Two packages with one name: one is used, the other reported."""
        install("first", entry="same")
        install("second", entry="same")

        plugins = load("same")

        assert sorted(r.state for r in plugins.records if r.name == "same") == ["active", "broken"]
        assert len(plugins.notifiers(settings)) == 1

    @pytest.mark.parametrize("name", ["apprise", "log", "slack", "webhook"])
    def test_names_of_bundled_plugins_are_not_taken(self, install: Install, settings: StoreSettings, name: str) -> None:
        """Neither that of the plugin, nor, under another name, that of its notifier, set up or not."""
        install(f"aa-{name}", GOOD.replace("NAME", name), entry=name)
        install(f"bb-{name}", GOOD.replace("NAME", name), entry="aaa")

        plugins = load(name, "aaa")
        notifiers = plugins.notifiers(settings)

        ours, theirs = [record for record in plugins.records if record.name == name]
        assert (ours.distribution, ours.state) == ("agent-gateway-store", "active")
        assert theirs.distribution == f"fake-aa-{name}"
        taken = (
            f"another installed plugin has taken its name, that of agent-gateway-store {version('agent-gateway-store')}"
        )
        assert theirs.error == taken
        assert record(plugins, "aaa").error == f"the name {name} is that of a bundled notifier"
        assert not any(type(notifier).__module__.startswith("fake_") for notifier in notifiers.values())

    def test_distribution_found_twice_counts_once(self, install: Install, tmp_path: Path) -> None:
        """An old copy further down sys.path is not a second plugin."""
        install("good")
        sys.path.append(sys.path[0] + "/.")

        try:
            assert record(load("good"), "good").state == "active"
        finally:
            sys.path.pop()

    def test_unknown_hook_keeps_the_rest_working(self, install: Install, settings: StoreSettings) -> None:
        """A misspelt hook is reported, one that a newer release has may be marked as optional; the notifiers work."""
        install("typo", GOOD + "\n    @hookimpl\n    def gateway_store_aproval_event(): ...\n")
        install("new", GOOD + "\n    @hookimpl(optionalhook=True)\n    def gateway_store_of_tomorrow(): ...\n")

        plugins = load("typo", "new")

        assert record(plugins, "typo").error == "this version knows no hook gateway_store_aproval_event"
        assert record(plugins, "new").state == "active"
        assert list(plugins.notifiers(settings)) == ["new", "typo"]

    def test_class_as_entry_point(self, install: Install, settings: StoreSettings) -> None:
        install("klass", GOOD.split("@hookimpl")[0], entry="klass")
        info = next(Path(sys.path[0]).glob("*.dist-info")) / "entry_points.txt"
        info.write_text("[agent_gateway_store]\nklass = fake_klass:Good\n")

        assert list(load("klass").notifiers(settings)) == ["klass"]


class TestGiven:
    """Plugins handed to the store."""

    def test_bare_notifier_is_taken_as_it_is(self, settings: StoreSettings) -> None:
        notifier = RecordingNotifier("mine")

        plugins = load(given=(notifier,))

        assert plugins.notifiers(settings) == {"mine": notifier}
        assert record(plugins, "mine") == PluginRecord("mine", None, None, (), "active", None, ("mine",))

    def test_object_and_module_with_hooks(self, settings: StoreSettings) -> None:
        """Hook implementations are found on instances and in modules; they may leave out arguments."""

        class Source:
            @hookimpl
            def gateway_store_register_notifiers(self) -> list[RecordingNotifier]:
                return [RecordingNotifier("from-object"), RecordingNotifier("second")]

        module = ModuleType("some_module")
        module.gateway_store_register_notifiers = hookimpl(  # type: ignore[attr-defined]
            lambda settings: [RecordingNotifier("from-module")]
        )

        plugins = load(given=(Source(), module))

        assert list(plugins.notifiers(settings)) == ["from-object", "second", "from-module"]
        assert [r.name for r in plugins.records if r.state == "active"] == ["Source", "some_module"]

    def test_two_of_a_kind_get_names_of_their_own(self) -> None:
        class Listener:
            @hookimpl
            def gateway_store_approval_event(self, notice: object) -> None: ...

        plugins = load(given=(Listener(), Listener()))

        assert list(plugins.callers("gateway_store_approval_event")) == ["Listener", "Listener-2"]

    def test_given_plugin_takes_the_place_of_an_installed_one(self, install: Install, settings: StoreSettings) -> None:
        """Code wins over what happens to be installed, also if it is the same module."""
        install("good")
        install("other")
        mine = RecordingNotifier("good")

        plugins = load("good", "other", given=(mine, import_module("fake_other")))

        assert plugins.notifiers(settings)["good"] is mine
        assert [r.state for r in plugins.records if r.name == "good"] == ["active", "blocked"]
        assert record(plugins, "other").state == "blocked"
        assert "broken" not in [r.state for r in plugins.records]

    def test_garbage_is_recorded(self, settings: StoreSettings) -> None:
        """What is no plugin is broken, what is blocked left out; the rest is used."""
        garbage = (None, 7, "slack", object(), lambda: None, Exception)
        plugins = load(given=(*garbage, *map(RecordingNotifier, ("one", "one", "mine"))), block="one")

        states = [r.state for r in plugins.records if r.distribution is None]
        assert states == [*["broken"] * len(garbage), "blocked", "blocked", "active"]
        assert list(plugins.notifiers(settings)) == ["mine"]


def test_entry_points_of_this_package_load(settings: StoreSettings) -> None:
    """What pyproject.toml declares can be imported; unset, `log` alone is at work, the others say what they read."""
    root = next(folder for folder in Path(__file__).parents if (folder / "pyproject.toml").exists())
    project = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    declared = project["entry-points"]["agent_gateway_store"]

    plugins = load(given=tuple(import_module(value) for value in declared.values()))

    assert list(plugins.notifiers(settings)) == ["log"]
    named = {value.rpartition(".")[2] for name, value in declared.items() if name != "log"}
    assert {name.rpartition(".")[2] for name in plugins.settings(1.0)} == named
    assert [r.error for r in plugins.records if r.state == "broken"] == []
