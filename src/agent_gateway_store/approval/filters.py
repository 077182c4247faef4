"""The filters of approvals: checked, and turned into the conditions and parameters of a SELECT."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import cache, partial
from typing import Any, TypedDict

from sqlalchemy import ARRAY, JSON, BigInteger, Text, literal_column
from sqlalchemy.dialects import registry
from sqlalchemy.types import TypeEngine

from agent_gateway_store.approval.statements import fragments
from agent_gateway_store.models.columns import UtcDateTime
from agent_gateway_store.models.values import ApprovalStatus
from agent_gateway_store.storage.filters import (
    Criteria,
    Moment,
    OneOrMore,
    Shape,
    check_filters,
    identifier,
    instant,
    one_or_many,
    pattern,
    word,
)
from agent_gateway_store.storage.statements import contains


class ApprovalFilters(TypedDict, total=False):
    """What a search for approvals can be narrowed by; None does not narrow.

    Several filters must all match. Where a filter takes several values, any of them may match.

    Attributes:
        outcome: What came of the use; "unknown" where that was not recorded.
        status: As a reader sees it: EXPIRED from the deadline on.
        approver_id: Who decided.
        since: Asked from this time on.
        until: Asked before this time.
        text: Stands in the tool's name, the risk explanation or the approver's note, in upper or lower case (letters
            beyond ASCII match as the database's locale folds them; SQLite folds none).
    """

    caller_id: OneOrMore | None
    request_id: OneOrMore | None
    org_id: OneOrMore | None
    tool_name: OneOrMore | None
    mcp_server: OneOrMore | None
    status: OneOrMore | None
    approver_id: OneOrMore | None
    outcome: OneOrMore | None
    since: Moment | None
    until: Moment | None
    text: str | None


_CHECKS: dict[str, Callable[[str, Any], Any]] = {
    **{
        name: partial(one_or_many, identifier)
        for name in ("caller_id", "request_id", "org_id", "tool_name", "mcp_server", "approver_id", "outcome")
    },
    "status": partial(one_or_many, partial(word, ApprovalStatus)),
    "since": instant,
    "until": instant,
    "text": pattern,
}
_CONDITIONS = {
    "outcome": "{outcome_known} {in_outcome}",
    "tool_name": "{tool} {in_tool_name}",
    "mcp_server": "{server} {in_mcp_server}",
    # As stored first, since no index knows what has expired meanwhile.
    "status": "status {in_stored} AND {readable_status} {in_status}",
    "since": "created_at >= :p_since",
    "until": "created_at < :p_until",
    "text": "({has_text})",
    "bound": "org_id = :p_bound",
    "after": "(created_at, id) < (:p_before, :p_before_id)",
}
_DIALECTS = {
    "postgresql": {
        "tool": "tool_call ->> 'tool'",
        "server": "tool_call ->> 'server'",
        "in": "= ANY(:p_{})",
    },
    "sqlite": {
        "tool": "json_extract(tool_call, '$.tool')",
        "server": "json_extract(tool_call, '$.server')",
        # SQLite has no arrays: the values are one JSON text.
        "in": "IN (SELECT value FROM json_each(:p_{}))",
    },
}
# A call that was released and of which nobody said how it ended is the one to look at.
_OUTCOME = "COALESCE(outcome, CASE WHEN status = 'USED' THEN 'unknown' END)"

_MAY_EXPIRE = ("PENDING", "APPROVED")


def criteria(filters: Mapping[str, Any], *, org_id: str | None = None) -> Criteria:
    """Check `filters`; the organisation that the store is bound to narrows in addition.

    Raises:
        TypeError: There is no such filter, or its value has the wrong type.
        ValueError: There is no such status or time.
    """
    found = check_filters(filters, _CHECKS, org_id=org_id, listing="approvals")
    if (given := found.values.get("p_status")) is None:
        return found
    status = given if isinstance(given, list) else [given]
    stored = [*status, *(_MAY_EXPIRE if ApprovalStatus.EXPIRED in status else ())]
    shape = tuple((name, several or name == "status") for name, several in found.shape)
    return replace(found, shape=shape, values={**found.values, "p_status": status, "p_stored": stored})


def waits(found: Criteria) -> bool:
    """Return True if only what waits for a decision can match."""
    return found.values.get("p_status") == [ApprovalStatus.PENDING]


def words_of(dialect: str) -> dict[str, str]:
    """Return `fragments` and the pieces of the conditions, by the names under which they stand in braces."""
    return fragments(dialect) | _DIALECTS[dialect] | {"outcome_known": _OUTCOME, "has_text": _has_text(dialect)}


@cache
def _has_text(dialect: str) -> str:
    places = (_DIALECTS[dialect]["tool"], "risk_explanation", "approver_note")
    columns = [literal_column(f"({place})", Text) for place in places]
    has_text = contains(dialect, columns, literal_column(":p_text", Text))
    return str(has_text.compile(dialect=registry.load(dialect)()))


def conditions(dialect: str, shape: Shape) -> str:
    """Return the conditions as SQL."""
    words = words_of(dialect)
    several_of = words["in"]
    words["in_stored"] = several_of.format("stored")
    for name, several in shape:
        # Not an array of one: of an unknown array PostgreSQL expects ten, and reads all in their order.
        words[f"in_{name}"] = several_of.format(name) if several else f"= :p_{name}"
    texts = [_CONDITIONS.get(name, f"{name} {{in_{name}}}") for name, _ in shape]
    return " AND ".join(texts).format_map(words) or "1 = 1"


def types_of(dialect: str, shape: Shape) -> dict[str, TypeEngine[Any]]:
    """Return the types of the parameters."""
    array: TypeEngine[Any] = ARRAY(Text()) if dialect == "postgresql" else JSON()
    types: dict[str, TypeEngine[Any]] = {"p_stored": array, "p_before": UtcDateTime(), "p_before_id": BigInteger()}
    for name, several in shape:
        one = UtcDateTime() if name in ("since", "until") else Text()
        types[f"p_{name}"] = array if several else one
    return types
