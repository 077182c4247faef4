"""`gateway-store sinks`: how far each is, and what it has refused."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from agent_gateway_store.cli.context import in_store, read_store
from agent_gateway_store.cli.errors import CommandError, ExitCode
from agent_gateway_store.cli.output import JsonOption, print_page, print_result

if TYPE_CHECKING:
    from agent_gateway_store.results import Page
    from agent_gateway_store.store import GatewayStore

app = typer.Typer(name="sinks", no_args_is_help=True, help="See how far sinks are, and send again what they refused.")

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
_UNKNOWN = CommandError("Nothing was shipped to this sink: see `gateway-store sinks list`.", ExitCode.NOT_FOUND)
_DEAD = {"created_at": "refused", "sink": "sink", "request_id": "request id", "error": "error", "is_due": "due"}


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

    async def work(store: GatewayStore) -> Page[dict[str, Any]]:
        await _require_known(store, sink)
        return await store.sinks.dead_letters(sink, limit)

    print_page(read_store(ctx, work, as_json=json), columns=_DEAD, as_json=json)


@app.command()
def redrive(
    ctx: typer.Context,
    sink: OnlyArgument = None,
    json: JsonOption = False,
) -> None:
    """Send dead letters again: `audit ship` does it next, before new events."""

    async def work(store: GatewayStore) -> int:
        await _require_known(store, sink)
        return await store.sinks.redrive(sink)

    count = in_store(ctx, work)
    print_result({"redriven": count}, f"{count} dead letters are due again.", as_json=json)


@app.command()
def forget(ctx: typer.Context, sink: SinkArgument, json: JsonOption = False) -> None:
    """Forget how far a sink is, and what it refused, so that `audit ship` begins anew."""
    if not in_store(ctx, lambda store: store.sinks.forget(sink)):
        raise _UNKNOWN
    print_result({"forgotten": sink}, f"The sink {sink} begins anew.", as_json=json)


async def _require_known(store: GatewayStore, sink: str | None) -> None:
    if sink is not None and sink not in {each["sink"] for each in await store.sinks.list()}:
        raise _UNKNOWN
