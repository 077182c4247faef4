"""`gateway-store demo --events N`: fill a store with two weeks of history, to explore in a notebook."""

from __future__ import annotations

import sys
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any
from uuid import UUID

from agent_gateway_store.cli.output import say
from agent_gateway_store.clock import utc_now
from agent_gateway_store.errors import ApiKeyExistsError

if TYPE_CHECKING:
    from rich.progress import Progress

    from agent_gateway_store.audit import WriteOutcome
    from agent_gateway_store.demo.history import Approval, Call
    from agent_gateway_store.models.approval import ApprovalRequest
    from agent_gateway_store.models.audit import AuditEvent
    from agent_gateway_store.store import GatewayStore

# Rows of one transaction: as many as `write_many` commits at a time.
_CHUNK = 500
# Of a store that is there to be explored.
_KEYS = 1000
_PENDING: tuple[tuple[str, dict[str, Any], str], ...] = (
    ("payments.refund_payment", {"payment": "pay_918273", "amount_eur": 249.9}, "Refunds cannot be undone."),
    ("kubernetes.restart_deployment", {"deployment": "checkout", "namespace": "production"}, "Touches production."),
    ("crm.export_contacts", {"segment": "vip", "format": "csv"}, "Personal data of many customers."),
    ("files.delete_file", {"path": "deploy/values.yaml"}, "The file is deleted for good."),
)
_ASKING = {"payments": "support-agent", "kubernetes": "oncall-agent", "crm": "support-agent", "files": "coding-agent"}


async def fill(store: GatewayStore, count: int, *, seed: int, until: datetime | None = None) -> dict[str, Any]:
    """Write `count` calls with their approvals, the callers' API keys, and four approvals that wait now; say what.

    The history ends at `until`, by default the last full hour. To write the same again changes nothing.
    """
    from agent_gateway_store.demo.history import DAYS, history

    started = time.perf_counter()
    end = until.astimezone(UTC) if until else utc_now().replace(minute=0, second=0, microsecond=0)
    keys = await _issue_keys(store)
    approvals: list[Approval] = []
    with _progress() as progress:
        made = history(count, seed=seed, end=end, keys=keys)
        calls = progress.track(made, total=count, description="Writing events")
        outcomes: Counter[WriteOutcome] = await store.audit.write_many(_events(calls, approvals))
    decided = await _write_approvals(store, approvals)
    pending = await _ask(store, seed)
    seconds = time.perf_counter() - started
    return {
        "events": {str(outcome): number for outcome, number in outcomes.items()},
        "approvals": decided,
        "pending": pending,
        "keys": len(keys),
        "since": (end - timedelta(days=DAYS)).isoformat(),
        "until": end.isoformat(),
        "seed": seed,
        "seconds": round(seconds, 3),
    }


def show_filled(summary: dict[str, Any]) -> None:
    """Print what was written."""
    stored = ", ".join(f"{number:,} {outcome}" for outcome, number in summary["events"].items())
    say(f"Events    {stored}; from {summary['since'][:10]} to {summary['until'][:16].replace('T', ' ')} UTC.")
    say(f"Approvals {summary['approvals']:,} in the history, {summary['pending']} waiting for a decision now.")
    say(f"Keys      {summary['keys']} callers have API keys.")


def _progress() -> Progress:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    return Progress(*columns, console=Console(stderr=True), transient=True, disable=not sys.stderr.isatty())


def _events(calls: Iterable[Call], approvals: list[Approval]) -> Iterator[AuditEvent]:
    for call in calls:
        if call.approval is not None:
            approvals.append(call.approval)
        yield call.event


async def _write_approvals(store: GatewayStore, approvals: Sequence[Approval]) -> int:
    """Insert decided approvals as rows, since no method of the store can decide in the past."""
    from sqlalchemy import select
    from sqlmodel import col

    from agent_gateway_store.models.approval import ApprovalRequest

    for start in range(0, len(approvals), _CHUNK):
        some = approvals[start : start + _CHUNK]
        ids = [approval.request.approval_id for approval in some]
        async with store.database.sessions() as session, session.begin():
            found = await session.execute(
                select(col(ApprovalRequest.approval_id)).where(col(ApprovalRequest.approval_id).in_(ids))
            )
            known: set[UUID] = set(found.scalars())
            new = [approval for approval in some if approval.request.approval_id not in known]
            session.add_all(_of_org(approval.request, store.org_id) for approval in new)
            # Requests before votes, which refer to them.
            await session.flush()
            session.add_all(_of_org(approval.vote, store.org_id) for approval in new if approval.vote is not None)
    return len(approvals)


def _of_org(row: Any, org_id: str | None) -> Any:
    if org_id is not None:
        row.org_id = org_id
    return row


async def _ask(store: GatewayStore, seed: int) -> int:
    """Ask for the approvals that wait now, unless they do already: with another deadline, one would wait twice."""
    requests = [_request(seed, number, *asked) for number, asked in enumerate(_PENDING)]
    waiting = await store.approvals.search(status="PENDING", request_id=[each.request_id for each in requests])
    known = {each.request_id for each in waiting}
    for request in requests:
        if request.request_id not in known:
            await store.approvals.issue_token(request)
    return len(requests)


def _request(seed: int, number: int, tool: str, arguments: dict[str, Any], why: str) -> ApprovalRequest:
    from agent_gateway_store.models.approval import ApprovalRequest
    from agent_gateway_store.models.values import ToolCall

    server, _, name = tool.partition(".")
    return ApprovalRequest(
        request_id=f"req-pending-{seed}-{number}",
        caller_id=_ASKING[server],
        tool_call=ToolCall(server=server, tool=name, arguments=arguments),
        risk_explanation=why,
        expires_at=utc_now() + timedelta(days=1),
    )


async def _issue_keys(store: GatewayStore) -> dict[str, str]:
    """Give each caller a key, and return caller to key id."""
    from agent_gateway_store.demo.world import CALLERS

    for caller in CALLERS:
        try:
            await store.keys.issue(
                caller.name, role=caller.role, trust_level=caller.trust, environment=caller.environment
            )
        except ApiKeyExistsError:
            continue
    names = {caller.name for caller in CALLERS}
    # Newest first, so that of a caller with several keys the first one counts, whatever was issued since.
    return {key.caller_id: key.key_id for key in await store.keys.list(limit=_KEYS) if key.caller_id in names}
