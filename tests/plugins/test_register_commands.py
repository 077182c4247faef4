"""Plugins add commands to `gateway-store`; a broken plugin leaves the command line working."""

from __future__ import annotations

from pathlib import Path

import pytest

import plugin_helpers
from commands import gateway_store
from plugin_helpers import Install

pytestmark = pytest.mark.integration

install = plugin_helpers.install

TICKETS = """
    import typer
    from agent_gateway_store import hookimpl
    from agent_gateway_store.cli.context import open_store, run

    @hookimpl
    def gateway_store_register_commands(app):
        group = typer.Typer(help="Tickets.")

        @group.command()
        def export(ctx: typer.Context, prefix: str = "T"):
            async def work():
                async with open_store(ctx) as store:
                    return [each.request_id for each in await store.approvals.list_requests()], store.org_id
            typer.echo(f"{prefix} {run(work())}")

        @group.command()
        def fail():
            raise ValueError("broken for agw_0123456789ab_c2VjcmV0c2VjcmV0")

        app.add_typer(group, name="tickets")
"""
ONE = """
    from agent_gateway_store import hookimpl

    @hookimpl
    def gateway_store_register_commands(app):
        BODY
"""


def test_a_command_of_a_plugin_works_on_the_store_of_the_options(install: Install, tmp_path: Path) -> None:
    """Listed in the help, run with the global options, its errors told in one sentence without secrets."""
    install("tickets", TICKETS)
    url = f"sqlite:///{tmp_path / 'other.db'}"

    listed = gateway_store("--help")
    ran = gateway_store("--database-url", url, "--org", "acme", "tickets", "export", "--prefix", "X")
    failed = gateway_store("tickets", "fail")

    assert "tickets" in listed.out
    assert (ran.code, ran.out, ran.err) == (0, "X ([], 'acme')\n", "")
    assert (tmp_path / "other.db").exists()
    assert not (tmp_path / "gateway.db").exists()
    failed.assert_fails(1, "ValueError")
    assert "c2VjcmV0" not in failed.said


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ("1 / 0", "ZeroDivisionError"),
        ("raise SystemExit(3)", "SystemExit"),
        ("app.command('x')(lambda weird: object)(1, 2)", "TypeError"),
        ("app.command('keys')(lambda: None)", "names are taken, which are left out: keys"),
        ("async def later(): ...\n        return later()", "must not be async"),
    ],
)
def test_a_plugin_that_cannot_register_costs_one_line(install: Install, body: str, said: str) -> None:
    """Other commands work, ours and those of other plugins; what is ours is not replaced."""
    install("a-bad", ONE.replace("BODY", body))
    install("b-good", ONE.replace("BODY", "app.command('greet')(lambda: print('hello'))"))

    listed = gateway_store("--help")
    greeted = gateway_store("greet")
    ours = gateway_store("keys", "--help")

    for outcome in (listed, greeted):
        assert outcome.code == 0
        (line,) = outcome.err.splitlines()
        assert said in line
        assert "a-bad" in line
    assert greeted.out == "hello\n"
    assert "rotate" in ours.out
    if said.endswith("Error"):
        for checked in (gateway_store("plugins", "check", "a-bad"), gateway_store("plugins", "list")):
            assert said in checked.out
    assert ours.err == ""


def test_two_plugins_with_one_name(install: Install) -> None:
    for name in ("a-one", "b-two"):
        install(name, ONE.replace("BODY", f"app.command('greet')(lambda: print('{name}'))"))

    greeted = gateway_store("greet")

    assert greeted.out == "a-one\n"
    assert "Plugin b-two has commands whose names are taken, which are left out: greet." in greeted.err


def test_a_plugin_that_cannot_be_imported_costs_one_line(install: Install, tmp_path: Path) -> None:
    """Where the plugins' commands are wanted it is named; our own commands do not even load it."""
    install("broken", f"open({str(tmp_path / 'loaded')!r}, 'w').close()\nraise ImportError('no such thing')")

    own = gateway_store("db", "current")
    assert (own.code, own.err, (tmp_path / "loaded").exists()) == (0, "", False)
    listed, unknown = gateway_store("--help"), gateway_store("nosuch")

    assert listed.code == 0
    assert listed.err.splitlines() == ["Plugin broken is broken: ImportError: no such thing."]
    assert unknown.code == 2
    assert "No such command 'nosuch'" in unknown.err
