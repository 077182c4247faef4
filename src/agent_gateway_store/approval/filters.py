"""The filters of approvals: checked, and turned into the conditions and parameters of a SELECT."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, TypedDict

from sqlalchemy import ARRAY, JSON, BigInteger, Text
from sqlalchemy.types import TypeEngine

from agent_gateway_store.approval.statements import fragments
from agent_gateway_store.models.columns import UtcDateTime
from agent_gateway_store.models.values import ApprovalStatus
from agent_gateway_store.storage.filters import (
    Moment,
    OneOrMore,
    check_filters,
    identifier,
    instant,
    one_or_many,
    pattern,
    word,
)
from agent_gateway_store.storage.pagination import listing_fingerprint


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
    "text": "({tool} {like} OR risk_explanation {like} OR approver_note {like})",
    "own": "org_id = :p_own",
    "after": "(created_at, id) < (:p_before, :p_before_id)",
}
_DIALECTS = {
    "postgresql": {
        "tool": "tool_call ->> 'tool'",
        "server": "tool_call ->> 'server'",
        "like": "ILIKE :p_text",
        "in": "= ANY(:p_{})",
    },
    "sqlite": {
        "tool": "json_extract(tool_call, '$.tool')",
        "server": "json_extract(tool_call, '$.server')",
        "like": "LIKE :p_text ESCAPE '\\'",
        # SQLite has no arrays: the values are one JSON text.
        "in": "IN (SELECT value FROM json_each(:p_{}))",
    },
}
# A call that was released and of which nobody said how it ended is the one to look at.
_OUTCOME = "COALESCE(outcome, CASE WHEN status = 'USED' THEN 'unknown' END)"

_MAY_EXPIRE = ("PENDING", "APPROVED")
# Ends the name of a condition with one value: of an unknown array PostgreSQL expects ten, and reads all in their order.
_ONE = "="


@dataclass(frozen=True)
class Criteria:
    """Checked filters.

    Attributes:
        shape: Names of the conditions, which determine the SELECT.
        values: Its parameters.
        scope: Binds a cursor to the search, these filters and the organisation.
    """

    shape: tuple[str, ...]
    values: Mapping[str, Any]
    scope: bytes


def criteria(filters: Mapping[str, Any], *, org_id: str | None = None) -> Criteria:
    """Check `filters`; the organisation that the store is bound to narrows in addition.

    Raises:
        TypeError: There is no such filter, or its value has the wrong type.
        ValueError: There is no such status or time.
    """
    values: dict[str, Any] = {} if org_id is None else {"p_own": org_id}
    shape: list[str] = [] if org_id is None else ["own"]
    described: dict[str, Any] = {}
    for name, value, text_of_value in check_filters(filters, _CHECKS):
        described[name] = text_of_value
        shape.append(name)
        if name not in ("since", "until", "text"):
            value = list(map(str, value if isinstance(value, list) else [value]))
        if name == "status":
            values["p_stored"] = [*value, *(_MAY_EXPIRE if ApprovalStatus.EXPIRED in value else ())]
        elif isinstance(value, list) and len(value) == 1:
            shape[-1] += _ONE
            name, (value,) = f"one_{name}", value
        values[f"p_{name}"] = value
    return Criteria(tuple(sorted(shape)), values, listing_fingerprint("approvals", org_id, described))


def words_of(dialect: str) -> dict[str, str]:
    """Return `fragments` and the pieces of the conditions, by the names under which they stand in braces."""
    found = fragments(dialect) | _DIALECTS[dialect] | {"outcome_known": _OUTCOME}
    return found | {f"in_{name}": found["in"].format(name) for name in (*_CHECKS, "stored")}


def conditions(dialect: str, shape: tuple[str, ...]) -> str:
    """Return the conditions as SQL."""
    words = words_of(dialect)
    texts = []
    for each in shape:
        name = each.removesuffix(_ONE)
        if name != each:
            words[f"in_{name}"] = f"= :p_one_{name}"
        texts.append(_CONDITIONS.get(name, f"{name} {{in_{name}}}"))
    return " AND ".join(texts).format_map(words) or "1 = 1"


def types_of(dialect: str) -> dict[str, TypeEngine[Any]]:
    """Return the types of the parameters."""
    several: TypeEngine[Any] = ARRAY(Text()) if dialect == "postgresql" else JSON()
    moment = UtcDateTime()
    single: dict[str, TypeEngine[Any]] = {
        "since": moment,
        "until": moment,
        "before": moment,
        "before_id": BigInteger(),
        "text": Text(),
        "own": Text(),
    }
    return {
        **{f"p_{name}": several for name in (*_CHECKS, "stored")},
        **{f"p_one_{name}": Text() for name in _CHECKS},
        **{f"p_{name}": type_ for name, type_ in single.items()},
    }
