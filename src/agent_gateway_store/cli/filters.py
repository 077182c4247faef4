"""The filters of the audit log as options, the same for every command that reads it."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import wraps
from typing import Annotated, Any

import typer

__all__ = ["filtered"]

_MANY = "may be given several times"
_OPTIONS: dict[str, tuple[Any, str, str]] = {
    "caller_id": (list[str] | None, "--caller", f"Events of this caller ({_MANY}, as the next ones)."),
    "decision": (list[str] | None, "--decision", "ALLOW, DENY, APPROVAL_REQUIRED or SANITIZE_AND_ALLOW."),
    "tool_name": (list[str] | None, "--tool", "Calls of this tool."),
    "mcp_server": (list[str] | None, "--server", "Calls to this server."),
    "org_id": (list[str] | None, "--org-id", "Events of this organisation, in a store that sees several."),
    "environment": (list[str] | None, "--environment", "prod, dev, ..."),
    "session_id": (list[str] | None, "--session", "Events of this session."),
    "trace_id": (list[str] | None, "--trace", "Events of this trace."),
    "key_id": (list[str] | None, "--key", "Calls under this API key id."),
    "approver_id": (list[str] | None, "--approver", "Calls that this approver decided."),
    "risk_label": (list[str] | None, "--label", "Events with this risk label."),
    "execution_status": (
        list[str] | None,
        "--status",
        "SUCCESS, TOOL_ERROR, TIMEOUT, CANCELLED or APPROVED_OUTPUT_RELEASE.",
    ),
    "min_risk_score": (float | None, "--min-risk-score", "This risk score or a higher one."),
    "since": (str | None, "--since", "From this time on: 24h or 7d ago, or 2026-05-01T12:00Z."),
    "until": (str | None, "--until", "Before this time."),
    "text": (str | None, "--text", "Stands in the tool name or the rationale, in any case."),
}
_CAPITALS = ("decision", "execution_status")


def filtered(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command an option for each filter; its argument `filters` gets those in use."""

    @wraps(command)
    def with_options(*args: Any, **given: Any) -> None:
        filters = {name: given.pop(name) for name in _OPTIONS}
        for name in _CAPITALS:
            filters[name] = [each.upper() for each in filters[name] or ()]
        filters = {name: value for name, value in filters.items() if value not in (None, [])}
        from agent_gateway_store.audit.filters import criteria

        try:
            criteria(filters, org_id=None)
        except ValueError as exc:
            raise typer.BadParameter(str(exc)) from None
        command(*args, filters=filters, **given)

    signature = inspect.signature(command, eval_str=True)
    own = [each for each in signature.parameters.values() if each.name != "filters"]
    only = inspect.Parameter.KEYWORD_ONLY
    options = [
        inspect.Parameter(name, only, default=None, annotation=Annotated[kind, typer.Option(flag, help=text)])
        for name, (kind, flag, text) in _OPTIONS.items()
    ]
    with_options.__signature__ = signature.replace(  # type: ignore[attr-defined]
        parameters=[*(each.replace(kind=only) for each in own), *options]
    )
    return with_options
