"""`gateway-store retention`: holds, pruning into an archive, erasing. For a role that owns the tables."""

from __future__ import annotations

import sys
from collections.abc import Awaitable, Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer

from agent_gateway_store.cli.audit import count_text, filtered
from agent_gateway_store.cli.context import in_store, read_store, require_no_org
from agent_gateway_store.cli.errors import CommandError, ExitCode, file_errors
from agent_gateway_store.cli.output import JsonOption, print_page, print_result, to_dict

if TYPE_CHECKING:
    from agent_gateway_store.retention import RetentionManager

T = TypeVar("T")

app = typer.Typer(name="retention", no_args_is_help=True, help="Hold, prune into an archive, and erase.")

ByOption = Annotated[str, typer.Option(metavar="NAME", help="Who asks for it, as the log will say.")]
ReasonOption = Annotated[str, typer.Option(help="Why, as the log will say.")]
BeforeOption = Annotated[str, typer.Option(help="What is older goes: 400d, or 2026-01-01.")]
IntoOption = Annotated[
    Path | None, typer.Option(file_okay=False, metavar="DIR", help="The archive; made if it is missing.")
]
DiscardOption = Annotated[bool, typer.Option("--discard", help="No archive: what goes is gone for good.")]
BelowFloorOption = Annotated[
    bool, typer.Option("--below-floor", help="Also what is younger than AUDIT_RETENTION_FLOOR_DAYS.")
]
ArchiveOption = Annotated[
    Path | None, typer.Option(exists=True, file_okay=False, metavar="DIR", help="Where pruned events are.")
]


@app.command()
def prune(
    ctx: typer.Context,
    before: BeforeOption,
    by: ByOption,
    archive: IntoOption = None,
    discard: DiscardOption = False,
    below_floor: BelowFloorOption = False,
    max_seconds: Annotated[float | None, typer.Option(min=0, help="Begin no batch after so many seconds.")] = None,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress bar.")] = False,
    json: JsonOption = False,
) -> None:
    """Move sealed events, the oldest first, from the table to an archive of Parquet files by day."""
    require_no_org(ctx)
    _require_one(archive, discard)
    options: Any = {"archive": archive, "discard": discard, "below_floor": below_floor, "max_seconds": max_seconds}
    shown = sys.stderr.isatty() and not quiet and not json
    done = _changed(ctx, lambda service: service.prune(before, by=by, progress=shown, **options), archive)
    text = f"{count_text(done.events, 'event')} pruned in {count_text(done.files, 'file')}; {done.held:,} are held"
    if done.remaining:
        text += f"; {done.remaining:,} remain for the next run"
    print_result(to_dict(done), f"{text}.", as_json=json)


@app.command()
@filtered
def hold(
    ctx: typer.Context,
    name: Annotated[str, typer.Argument(help="By which it is released.")],
    filters: dict[str, Any],
    reason: ReasonOption,
    by: ByOption,
    json: JsonOption = False,
) -> None:
    """Keep events that match from being pruned and erased, also those that arrive later. No filter: all of them."""
    require_no_org(ctx)
    placed = _changed(ctx, lambda service: service.hold(name, reason=reason, by=by, **filters))
    print_result(to_dict(placed), f"The hold {placed.name} is in force.", as_json=json)


@app.command()
def release(
    ctx: typer.Context,
    name: Annotated[str, typer.Argument(help="Of the hold.")],
    by: ByOption,
    json: JsonOption = False,
) -> None:
    """Release a hold."""
    require_no_org(ctx)
    released = _changed(ctx, lambda service: service.release_hold(name, by=by))
    print_result(to_dict(released), f"The hold {released.name} is released.", as_json=json)


@app.command()
def holds(ctx: typer.Context, json: JsonOption = False) -> None:
    """List the holds in force."""
    require_no_org(ctx)
    found = read_store(ctx, lambda store: store.retention.holds(), as_json=json)
    columns = {"name": "Name", "reason": "Reason", "by": "By", "placed_at": "Placed", "filters": "Covers"}
    print_page(found, columns=columns, whole=("name",), as_json=json)


@app.command()
def erase(
    ctx: typer.Context,
    request_id: Annotated[str, typer.Argument(help="Of the call, as the gateway gave it.")],
    reason: ReasonOption,
    by: ByOption,
    archive: ArchiveOption = None,
    json: JsonOption = False,
) -> None:
    """Blank what one call held, in the table or in the archive, with its approvals and notices."""
    done = _changed(ctx, lambda service: service.erase(request_id, reason=reason, by=by, archive=archive), archive)
    place = "the archive" if done.archived else "the table"
    also = f"{count_text(done.approvals, 'approval')} and {count_text(done.notices, 'notice')}"
    print_result(to_dict(done), f"Erased at position {done.position:,} in {place}, with {also}.", as_json=json)


@app.command()
def find(
    ctx: typer.Context,
    caller_id: Annotated[str | None, typer.Option("--caller", help="Of this caller.")] = None,
    text: Annotated[str | None, typer.Option(help="Part of arguments, ids, labels, rationales or notes.")] = None,
    archive: ArchiveOption = None,
    json: JsonOption = False,
) -> None:
    """List what an erasure request is about: events and approvals, the archive included."""
    with file_errors(archive, typer.BadParameter):
        found = read_store(
            ctx, lambda store: store.retention.find(caller_id=caller_id, text=text, archive=archive), as_json=json
        )
    columns = {"kind": "Kind", "request_id": "Request", "timestamp": "Time", "caller_id": "Caller"}
    print_page(found, columns=columns | {"tool_name": "Tool", "file": "File"}, whole=("request_id",), as_json=json)


@app.command("prune-approvals")
def prune_approvals(
    ctx: typer.Context,
    before: BeforeOption,
    by: ByOption,
    archive: IntoOption = None,
    discard: DiscardOption = False,
    below_floor: BelowFloorOption = False,
    json: JsonOption = False,
) -> None:
    """Take approvals that are over and that no event cites out of the table, with votes and delivered notices."""
    require_no_org(ctx)
    _require_one(archive, discard)
    options: Any = {"archive": archive, "discard": discard, "below_floor": below_floor}
    done = _changed(ctx, lambda service: service.prune_approvals(before, by=by, **options), archive)
    text = f"{count_text(done.approvals, 'approval')} and {count_text(done.notices, 'notice')} pruned."
    print_result(to_dict(done), text, as_json=json)


def _require_one(archive: Path | None, discard: bool) -> None:
    if (archive is None) is not discard:
        raise CommandError("Give --archive with a folder, or --discard to keep nothing; not both.", ExitCode.USAGE)


def _changed(ctx: typer.Context, work: Callable[[RetentionManager], Awaitable[T]], folder: Path | None = None) -> T:
    with file_errors(folder, partial(CommandError, code=ExitCode.USAGE)):
        return in_store(ctx, lambda store: work(store.retention))
