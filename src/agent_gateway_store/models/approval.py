"""Approvals: the request that a human decides about, the votes, and the answer to a caller."""

from __future__ import annotations

import secrets
from collections.abc import Iterable
from datetime import datetime
from enum import StrEnum
from functools import cached_property
from hashlib import sha256
from typing import Any, ClassVar
from uuid import UUID, uuid4

from pydantic import PositiveInt
from sqlalchemy import CheckConstraint, ForeignKey, Index, Integer, Text, UniqueConstraint, Uuid, text
from sqlmodel import Field

from agent_gateway_store.clock import utc_now
from agent_gateway_store.encoding.canonical import canonical_json, hash_json
from agent_gateway_store.errors import ApprovalError
from agent_gateway_store.models.audit import AuditEvent, Instant, Sha256Hex
from agent_gateway_store.models.base import StoreModel, index_where
from agent_gateway_store.models.columns import BigKey, EnumText, Json, JsonOf, TokenDigest, UtcDateTime
from agent_gateway_store.models.values import ApprovalStatus, ApproverId, FrozenModel, Note, ToolCall

# The largest number that an INTEGER of PostgreSQL holds.
_MOST_APPROVERS = 2**31 - 1
# What comes after the status is always true, and is said by those statements alone that the index is for: on a table
# that is small when it plans them PostgreSQL takes any index for as good, and keeps that plan for thousands of rows.
_PENDING = text("status = 'PENDING' AND version > 0")
_APPROVED = text("status = 'APPROVED' AND version > 0")
_COUNTED = text("status = 'PENDING' AND required_approvals > 0")
_ISSUED = text("status = 'PENDING' AND acquire_key IS NULL")
_STANDING = text("status IN ('PENDING', 'APPROVED') AND acquire_key IS NOT NULL")
_ACQUIRED = text("acquire_key IS NOT NULL")


class ApprovalScope(StrEnum):
    """What an approval releases: the execution of a call, or its output."""

    EXECUTION = "EXECUTION"
    OUTPUT_RELEASE = "OUTPUT_RELEASE"


class VoteDecision(StrEnum):
    """The vote of one approver."""

    APPROVED = "APPROVED"
    DENIED = "DENIED"
    CANCELLED = "CANCELLED"


def hash_tool_call(call: ToolCall, *, key: str | None = None) -> str:
    """Return the hash that binds a permission to exactly this server, tool and arguments (64 hex digits).

    Args:
        call: The call as it will run, not as approvers see it.
        key: As in `AuditEvent.hash_args`.

    Raises:
        ApprovalError: An argument holds an object that JSON does not know and two of which may look the same, or one
            with values outside its fields.
    """
    try:
        return hash_json(_document(call), key=key, strict=True)
    except TypeError as exc:
        raise ApprovalError(
            f"An approval cannot be bound to {exc} among the arguments: give its values as JSON."
        ) from exc


def _document(call: ToolCall) -> dict[str, Any]:
    return {"server": call.server, "tool": call.tool, "arguments": call.arguments}


