"""The statements of an approval's life, each written once.

Parameters: `p_token` or `p_approval_id` names the approval, `p_org_id` the organisation that looks (None: all).
"""

from __future__ import annotations

from typing import Any, Literal, TypeAlias

from sqlalchemy import (
    Boolean,
    ColumnElement,
    Text,
    Uuid,
    and_,
    bindparam,
    cast,
    func,
    literal_column,
    not_,
    or_,
    select,
    update,
)
from sqlalchemy.dialects import postgresql, sqlite

from agent_gateway_store.approval.transitions import expire, move, read, requests, returned, votes
from agent_gateway_store.models.columns import TokenDigest
from agent_gateway_store.models.values import ApprovalStatus
from agent_gateway_store.storage.db_clock import db_now
from agent_gateway_store.storage.statements import Statement

__all__ = [
    "APPROVE",
    "APPROVE_LAST",
    "CANCEL",
    "CANCEL_OTHER_TERMS",
    "CONSUME",
    "COUNT_APPROVALS",
    "DENY",
    "EXPIRE_SAME_CALL",
    "INSERT",
    "NOTE_OUTCOME",
    "READ",
    "REBIND",
    "RELEASE",
    "SAME_CALL",
    "TAKE",
    "VOTE",
    "Key",
    "insert_request",
]

Key: TypeAlias = Literal["token", "id"]
_PENDING, _APPROVED = ApprovalStatus.PENDING, ApprovalStatus.APPROVED


def _named(by: Key) -> ColumnElement[bool]:
    key = (
        requests.c.token == bindparam("p_token", type_=TokenDigest())
        if by == "token"
        else requests.c.approval_id == bindparam("p_approval_id", type_=Uuid())
    )
    org_id: ColumnElement[Any] = bindparam("p_org_id", type_=Text())
    return and_(key, or_(org_id.is_(None), requests.c.org_id == org_id))


def _moving(
    by: Key,
    sources: tuple[ApprovalStatus, ...],
    target: ApprovalStatus,
    *conditions: ColumnElement[bool],
    **values: Any,
) -> Statement:
    statement = move(sources, target, _named(by), *conditions, now=db_now, **values)
    return Statement(statement)


def _reading(by: Key) -> Statement:
    return Statement(read(_named(by), now=db_now))


def _decision() -> dict[str, Any]:
    return {
        "approver_id": bindparam("p_approver_id", type_=Text()),
        "approver_note": bindparam("p_note", type_=Text()),
        "decision_at": db_now(),
    }


# By somebody else than the caller, unless that is allowed.
_OTHERS = or_(
    bindparam("p_allow_self", type_=Boolean()), requests.c.caller_id != bindparam("p_approver_id", type_=Text())
)
_BOTH: tuple[Key, Key] = ("token", "id")
_ONE = requests.c.required_approvals <= literal_column("1")

READ = {by: _reading(by) for by in _BOTH}
APPROVE = {by: _moving(by, (_PENDING,), _APPROVED, _OTHERS, _ONE, **_decision()) for by in _BOTH}
TAKE = {by: _moving(by, (_PENDING,), _PENDING, _OTHERS) for by in _BOTH}
APPROVE_LAST = {by: _moving(by, (_PENDING,), _APPROVED, **_decision()) for by in _BOTH}
DENY = {by: _moving(by, (_PENDING,), ApprovalStatus.DENIED, **_decision()) for by in _BOTH}
CANCEL = {by: _moving(by, (_PENDING, _APPROVED), ApprovalStatus.CANCELLED, **_decision()) for by in _BOTH}
_FOR_CALLER = (
    requests.c.caller_id == bindparam("p_caller_id", type_=Text()),
    requests.c.scope == bindparam("p_scope", type_=requests.c.scope.type),
)
CONSUME = _moving(
    "token",
    (_APPROVED,),
    ApprovalStatus.USED,
    *_FOR_CALLER,
    requests.c.tool_call_hash == bindparam("p_tool_call_hash", type_=Text()),
    used_at=db_now(),
)
RELEASE = _moving("token", (_APPROVED,), ApprovalStatus.USED, *_FOR_CALLER, used_at=db_now())
NOTE_OUTCOME = Statement(
    update(requests)
    .where(_named("token"), requests.c.status == literal_column("'USED'"), requests.c.outcome.is_(None))
    .values(outcome=bindparam("p_outcome", type_=Text()), version=requests.c.version + literal_column("1"))
    .returning(*returned(db_now))
)

