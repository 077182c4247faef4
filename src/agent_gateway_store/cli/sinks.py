"""`gateway-store audit ship`: events to a sink; and `gateway-store sinks`: how far each is, and what it has refused."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from agent_gateway_store.cli import audit
from agent_gateway_store.cli.audit import count_text
from agent_gateway_store.cli.context import in_store, read_store
from agent_gateway_store.cli.errors import CommandError, ExitCode
from agent_gateway_store.cli.notifications import logging_shown, silent, until_stopped
from agent_gateway_store.cli.output import JsonOption, complain, print_page, print_result

if TYPE_CHECKING:
    from agent_gateway_store.store import GatewayStore

app = typer.Typer(no_args_is_help=True, help="See how far sinks are, and send again what they refused.")

SinkArgument = Annotated[str, typer.Argument(help="As its plugin names it: file-sink, http-sink, ...")]
OnlyArgument = Annotated[str | None, typer.Argument(help="Only those of this one.")]
_COLUMNS = {
    "sink": "sink",
    "org_id": "organisation",
    "lag_s": "lag (s)",
    "dead": "dead",
    "due": "due",
    "moved_at": "moved",
    "last_error": "last error",
}
_DEAD = {"created_at": "refused", "sink": "sink", "request_id": "request id", "error": "error", "is_due": "due"}


@audit.app.command()
def ship(
    ctx: typer.Context,
    sink: SinkArgument,
    once: Annotated[bool, typer.Option("--once", help="End where the log ends.")] = False,
    start: Annotated[
        Literal["beginning", "now"], typer.Option(help="Where a new sink begins; later it goes on where it was.")
    ] = "beginning",
    batch: Annotated[int, typer.Option(min=1, max=100_000, help="The most events at a time.")] = 500,
    interval: Annotated[float, typer.Option(min=0.05, help="Seconds between two reads of the database.")] = 1.0,
    json: JsonOption = False,
) -> None:
    """Send the audit log to a sink, in order, until Ctrl-C or SIGTERM; what was sent is remembered in the database.

    Each event arrives at least once. One process at a time ships to a sink, and others wait for their turn; with --once
    they end with exit code 5, as they do where the sink or the database is away.
    """
    from agent_gateway_store.errors import InvalidCursorError

    async def work(store: GatewayStore) -> int:
        if not once:
            complain(f"Shipping to {sink}.")
        return await until_stopped(store.audit.ship(sink, once=once, start=start, batch=batch, poll_s=interval))

    try:
        with logging_shown():
            sent = in_store(ctx, work, settings=silent(ctx))
    except InvalidCursorError as exc:
        raise CommandError(f"{exc} `gateway-store sinks forget {sink}` lets it.", ExitCode.USAGE) from exc
    if once:
        print_result({"sent": sent}, f"{count_text(sent, 'event')} arrived.", as_json=json)


@app.command("list")
def list_sinks(ctx: typer.Context, json: JsonOption = False) -> None:
    """Show for each sink the age of the oldest event that it has not taken, and how many it has refused for good."""
    print_page(read_store(ctx, lambda store: store.sinks.list(), as_json=json), columns=_COLUMNS, as_json=json)


@app.command()
def dead(
    ctx: typer.Context,
    sink: OnlyArgument = None,
    limit: Annotated[int, typer.Option(min=1, max=1000)] = 50,
    json: JsonOption = False,
) -> None:
    """List the events that sinks refused for good, newest first."""
    found = read_store(ctx, lambda store: store.sinks.dead_letters(sink, limit), as_json=json)
    print_page(found, columns=_DEAD, as_json=json)


@app.command()
def redrive(
    ctx: typer.Context,
    sink: OnlyArgument = None,
    json: JsonOption = False,
) -> None:
    """Send dead letters again: `audit ship` does it next, before new events."""
    count = in_store(ctx, lambda store: store.sinks.redrive(sink))
    print_result({"redriven": count}, f"{count} dead letters are due again.", as_json=json)


@app.command()
def forget(ctx: typer.Context, sink: SinkArgument, json: JsonOption = False) -> None:
    """Forget how far a sink is, and what it refused, so that `audit ship` begins anew."""
    known: Any = in_store(ctx, lambda store: store.sinks.forget(sink))
    if not known:
        raise CommandError("Nothing was shipped to this sink: see `gateway-store sinks list`.", ExitCode.NOT_FOUND)
    print_result({"forgotten": sink}, f"The sink {sink} begins anew.", as_json=json)