class ApprovalRequest(StoreModel, table=True):
    """One call that waits for a human, and its result.

    `model_dump` and JSON, and so the response of an endpoint, leave `token` and `output_payload` out: the first
    releases the call, the second is not released yet.

    Attributes:
        approval_id: The handle that approvers see.
        token: The secret by which the gateway follows and uses the approval. The column holds its SHA-256, and
            comparisons hash the value first; an object read from the database has None here.
        tool_call: The call as approvers may see it, so already sanitised.
        tool_call_hash: Binds the permission to the call as it will run; set by `issue_token` where it is None.
        expires_at: Until when it can be decided; None: `issue_token` sets created_at + APPROVAL_TOKEN_TTL_SECONDS.
        use_before: Until when an approved token can be used; None: expires_at.
        output_payload: The output to be released, where the scope is OUTPUT_RELEASE.
        output_hash: `AuditEvent.hash_args` of the output as it is stored; set by `issue_token` where it is None.
        required_approvals: How many distinct approvers must approve; one denial ends it.
        approver_id: Who decided (with several, the last of them).
        outcome: The result of the call, recorded after its use; None with the status USED means unknown.
        version: Grows with each transition.
        acquire_key: What `acquire` finds its approvals by; None where `issue_token` asked.
        votes: See the property; no field, since it is read with listings and `get` alone.
    """

    shown_with: ClassVar = ("votes",)

    __tablename__ = "approval_requests"
    __table_args__ = (
        UniqueConstraint("approval_id"),
        UniqueConstraint("token"),
        CheckConstraint("status IN ('PENDING', 'APPROVED', 'DENIED', 'EXPIRED', 'CANCELLED', 'USED')", name="status"),
        CheckConstraint("scope IN ('EXECUTION', 'OUTPUT_RELEASE')", name="scope"),
        CheckConstraint("required_approvals >= 1", name="required_approvals"),
        CheckConstraint("version >= 1", name="version"),
        CheckConstraint("length(token) = 64", name="token"),
        Index(None, "request_id"),
        Index(None, "status", "created_at", "id"),
        Index(None, "org_id", "created_at", "id"),
        Index(None, "created_at", "id"),
        # At most one pending request for one call, however many processes ask at once.
        index_where(
            *(_ISSUED, "org_id", "caller_id", "request_id", "tool_call_hash"),
            name="uq_approval_requests_issued_call",
            unique=True,
        ),
        index_where(
            *(_STANDING, "org_id", "caller_id", "acquire_key"), name="uq_approval_requests_acquired_call", unique=True
        ),
        index_where(_ACQUIRED, "acquire_key", "decision_at"),
        # How many wait for one caller.
        index_where(_COUNTED, "org_id", "caller_id", "expires_at"),
        # What is overdue: few of many.
        index_where(_PENDING, "expires_at"),
        index_where(_APPROVED, "use_before", "expires_at"),
    )

    id: int | None = Field(default=None, sa_type=BigKey(), primary_key=True)
    approval_id: UUID = Field(default_factory=uuid4, sa_type=Uuid)
    token: str | None = Field(
        default_factory=lambda: secrets.token_urlsafe(32), sa_type=TokenDigest, nullable=False, repr=False, exclude=True
    )
    request_id: str = Field(sa_type=Text)
    caller_id: str = Field(sa_type=Text)
    org_id: str = Field(default="default", sa_type=Text)
    tool_call: ToolCall = Field(sa_type=JsonOf(ToolCall))
    tool_call_hash: Sha256Hex | None = Field(default=None, sa_type=Text, nullable=False)
    risk_explanation: str = Field(sa_type=Text)
    created_at: Instant = Field(default_factory=utc_now, sa_type=UtcDateTime)
    expires_at: Instant | None = Field(default=None, sa_type=UtcDateTime, nullable=False)
    use_before: Instant | None = Field(default=None, sa_type=UtcDateTime)
    status: ApprovalStatus = Field(default=ApprovalStatus.PENDING, sa_type=EnumText(ApprovalStatus))
    scope: ApprovalScope = Field(default=ApprovalScope.EXECUTION, sa_type=EnumText(ApprovalScope))
    output_payload: Any = Field(default=None, sa_type=Json(), nullable=True, exclude=True)
    output_hash: str | None = Field(default=None, sa_type=Text)
    required_approvals: PositiveInt = Field(default=1, le=_MOST_APPROVERS, sa_type=Integer)
    approver_id: str | None = Field(default=None, sa_type=Text)
    decision_at: Instant | None = Field(default=None, sa_type=UtcDateTime)
    approver_note: Note = Field(default="", sa_type=Text)
    used_at: Instant | None = Field(default=None, sa_type=UtcDateTime)
    outcome: str | None = Field(default=None, sa_type=Text)
    version: PositiveInt = Field(default=1, sa_type=Integer)
    acquire_key: str | None = Field(default=None, sa_type=Text, repr=False, exclude=True)

    @property
    def votes(self) -> list[CastVote] | None:
        """Who voted, in the order of time; None where it was not read."""
        return self.__dict__.get("votes")


class CastVote(FrozenModel):
    """One vote, as a listing tells it; the fields are those of `ApprovalVote`."""

    approver_id: str
    decision: VoteDecision
    note: str
    channel: str
    voted_at: datetime


class ApprovalVote(StoreModel, table=True):
    """The vote of one approver on one approval; an approver votes once.

    Attributes:
        channel: How it came: api, cli, slack, inbox, ...
    """

    __tablename__ = "approval_votes"
    __table_args__ = (
        UniqueConstraint("approval_id", "approver_id"),
        CheckConstraint("decision IN ('APPROVED', 'DENIED', 'CANCELLED')", name="decision"),
    )

    id: int | None = Field(default=None, sa_type=BigKey(), primary_key=True)
    approval_id: UUID = Field(
        sa_type=Uuid, sa_column_args=[ForeignKey("approval_requests.approval_id", ondelete="CASCADE")]
    )
    org_id: str = Field(default="default", sa_type=Text)
    approver_id: ApproverId = Field(sa_type=Text)
    decision: VoteDecision = Field(sa_type=EnumText(VoteDecision))
    note: Note = Field(default="", sa_type=Text)
    channel: str = Field(default="api", sa_type=Text)
    voted_at: Instant = Field(default_factory=utc_now, sa_type=UtcDateTime)


