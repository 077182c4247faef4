"""`gateway-store approvals`: see what waits for a decision, and decide."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from agent_gateway_store.cli.output import JsonOption, print_fields, print_json, print_page, record, say
from agent_gateway_store.cli.running import choose, open_store, run

if TYPE_CHECKING:
    from agent_gateway_store.models import ApprovalResult

__all__ = ["app"]

app = typer.Typer(no_args_is_help=True, help="List approvals and decide them.")

IdArgument = Annotated[str, typer.Argument(metavar="APPROVAL_ID", help="As `approvals list` shows it.")]
ApproverOption = Annotated[str, typer.Option(help="Who decides, as written to the record.")]
NoteOption = Annotated[str, typer.Option(help="Why.")]
_COLUMNS = {
    "approval_id": "approval id",
    "created_at": "asked",
    "caller_id": "caller",
    "tool_call": "tool call",
    "status": "status",
    "approver_id": "approver",
}


@app.command("list")
def list_approvals(
    ctx: typer.Context,
    status: Annotated[
        str | None, typer.Option(help="PENDING, APPROVED, DENIED, EXPIRED, CANCELLED or USED; default: all.")
    ] = None,
    limit: Annotated[int, typer.Option(min=1, max=1000)] = 50,
    cursor: Annotated[str | None, typer.Option(help="Where the page before ended.")] = None,
    json: JsonOption = False,
) -> None:
    """List approvals, newest first."""
    from agent_gateway_store.models import ApprovalStatus

    wanted = None if status is None else choose(ApprovalStatus, status, "--status")

    async def work() -> Any:
        async with open_store(ctx) as store:
            return await store.approvals.list_requests(wanted, limit=limit, cursor=cursor)

    print_page(
        run(work()),
        columns=_COLUMNS,
        whole={"approval_id", "status"},
        optional={"created_at", "approver_id"},
        as_json=json,
    )


@app.command()
def show(ctx: typer.Context, approval_id: IdArgument, json: JsonOption = False) -> None:
    """Show one approval with its sanitised arguments."""

    async def work() -> Any:
        async with open_store(ctx) as store:
            return await store.approvals.get(approval_id=approval_id)

    found = record(run(work()))
    if json:
        print_json(found)
        return
    if found["status"] == "USED" and found["outcome"] is None:
        found["outcome"] = "unknown"
    print_fields((name, value) for name, value in found.items() if name not in ("id", "version") and value is not None)


@app.command()
def approve(
    ctx: typer.Context,
    approval_id: IdArgument,
    approver: ApproverOption,
    note: NoteOption = "",
    json: JsonOption = False,
) -> None:
    """Approve a pending call, once."""
    _decide(ctx, "approve", approval_id, approver, note, json)


@app.command()
@app.command("reject", hidden=True)
@app.command("decline", hidden=True)
def deny(
    ctx: typer.Context,
    approval_id: IdArgument,
    approver: ApproverOption,
    note: NoteOption = "",
    json: JsonOption = False,
) -> None:
    """Deny a pending call, once."""
    _decide(ctx, "deny", approval_id, approver, note, json)


def _decide(
    ctx: typer.Context, move: Literal["approve", "deny"], approval_id: str, approver: str, note: str, as_json: bool
) -> None:
    if not approver.strip():
        raise typer.BadParameter("--approver must not be empty.")

    async def work() -> ApprovalResult:
        async with open_store(ctx) as store:
            decide = store.approvals.approve if move == "approve" else store.approvals.deny
            return await decide(approver_id=approver, note=note, approval_id=approval_id, channel="cli")

    result = run(work())
    if as_json:
        print_json(record(result))
    elif result.status == "PENDING":
        say(f"The vote of {approver} is counted; approval {result.approval_id} waits for others.")
    else:
        say(f"Approval {result.approval_id} is {result.status}.")
