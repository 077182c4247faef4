"""`gateway-store audit export`, `import` and `ship`: events to files and back, and to sinks."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from agent_gateway_store.cli.audit import app, count_text, filtered, require_none_lost
from agent_gateway_store.cli.context import in_store, read_store
from agent_gateway_store.cli.errors import CommandError, ExitCode, file_errors
from agent_gateway_store.cli.notifications import logging_shown, silent, until_stopped
from agent_gateway_store.cli.output import JsonOption, complain, print_result
from agent_gateway_store.errors import InvalidCursorError

if TYPE_CHECKING:
    from agent_gateway_store.store import GatewayStore

__all__ = ["app"]

FormatOption = Annotated[str | None, typer.Option(help="jsonl, csv or parquet; default: by the name's suffix.")]
CompressionOption = Annotated[str | None, typer.Option(help="gzip or zstd; default: by the suffix.")]
PartitionOption = Annotated[str | None, typer.Option(help="day: a Parquet dataset with a folder for each UTC day.")]
RawOption = Annotated[bool, typer.Option(help="CSV: leave what a spreadsheet could take for a formula as it is.")]
OverwriteOption = Annotated[bool, typer.Option(help="Replace what exists.")]
QuietOption = Annotated[bool, typer.Option("--quiet", "-q", help="No progress bar.")]


def add_export(
    app: typer.Typer,
    service: Literal["audit", "approvals"],
    filtered: Callable[[Callable[..., None]], Callable[..., None]],
    *,
    help: str,  # noqa: A002  as Typer has it
) -> None:
    """Add the command `export` of a service, with the options of `filtered`."""

    @app.command(help=help)
    @filtered
    def export(
        ctx: typer.Context,
        path: Annotated[Path, typer.Argument(help="File (or folder of a dataset) to write; must not exist.")],
        filters: dict[str, Any],
        format: FormatOption = None,  # noqa: A002  the option's name
        compression: CompressionOption = None,
        partition_by: PartitionOption = None,
        raw: RawOption = False,
        overwrite: OverwriteOption = False,
        quiet: QuietOption = False,
        json: JsonOption = False,
    ) -> None:
        options: Any = {"format": format, "compression": compression, "partition_by": partition_by, **filters}
        options |= {"raw": raw, "overwrite": overwrite, "progress": sys.stderr.isatty() and not quiet}
        with file_errors(path, typer.BadParameter):
            result = read_store(ctx, lambda store: getattr(store, service).export(path, **options), as_json=json)
        rows = f"{result.rows:,} {'events' if service == 'audit' else service}"
        text = f"{rows} in {count_text(result.files, 'file')} of {result.bytes:,} bytes: {result.path}"
        print_result({**vars(result), "path": str(result.path)}, text, as_json=json)


add_export(
    app,
    "audit",
    filtered,
    help="Write the audit events that match to a file, oldest first; it takes its name only when it is complete.",
)


@app.command("import")
def import_events(
    ctx: typer.Context,
    path: Annotated[Path, typer.Argument(help="JSONL (also .gz, .zst) or Parquet file, or the folder of a dataset.")],
    format: Annotated[str | None, typer.Option(help="jsonl or parquet; default: by the suffix.")] = None,  # noqa: A002
    keep_going: Annotated[
        bool, typer.Option("--keep-going", help="Report the records that are refused, and store the others.")
    ] = False,
    quiet: QuietOption = False,
    json: JsonOption = False,
) -> None:
    """Store the events of a file that `audit export` wrote; those that are stored already change nothing."""
    form: Any = format
    shown = sys.stderr.isatty() and not quiet
    refused: list[str] = []
    with file_errors(path):
        outcomes = in_store(
            ctx,
            lambda store: store.audit.import_file(
                path, format=form, on_refused=refused.append if keep_going else None, progress=shown
            ),
        )
    found = {str(outcome): number for outcome, number in sorted(outcomes.items())}
    text = ", ".join(f"{number:,} {outcome}" for outcome, number in found.items()) or "0 events"
    print_result(found, text, as_json=json)
    for sentence in refused:
        complain(sentence)
    require_none_lost(found.get("LOST", 0))
    if refused:
        raise CommandError(f"{count_text(len(refused), 'record')} refused: the others are stored.")


@app.command()
def ship(
    ctx: typer.Context,
    sink: Annotated[str, typer.Argument(help="As its plugin names it: file-sink, http-sink, ...")],
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