# What does not change any more once an approval is decided. Fields that come later stay out: a hash must stay the same.
_DECIDED_FIELDS = frozenset(
    {"approval_id", "org_id", "request_id", "caller_id", "tool_call", "tool_call_hash", "risk_explanation", "scope"}
    | {"created_at", "expires_at", "use_before", "output_hash", "required_approvals"}
    | {"approver_id", "decision_at", "approver_note"}
)
_VOTE_FIELDS = frozenset({"approver_id", "decision", "note", "channel", "voted_at"})


def hash_approval(request: ApprovalRequest, votes: Iterable[ApprovalVote | CastVote]) -> str:
    """Return the hash by which an event can hold a decided approval and its votes, as `extra.approval_sha256`.

    SHA-256 (64 hex digits, under no key) over RFC 8785 canonical JSON. Status, use and outcome are left out, as they
    still change after the decision.
    """
    ballots = [vote.model_dump(mode="json", include=set(_VOTE_FIELDS)) for vote in votes]
    document = {
        "approval": request.model_dump(mode="json", include=set(_DECIDED_FIELDS)),
        "votes": sorted(ballots, key=lambda ballot: (ballot["voted_at"], ballot["approver_id"])),
    }
    return sha256(canonical_json(document)).hexdigest()


APPROVAL_HASH = "approval_sha256"
"""The name in an event's `extra` under which it holds the hash of the approval that released the call."""


ERASED = "[ERASED]"
BLANK_HASH = "0" * 64


def is_blank_approval(tool_call_hash: str | None, risk_explanation: str) -> bool:
    """True if these are what is left of an erased approval: any may be explained so, but no call has that hash."""
    return (tool_call_hash, risk_explanation) == (BLANK_HASH, ERASED)


def is_of_call(request: ApprovalRequest, event: AuditEvent, *, key: str | None = None) -> bool | None:
    """True if an approval with its votes is proved to be of the call of an event that does not name it by its id.

    Args:
        key: As in `AuditEvent.hash_args`.

    Returns:
        False: it is of another call. None: of the same caller, server and tool, but their hashes cannot be compared, as
        arguments were sanitised, or hashed under another key.
    """
    shown = request.tool_call
    same = (event.org_id, event.caller_id, event.mcp_server, event.tool_name)
    if (request.org_id, request.caller_id, shown.server, shown.tool) != same:
        return False
    if APPROVAL_HASH in event.extra and event.extra[APPROVAL_HASH] == hash_approval(request, request.votes or ()):
        return True
    # What is bound is a hash over the whole call, and of an event it is one over the arguments: they meet where either
    # of the two shows the arguments as they run.
    shown_hash = hash_json(shown.arguments, key=key)
    if request.tool_call_hash == hash_json(_document(shown), key=key):
        fits = event.raw_args_hash == shown_hash
    elif event.raw_args_hash == hash_json(event.sanitized_args, key=key):
        run = ToolCall(server=shown.server, tool=shown.tool, arguments=event.sanitized_args)
        fits = request.tool_call_hash == hash_json(_document(run), key=key)
    else:
        return None
    # Where both show the same, one of the two hashes may have been made under another key.
    is_same_shown = shown_hash == hash_json(event.sanitized_args, key=key)
    return fits or (None if is_same_shown else False)


class ApprovalResult(FrozenModel):
    """The state of an approval, as a caller or an approver receives it.

    Attributes:
        token: None where it was not given; neither in a repr nor in `model_dump` and JSON.
        approver_id: Who decided; None while nobody has.
        note: What the approver wrote.
        used_at: When it was used; None: it was not.
        outcome: What came of the call; None with `used_at` means unknown.
    """

    approval_id: UUID
    token: str | None = Field(default=None, repr=False, exclude=True)
    status: ApprovalStatus
    scope: ApprovalScope = ApprovalScope.EXECUTION
    approver_id: str | None = None
    note: Note = ""
    decided_at: datetime | None = None
    expires_at: datetime | None = None
    used_at: datetime | None = None
    outcome: str | None = None

    @cached_property
    def is_new(self) -> bool:
        """Whether the call of `acquire` that returned this asked for it. No field: the approval is the same to all."""
        return False
