"""Values that plugins receive. Importable without SQLModel, so that a plugin costs little to load."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from enum import StrEnum
from typing import TYPE_CHECKING, Annotated, Any, Literal
from uuid import UUID

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict

from agent_gateway_store._text import is_blank, is_cut
from agent_gateway_store.encoding.plain import holds_more, plain

if TYPE_CHECKING:
    from rich.table import Table


def _named(approver_id: str) -> str:
    if is_blank(approver_id):
        raise ValueError("an approver id must not be blank: it is written to the record of each decision")
    return approver_id


ApproverId = Annotated[str, AfterValidator(_named)]
"""Who decides: text of which something can be seen."""

Note = Annotated[str, BeforeValidator(lambda given: "" if given is None else given)]
"""What somebody wrote; None is taken as nothing."""


def _each_once(arguments: Any) -> Any:
    # A dict has one value of each name: of a form with two recipients it would keep one.
    kind = type(arguments)
    if not issubclass(kind, dict) and issubclass(kind, Mapping) and holds_more(arguments, plain(arguments)):
        raise ValueError("the mapping may hold more than a dict of it, such as two values of one name: make it a dict")
    return arguments


class ApprovalStatus(StrEnum):
    """The status of an approval. PENDING and APPROVED can still change; the others are final."""

    PENDING = "PENDING"
    APPROVED = "APPROVED"
    DENIED = "DENIED"
    EXPIRED = "EXPIRED"
    CANCELLED = "CANCELLED"
    USED = "USED"

    @property
    def is_final(self) -> bool:
        """True if it cannot change any more."""
        return self not in (ApprovalStatus.PENDING, ApprovalStatus.APPROVED)


class ShownAsCard:
    """What a record looks like in a notebook and in a terminal."""

    def _repr_html_(self: Any) -> str:
        # Deferred, as in `__rich__`: a gateway that shows nothing must not load what draws.
        from agent_gateway_store.results.html import card_html

        return card_html(self)

    def __rich__(self: Any) -> Table:
        from agent_gateway_store.results.terminal import card

        return card(self)


class FrozenModel(ShownAsCard, BaseModel):
    """Frozen base of the values: refuses wrong and unknown fields, repeats no input in errors."""

    model_config = ConfigDict(frozen=True, extra="forbid", hide_input_in_errors=True)


class ToolCall(FrozenModel):
    """A tool call as approvers may see it.

    Attributes:
        server: Name of the MCP server (or other tool server).
        tool: Name of the tool.
        arguments: What approvers may see, so already sanitised. Read-only.
    """

    server: str
    tool: str
    arguments: Annotated[dict[str, Any], BeforeValidator(_each_once)] = {}

    @property
    def is_cut(self) -> bool:
        """True if it holds a mark of something that was cut when it was stored: then approvers do not see all of it."""
        return is_cut([self.server, self.tool, self.arguments])


class Notice(FrozenModel):
    """What a notifier receives about one approval. Holds no token and no raw argument; fields are only ever added.

    Attributes:
        version: Version of this shape, 1.
        event: `pending` (somebody must decide) or `decision` (it was decided, cancelled, or has expired).
        delivery_id: The same in every attempt, so that receivers can drop a repetition.
        approval_id: The handle by which approvers decide.
        org_id: Organisation of the approval.
        request_id: The gateway's id of the tool call.
        caller_id: Who wants to make the call.
        tool_call: The call, arguments sanitised.
        risk_explanation: Why a human is asked.
        created_at: When it was asked (UTC); None if the sender does not know.
        expires_at: Until when it can be decided (UTC).
        status: Its status when the notice was made.
        approver_id: Who decided; None while pending.
        note: What the approver wrote.
        decided_at: When it was decided (UTC); None while pending.
        scope: `EXECUTION` (the call may run) or `OUTPUT_RELEASE` (its output may be handed out).
        required_approvals: How many distinct approvers must approve.
    """

    version: Literal[1] = 1
    event: Literal["pending", "decision"]
    delivery_id: UUID
    approval_id: UUID
    org_id: str
    request_id: str
    caller_id: str
    tool_call: ToolCall
    risk_explanation: str
    created_at: datetime | None = None
    expires_at: datetime | None = None
    status: ApprovalStatus
    approver_id: str | None = None
    note: Note = ""
    decided_at: datetime | None = None
    scope: Literal["EXECUTION", "OUTPUT_RELEASE"] = "EXECUTION"
    required_approvals: int = 1


class PendingApproval(FrozenModel):
    """An approval that somebody is about to decide, as a plugin sees it. Holds no token; fields are only ever added.

    Attributes:
        version: Version of this shape, 1; the other fields are those of `Notice`.
    """

    version: Literal[1] = 1
    approval_id: UUID
    org_id: str
    request_id: str
    caller_id: str
    tool_call: ToolCall
    risk_explanation: str
    scope: Literal["EXECUTION", "OUTPUT_RELEASE"] = "EXECUTION"
    required_approvals: int = 1
    created_at: datetime
    expires_at: datetime | None = None
