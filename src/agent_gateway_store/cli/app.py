"""The root command: global options, and the groups below it."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Annotated

import typer

from agent_gateway_store.cli import approvals, audit, db, export_import, keys, notifications, plugins
from agent_gateway_store.cli.context import Options
from agent_gateway_store.cli.demo import demo
from agent_gateway_store.cli.doctor import doctor
from agent_gateway_store.cli.errors import RootGroup
from agent_gateway_store.cli.seed import seed

__all__ = ["app"]

app = typer.Typer(
    name="gateway-store",
    cls=RootGroup,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="The system of record of an AI-agent tool gateway: audit log, human approvals, API keys.",
    epilog="Exit codes: 0 ok, 1 error, 2 usage, 3 integrity violation, 4 not found or expired, 5 a dependency is down.",
)
app.command("demo")(demo)
app.command("seed")(seed)
app.add_typer(db.app, name="db")
app.add_typer(keys.app, name="keys")
export_import.add_to(audit.app)
app.add_typer(audit.app, name="audit")
app.add_typer(approvals.app, name="approvals")
app.add_typer(plugins.app, name="plugins")
app.add_typer(notifications.app, name="notifications")
app.command("doctor")(doctor)


def _print_version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        typer.echo(f"gateway-store {version('agent-gateway-store')}")
        raise typer.Exit


@app.callback()
def root(
    ctx: typer.Context,
    database_url: Annotated[
        str | None, typer.Option(help="Database; default: DATABASE_URL, else the SQLite file gateway.db.")
    ] = None,
    redis_url: Annotated[str | None, typer.Option(help='Redis; default: REDIS_URL; "" does without.')] = None,
    org: Annotated[str | None, typer.Option(help="See and change only this organisation.")] = None,
    env_file: Annotated[
        Path | None, typer.Option(exists=True, dir_okay=False, readable=True, help="Read settings from this .env file.")
    ] = None,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error, and what is logged.")] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Take the global options."""
    if org is not None and not org:
        raise typer.BadParameter("--org must not be empty.")
    if database_url is not None and not database_url:
        raise typer.BadParameter("--database-url must not be empty.")
    # Without a handler Python prints warnings of the store beside the one sentence that a command ends in.
    logging.getLogger("agent_gateway_store").addHandler(logging.NullHandler())
    if debug:
        logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s")
    ctx.obj = Options(database_url=database_url, redis_url=redis_url, org=org, env_file=env_file)
