"""`gateway-store db`: the schema."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Annotated, Any

import typer

from agent_gateway_store.cli.context import require_no_org, run, settings_of, sqlite_file
from agent_gateway_store.cli.errors import CommandError
from agent_gateway_store.cli.output import JsonOption, complain, print_json, print_result, say

if TYPE_CHECKING:
    from sqlalchemy.ext.asyncio import AsyncEngine

app = typer.Typer(name="db", no_args_is_help=True, help="Bring the schema up to date, or check it.")


@asynccontextmanager
async def engine_for(url: str) -> AsyncIterator[AsyncEngine]:
    """Open an engine on `url` without checking its schema."""
    from agent_gateway_store.storage.database import create_engine

    engine = create_engine(url)
    try:
        yield engine
    finally:
        await engine.dispose()


async def schema_state(url: str) -> dict[str, Any]:
    """Return `current` (None: none of our tables), `expected` and `state`: current, behind, ahead or empty.

    A SQLite file that does not exist is not created.
    """
    from agent_gateway_store.storage import migrate

    expected, file = migrate.head(), sqlite_file(url)
    # To connect would create the file. A folder that is missing is an error, and left to the connection to report.
    if file is not None and not file.exists() and file.parent.is_dir():
        return {"current": None, "expected": expected, "state": "empty"}
    async with engine_for(url) as engine:
        found = await migrate.current(engine)
    if found is None:
        state = "empty"
    elif found == expected:
        state = "current"
    else:
        state = "behind" if migrate.is_known(found) else "ahead"
    return {"current": found, "expected": expected, "state": state}


@app.command()
def upgrade(ctx: typer.Context, json: JsonOption = False) -> None:
    """Bring the schema up to date. Safe to repeat, and to run from several processes at once."""
    url = settings_of(ctx).database_url

    async def work() -> dict[str, Any]:
        from agent_gateway_store.storage import migrate

        async with engine_for(url) as engine:
            await migrate.upgrade(engine)
        return await schema_state(url)

    state = run(work())
    print_result(state, f"The schema is at {state['current']}.", as_json=json)


@app.command()
def current(ctx: typer.Context, json: JsonOption = False) -> None:
    """Print the revision of the database."""
    state = run(schema_state(settings_of(ctx).database_url))
    text = f"{state['current'] or 'none'} ({state['state']}; this package works on {state['expected']})"
    print_result(state, text, as_json=json)


@app.command()
def check(ctx: typer.Context, json: JsonOption = False) -> None:
    """Check that the schema is the one this package works on; exit 1 if it is not."""
    from agent_gateway_store.storage import migrate

    url = settings_of(ctx).database_url

    async def work() -> dict[str, Any]:
        state = await schema_state(url)
        if state["state"] != "current":
            return {**state, "differences": []}
        async with engine_for(url) as engine:
            return {**state, "differences": await migrate.differences(engine)}

    state = run(work())
    if json:
        print_json(state)
    if state["state"] != "current":
        raise migrate.out_of_date(state["current"])
    if state["differences"]:
        for line in state["differences"]:
            complain(line)
        raise CommandError("The schema differs from the models: restore it, or report a bug if nobody changed it.")
    if not json:
        say(f"The schema is at {state['current']} and equals the models.")


@app.command()
def restored(
    ctx: typer.Context,
    by: Annotated[str, typer.Option(help="Who says so, as the audit event names them.")],
    keep_approvals: Annotated[
        bool, typer.Option("--keep-approvals", help="Cancel no approval: none was decided or used after the backup.")
    ] = False,
    json: JsonOption = False,
) -> None:
    """Give a database from a backup a new identity, and cancel its open approvals.

    Run it once, before anything writes there: until then what was used after the backup can be used again.
    """
    require_no_org(ctx)
    if not by.strip():
        raise typer.BadParameter("--by must not be empty.")
    settings = settings_of(ctx)

    async def work() -> dict[str, Any]:
        from agent_gateway_store.audit.doors import renew_identity
        from agent_gateway_store.storage import migrate

        state = await schema_state(settings.database_url)
        if state["state"] != "current":
            raise migrate.out_of_date(state["current"])
        async with engine_for(settings.database_url) as engine:
            return await renew_identity(
                engine, by=by.strip(), environment=settings.environment, keep_approvals=keep_approvals
            )

    facts = run(work())
    text = f"The database is {facts['new_identity']} from now on, and no longer {facts['old_identity']}."
    print_result(facts, text, as_json=json)
    complain(f"Approvals cancelled: {facts['approvals_cancelled']}{' (all are kept)' if keep_approvals else ''}.")
    complain(
        f"Active API keys: {facts['active_keys']}. Those revoked or rotated since the backup are valid again: "
        "revoke them (see `gateway-store keys list`)."
    )
    complain("Restart the gateways that have it open, and begin with new cursors.")


@app.command()
def sql(ctx: typer.Context, json: JsonOption = False) -> None:
    """Print the statements that set up an empty database of this kind, without connecting."""
    from agent_gateway_store.storage import migrate

    script = migrate.sql(settings_of(ctx).database_url)
    if json:
        print_json({"revision": migrate.head(), "sql": script})
    else:
        typer.echo(script.rstrip())
