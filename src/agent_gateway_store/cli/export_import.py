"""`gateway-store audit export` and `audit import`: events to files and back."""

from __future__ import annotations

import sys
from errno import EDQUOT, ENOSPC
from os import strerror
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from agent_gateway_store.cli.audit import app, filtered
from agent_gateway_store.cli.context import open_store, run
from agent_gateway_store.cli.errors import CommandError, ExitCode
from agent_gateway_store.cli.output import JsonOption, print_json, say
from agent_gateway_store.errors import GatewayStoreError

if TYPE_CHECKING:
    from collections import Counter

    from agent_gateway_store.audit.export import ExportResult

__all__ = ["app"]

QuietOption = Annotated[bool, typer.Option("--quiet", "-q", help="No progress bar.")]


@app.command("export")
@filtered
def export_events(
    ctx: typer.Context,
    path: Annotated[Path, typer.Argument(help="File (or folder of a dataset) to write; must not be there yet.")],
    filters: dict[str, Any],
    format: Annotated[  # noqa: A002  the option's name
        str | None, typer.Option(help="jsonl, csv or parquet; default: by the name's suffix.")
    ] = None,
    compression: Annotated[str | None, typer.Option(help="gzip or zstd; default: by the suffix.")] = None,
    partition_by: Annotated[
        str | None, typer.Option(help="day: a Parquet dataset with a folder for each UTC day.")
    ] = None,
    raw: Annotated[bool, typer.Option(help="CSV: leave what a spreadsheet could take for a formula as it is.")] = False,
    overwrite: Annotated[bool, typer.Option(help="Replace what is there.")] = False,
    quiet: QuietOption = False,
    json: JsonOption = False,
) -> None:
    """Write the audit events that match to a file, oldest first; under its name only when it is whole."""

    async def work() -> ExportResult:
        async with open_store(ctx) as store:
            options: Any = {"format": format, "compression": compression, "partition_by": partition_by}
            shown = sys.stderr.isatty() and not quiet
            return await store.audit.export(path, raw=raw, overwrite=overwrite, progress=shown, **options, **filters)

    try:
        result = run(work())
    except GatewayStoreError:
        raise
    except OSError as exc:
        raise CommandError(_reason(exc, path)) from exc
    except ValueError as exc:
        raise typer.BadParameter(str(exc)) from None
    if json:
        print_json({**vars(result), "path": str(result.path)})
        return
    say(f"{result.rows:,} events in {_count(result.files, 'file')} of {result.bytes:,} bytes: {result.path}")


@app.command("import")
def import_events(
    ctx: typer.Context,
    path: Annotated[Path, typer.Argument(help="JSONL (also .gz, .zst) or Parquet file, or the folder of a dataset.")],
    format: Annotated[str | None, typer.Option(help="jsonl or parquet; default: by the suffix.")] = None,  # noqa: A002
    quiet: QuietOption = False,
    json: JsonOption = False,
) -> None:
    """Store the events of a file that `audit export` wrote; those that are stored already change nothing."""

    from agent_gateway_store.audit.outcomes import WriteOutcome

    async def work() -> Counter[WriteOutcome]:
        async with open_store(ctx) as store:
            shown = sys.stderr.isatty() and not quiet
            return await store.audit.import_file(path, format=format, progress=shown)  # type: ignore[arg-type]

    try:
        outcomes = run(work())
    except GatewayStoreError:
        raise
    except (OSError, ValueError) as exc:
        raise CommandError(_reason(exc, path)) from exc
    if json:
        print_json({str(outcome): number for outcome, number in sorted(outcomes.items())})
    else:
        say(", ".join(f"{number:,} {outcome}" for outcome, number in sorted(outcomes.items())) or "0 events")
    if lost := outcomes.get(WriteOutcome.LOST):
        raise CommandError(
            f"{_count(lost, 'event')} could not be stored: check the database with `gateway-store doctor`.",
            ExitCode.UNAVAILABLE,
        )


def _reason(exc: Exception, path: Path) -> str:
    """Return what is wrong; of the system's own errors the one name that the user gave."""
    if not isinstance(exc, OSError) or exc.errno is None:
        return str(exc)
    step = "make room" if exc.errno in (ENOSPC, EDQUOT) else "check the path and its permissions"
    return f"{path}: {strerror(exc.errno)}: {step} and try again."


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"
