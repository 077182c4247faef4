"""`gateway-store approvals`: list the approvals that wait for a decision, and decide them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Literal
from uuid import uuid4

import typer

from agent_gateway_store._text import CUT_CALL, is_blank
from agent_gateway_store.cli.audit import add_stats, filter_options
from agent_gateway_store.cli.context import in_store, json_object, read_store
from agent_gateway_store.cli.errors import ExitCode
from agent_gateway_store.cli.export_import import add_export
from agent_gateway_store.cli.output import (
    JsonOption,
    complain,
    print_fields,
    print_json,
    print_page,
    print_result,
    say,
    to_dict,
)

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from agent_gateway_store.models.approval import ApprovalRequest, ApprovalResult
    from agent_gateway_store.store import GatewayStore

app = typer.Typer(name="approvals", no_args_is_help=True, help="List approvals and decide them.")

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
    "votes": "votes",
}

_OPTIONS: dict[str, tuple[str, str]] = {
    "status": ("--status", "PENDING, APPROVED, DENIED, EXPIRED, CANCELLED or USED; default: all."),
    "caller_id": ("--caller", "Asked by this caller."),
    "tool_name": ("--tool", "Calls of this tool."),
    "mcp_server": ("--server", "Calls to this server."),
    "org_id": ("--org-id", "Of this organisation, in a store that sees several."),
    "approver_id": ("--approver", "Decided by this approver."),
    "outcome": ("--outcome", 'What came of the use, or "unknown".'),
    "request_id": ("--request-id", "For this request id."),
    "since": ("--since", "Asked from this time on: 24h ago, or 2026-05-01T12:00Z."),
    "until": ("--until", "Asked before this time."),
    "text": ("--text", "Text in the tool, the risk explanation or the note."),
}


def _check(filters: dict[str, Any]) -> None:
    from agent_gateway_store.approval.filters import criteria

    criteria(filters)


def _groups() -> Sequence[str]:
    from agent_gateway_store.approval.reports import GROUPS

    return GROUPS


filtered = filter_options(_OPTIONS, _check, capitals=("status",))


@app.command("list")
@filtered
def list_approvals(
    ctx: typer.Context,
    filters: dict[str, Any],
    limit: Annotated[int, typer.Option(min=1, max=1000)] = 50,
    cursor: Annotated[str | None, typer.Option(help="Where the previous page ended; with the same filters.")] = None,
    json: JsonOption = False,
) -> None:
    """List the approvals that match every filter, newest first."""
    page = read_store(ctx, lambda store: store.approvals.search(limit=limit, cursor=cursor, **filters), as_json=json)
    print_page(
        page,
        columns=_COLUMNS,
        whole={"approval_id", "status"},
        optional={"created_at", "approver_id", "votes"},
        as_json=json,
    )
    _warn(page, as_json=json)


def _warn(found: Iterable[ApprovalRequest], *, as_json: bool) -> None:
    """Say of which approvals the call was cut when it was stored; where programs read the output, beside it."""
    for each in found:
        if each.tool_call.is_cut:
            (complain if as_json else say)(f"Approval {each.approval_id}: {CUT_CALL}")


add_stats(
    app,
    "approvals",
    filtered,
    groups=_groups,
    help="Count approvals, and how many seconds they waited for a decision (percentiles).",
)
add_export(
    app,
    "approvals",
    filtered,
    help="Write the approvals that match, with their votes, to a file, oldest first; without tokens and outputs.",
)


@app.command()
def history(ctx: typer.Context, approval_id: IdArgument, json: JsonOption = False) -> None:
    """Show what happened to an approval: who asked, voted and decided, what was called, and who was notified."""
    from agent_gateway_store.results import Page

    found = read_store(ctx, lambda store: store.approvals.history(approval_id), as_json=json)
    rows = [{**row, "at": f"{row['at'].isoformat().removesuffix('+00:00')}Z"} for row in found]
    print_page(
        Page(rows), columns={name: name for name in ("at", "event", "by", "status", "note", "channel")}, as_json=json
    )


@app.command()
def show(ctx: typer.Context, approval_id: IdArgument, json: JsonOption = False) -> None:
    """Show one approval with its sanitised arguments."""
    request = read_store(ctx, lambda store: store.approvals.get(approval_id=approval_id), as_json=json)
    _warn([request], as_json=json)
    found = to_dict(request)
    if json:
        print_json(found)
        return
    if found["status"] == "USED" and found["outcome"] is None:
        found["outcome"] = "unknown"
    print_fields((name, value) for name, value in found.items() if name not in ("id", "version") and value is not None)


@app.command()
def acquire(
    ctx: typer.Context,
    server: Annotated[str, typer.Option(help="The server that the call is for.")],
    tool: Annotated[str, typer.Option(help="The tool that is called.")],
    caller: Annotated[str, typer.Option(help="Who makes the call.")],
    arguments: Annotated[str, typer.Option(help="Its arguments as a JSON object; approvers see them.")] = "{}",
    reason: Annotated[str, typer.Option(help="Why a human is asked.")] = "",
    request_id: Annotated[str | None, typer.Option(help="The id of the call; default: a new one.")] = None,
    approvals: Annotated[int, typer.Option(min=1, help="How many different approvers must approve.")] = 1,
    bind: Annotated[str, typer.Option(help="Whatever else must be equal, such as a session.")] = "",
    wait: Annotated[float, typer.Option(min=0, help="Seconds to wait for a decision.")] = 0,
    json: JsonOption = False,
) -> None:
    """Ask whether a call may run now: ends with 0 (run it once), 6 (pending, ask again later) or 7 (refused)."""
    from agent_gateway_store.models.approval import ApprovalRequest
    from agent_gateway_store.models.values import ApprovalStatus, ToolCall

    call = ToolCall(server=server, tool=tool, arguments=json_object(arguments, "--arguments"))
    request = ApprovalRequest(
        request_id=request_id or uuid4().hex,
        caller_id=caller,
        tool_call=call,
        risk_explanation=reason,
        required_approvals=approvals,
    )
    result = in_store(ctx, lambda store: store.approvals.acquire(request, bind=bind, wait_s=wait))
    outcomes = {
        ApprovalStatus.USED: (ExitCode.OK, "released the call: run it now, once."),
        ApprovalStatus.PENDING: (ExitCode.PENDING, "is PENDING: run this command again after the decision."),
    }
    refused = (ExitCode.REFUSED, f"is {result.status}: the call must not run.")
    code, text = outcomes.get(result.status, refused)
    print_result(to_dict(result), f"Approval {result.approval_id} {text}", as_json=json)
    raise typer.Exit(code)


def _add_decision(verb: Literal["approve", "deny"], *hidden: str) -> None:
    def decide(
        ctx: typer.Context,
        approval_id: IdArgument,
        approver: ApproverOption,
        note: NoteOption = "",
        json: JsonOption = False,
    ) -> None:
        if is_blank(approver):
            raise typer.BadParameter("--approver must not be empty.")

        async def work(store: GatewayStore) -> ApprovalResult:
            decision = store.approvals.approve if verb == "approve" else store.approvals.deny
            return await decision(approver_id=approver, note=note, approval_id=approval_id, channel="cli")

        result = in_store(ctx, work)
        if result.status == "PENDING":
            text = f"The vote of {approver} is counted; approval {result.approval_id} waits for others."
        else:
            text = f"Approval {result.approval_id} is {result.status}."
        print_result(to_dict(result), text, as_json=json)

    for name in (verb, *hidden):
        app.command(name, help=f"{verb.capitalize()} a pending call, once.", hidden=name in hidden)(decide)


_add_decision("approve")
# Models and people say these for `deny`; the store's own word is the one in the help.
_add_decision("deny", "reject", "decline")