_GIVEN = (
    *("approval_id", "token", "request_id", "caller_id", "org_id", "tool_call", "tool_call_hash", "risk_explanation"),
    *("use_before", "scope", "output_payload", "output_hash", "required_approvals"),
)


def insert_request(dialect: str) -> Any:
    """Return the statement that asks for an approval."""
    values: dict[str, Any] = {name: bindparam(f"p_{name}", type_=requests.c[name].type) for name in _GIVEN}
    deadline = bindparam("p_expires_at", type_=requests.c.expires_at.type)
    values |= {
        "created_at": db_now(),
        "expires_at": func.coalesce(deadline, db_now(plus="p_ttl_s"), type_=requests.c.expires_at.type),
        "status": literal_column("'PENDING'"),
        "approver_note": literal_column("''"),
        "version": literal_column("1"),
    }
    insert = (postgresql.insert if dialect == "postgresql" else sqlite.insert)(requests)
    return insert.values(values).on_conflict_do_nothing().returning(*returned(db_now))


INSERT = Statement(insert_request)

SAME_CALL = ("org_id", "caller_id", "request_id", "tool_call_hash")
"""What is equal where the same call is asked for again."""
_SAME_CALL = and_(*(requests.c[name] == bindparam(f"p_{name}", type_=Text()) for name in SAME_CALL))


def _given(name: str) -> ColumnElement[Any]:
    return bindparam(f"p_{name}", type_=requests.c[name].type)


# JSON is compared as the text that the database shows: as JSONB, 1 would equal 1.0.
_SAME_TERMS = and_(
    *(requests.c[name] == _given(name) for name in ("scope", "required_approvals", "risk_explanation")),
    requests.c.output_hash.is_not_distinct_from(_given("output_hash")),
    *(
        cast(requests.c[name], Text).is_not_distinct_from(cast(_given(name), Text))
        for name in ("tool_call", "output_payload")
    ),
    *(
        or_(_given(name).is_(None), requests.c[name].is_not_distinct_from(_given(name)))
        for name in ("expires_at", "use_before")
    ),
)
REBIND = Statement(
    move(
        (_PENDING,),
        _PENDING,
        _SAME_CALL,
        _SAME_TERMS,
        now=db_now,
        token=bindparam("p_token", type_=TokenDigest()),
    )
)
CANCEL_OTHER_TERMS = Statement(
    move(
        (_PENDING,),
        ApprovalStatus.CANCELLED,
        _SAME_CALL,
        not_(_SAME_TERMS),
        now=db_now,
        approver_id=requests.c.caller_id,
        approver_note=literal_column("'Asked again with other terms.'"),
        decision_at=db_now(),
    )
)
EXPIRE_SAME_CALL = Statement(expire(_SAME_CALL, now=db_now))


def _vote(dialect: str) -> Any:
    names = ("approval_id", "org_id", "approver_id", "decision", "note", "channel")
    values: dict[str, Any] = {name: bindparam(f"p_{name}", type_=votes.c[name].type) for name in names}
    insert = (postgresql.insert if dialect == "postgresql" else sqlite.insert)(votes)
    return insert.values(values | {"voted_at": db_now()}).on_conflict_do_nothing().returning(votes.c.id)


VOTE = Statement(_vote)

_COUNTED = func.count().label("approvals")
COUNT_APPROVALS = Statement(
    select(_COUNTED).where(
        votes.c.approval_id == bindparam("p_approval_id", type_=Uuid()),
        votes.c.decision == literal_column("'APPROVED'"),
    )
)
