"""The filters of the audit log: checked, and turned into the parameters of a SELECT."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from functools import partial
from typing import Any, TypedDict
from uuid import UUID

from agent_gateway_store.models.audit import Decision, ExecutionStatus, OutputDecision
from agent_gateway_store.storage.filters import (
    Criteria,
    Moment,
    OneOrMore,
    check_filters,
    identifier,
    instant,
    label,
    number,
    one_or_many,
    pattern,
    uuid_digits,
    word,
)


class Filters(TypedDict, total=False):
    """The filters of `search`, `stream`, `stats`, `export`, `follow` and the bulk reads; None does not narrow.

    Several filters must all match. Where a filter takes several values, any of them may match.

    Attributes:
        approval_id: Calls that this approval released.
        risk_label: Events that carry this label.
        min_risk_score: This score or a higher one.
        since: From this time on.
        until: Before this time.
        text: Part of the tool name or a rationale, in upper or lower case (beyond ASCII as the database's locale folds
            letters; SQLite folds none).
    """

    request_id: OneOrMore | None
    org_id: OneOrMore | None
    trace_id: OneOrMore | None
    session_id: OneOrMore | None
    parent_request_id: OneOrMore | None
    caller_id: OneOrMore | None
    key_id: OneOrMore | None
    environment: OneOrMore | None
    mcp_server: OneOrMore | None
    tool_name: OneOrMore | None
    approver_id: OneOrMore | None
    approval_id: OneOrMore | UUID | Sequence[UUID] | None
    raw_args_hash: OneOrMore | None
    decision: OneOrMore | None
    output_decision: OneOrMore | None
    execution_status: OneOrMore | None
    risk_label: OneOrMore | None
    min_risk_score: float | None
    since: Moment | None
    until: Moment | None
    text: str | None


def criteria(
    filters: Mapping[str, Any], *, org_id: str | None, listing: str = "audit", now: datetime | None = None
) -> Criteria:
    """Check `filters`; arguments as for `check_filters`.

    Raises:
        TypeError: There is no such filter, or its value has the wrong type.
        ValueError: There is no such value.
    """
    return check_filters(filters, _CHECKS, org_id=org_id, listing=listing, now=now)


_CHECKS: dict[str, Callable[[str, Any], Any]] = {
    # In the order in which an error lists them: the most used first.
    **{
        name: partial(one_or_many, identifier)
        for name in (
            "caller_id",
            "tool_name",
            "mcp_server",
            "org_id",
            "environment",
            "session_id",
            "key_id",
            "approver_id",
            "raw_args_hash",
            "request_id",
            "trace_id",
            "parent_request_id",
        )
    },
    "approval_id": partial(one_or_many, uuid_digits),
    "decision": partial(one_or_many, partial(word, Decision)),
    "execution_status": partial(one_or_many, partial(word, ExecutionStatus)),
    "output_decision": partial(one_or_many, partial(word, OutputDecision)),
    "risk_label": partial(one_or_many, label),
    "min_risk_score": number,
    "since": instant,
    "until": instant,
    "text": pattern,
}
