"""An approval as a message of Slack: https://docs.slack.dev/reference/block-kit"""

from __future__ import annotations

from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from slack_sdk.models.blocks import (
    ActionsBlock,
    Block,
    ButtonElement,
    ConfirmObject,
    ContextBlock,
    HeaderBlock,
    MarkdownTextObject,
    PlainTextObject,
    SectionBlock,
)

from agent_gateway_store._text import CUT_CALL, MASK, Shown, escape, json_text, mask_tokens
from agent_gateway_store.plugins._text import MARK, fit_arguments
from agent_gateway_store.plugins.slack.api import EVENT_TYPE, mrkdwn
from agent_gateway_store.plugins.slack.callback import APPROVE, DENY

if TYPE_CHECKING:
    from agent_gateway_store.models.values import Notice

# Slack's limit for the text of a section is 3000 characters, of which `&amp;` counts five
# (https://docs.slack.dev/reference/block-kit/blocks/section-block). These leave room for our own words and for marks.
_MAX_NAME, _MAX_TEXT, _MAX_ARGUMENTS = 200, 2000, 2700
# Characters beyond a limit in which a token is still masked: an API key has 66, a token 43.
_TOKEN_CHARS = 100
_ENDINGS = {
    "APPROVED": ":white_check_mark: Approved",
    "DENIED": ":no_entry: Denied",
    "USED": ":white_check_mark: Approved",
}


def pending_message(notice: Notice) -> dict[str, Any]:
    """Return text, blocks and metadata of a pending approval, with two buttons."""
    approval_id = str(notice.approval_id)
    facts, is_partial = _facts(notice)
    is_output = notice.scope == "OUTPUT_RELEASE"
    consequence = "The output of the call is handed out once" if is_output else "The call runs once"
    refused = "The output stays." if is_output else "The call does not run."
    consequence += ". Not all of it is shown here!" if is_partial or is_output else ", as shown."
    if notice.tool_call.is_cut:
        consequence += f" {CUT_CALL}"
    buttons = ActionsBlock(
        block_id=f"gateway_store_{approval_id}",
        elements=[
            _button(APPROVE, "Approve", approval_id, "primary", consequence),
            _button(DENY, "Deny", approval_id, "danger", refused),
        ],
    )
    text = f"Approval needed: {_name(notice.caller_id)} wants {_name(notice.tool_call.tool)}"
    return _message(notice, text, [HeaderBlock(text="Approval needed"), *facts, buttons])


def decided_message(notice: Notice) -> dict[str, Any]:
    """Return text, blocks and metadata of a decided approval; nothing in it can be clicked."""
    ending = _ENDINGS.get(notice.status.value, f":grey_exclamation: {notice.status.value.capitalize()}")
    if notice.approver_id:
        ending += f" by {_name(notice.approver_id)}"
    if notice.decided_at:
        ending += f" {_time(notice.decided_at)}"
    facts, _ = _facts(notice)
    decided = [_section(f"*{ending}*" if not notice.note else f"*{ending}*\n{_prose(notice.note)}")]
    text = f"{notice.status.value.capitalize()}: {_name(notice.tool_call.tool)} for {_name(notice.caller_id)}"
    return _message(notice, text, [HeaderBlock(text="Approval decided"), *facts, *decided])


def _message(notice: Notice, text: str, blocks: list[Block]) -> dict[str, Any]:
    return {
        "text": text,
        "blocks": [block.to_dict() for block in blocks],
        "metadata": {
            "event_type": EVENT_TYPE,
            "event_payload": {"approval_id": str(notice.approval_id), "event": notice.event},
        },
    }


def _facts(notice: Notice) -> tuple[list[Block], bool]:
    """Return the blocks that describe the call, and whether something is not shown as it runs: cut, or masked."""
    call = notice.tool_call
    lines = [
        f"*Call* {_name(call.server)} / {_name(call.tool)}",
        f"*Caller* {_name(notice.caller_id)} ({_name(notice.org_id)})",
    ]
    if notice.event == "pending":
        lines.append(f"*Decide by* {_time(notice.expires_at) if notice.expires_at else 'no deadline'}")
        if notice.required_approvals > 1:
            lines.append(f"*Approvals needed* {notice.required_approvals}")
    if notice.scope == "OUTPUT_RELEASE":
        lines.append(f"*Releases* the output of the call: `gateway-store approvals show {notice.approval_id}` has it")
    facts: list[Block] = [
        _section("\n".join(lines)),
        _section(f"*Why you are asked*\n{_prose(notice.risk_explanation)}"),
    ]
    arguments, was_cut = _arguments(notice)
    if call.arguments:
        facts.append(_section(f"*Arguments*{' (cut to fit)' if was_cut else ''}\n```{arguments}```"))
    request = f"Approval {notice.approval_id}, request {_name(notice.request_id)}"
    shown = str([fact.to_dict() for fact in facts])
    is_partial = was_cut or MARK in shown or MASK in shown
    if is_partial:
        request += (
            f". {MARK} marks what is cut, `{MASK}` what looks like a key: "
            f"`gateway-store approvals show {notice.approval_id}` shows "
        )
        request += "all that is stored" if call.is_cut else "it whole"
    if call.is_cut:
        facts.append(_section(f":warning: *{CUT_CALL}*"))
    return [*facts, ContextBlock(elements=[_mrkdwn(request)])], is_partial or call.is_cut


def _arguments(notice: Notice) -> tuple[str, bool]:
    shown, was_cut = fit_arguments(notice.tool_call.arguments, _MAX_ARGUMENTS)
    lines, room = [], _MAX_ARGUMENTS
    for line in json_text(shown, indent=2).split("\n"):
        lines.append(_inert(Shown(line), room))
        room -= len(lines[-1]) + 1
        if room <= 1:
            was_cut = True
            break
    return "\n".join(lines), was_cut


def _button(action: str, label: str, approval_id: str, style: str, consequence: str) -> ButtonElement:
    return ButtonElement(
        action_id=action,
        text=PlainTextObject(text=label),
        value=approval_id,
        style=style,
        confirm=ConfirmObject(title=f"{label}?", text=PlainTextObject(text=consequence), confirm=label, deny="Back"),
    )


def _section(text: str) -> SectionBlock:
    return SectionBlock(text=_mrkdwn(text))


def _mrkdwn(text: str) -> MarkdownTextObject:
    # Verbatim: a bare URL, #channel or @name in a caller's text stays text.
    return MarkdownTextObject(text=text, verbatim=True)


def _name(text: str) -> str:
    return f"`{_inert(text, _MAX_NAME) or ' '}`"


def _prose(text: str) -> str:
    # As code, so that no caller's text can look like ours.
    return f"```{_inert(text, _MAX_TEXT) or ' '}```"


def _inert(text: str, limit: int) -> str:
    """Return `text` as the inside of code, at most `limit` characters with its escapes."""
    pieces, size = [], 0
    part = mask_tokens(text[: limit + _TOKEN_CHARS])
    shown = Shown(part) if isinstance(text, Shown) else escape(part)
    for character in shown:
        # A backtick would end the code, and Slack has no escape for it.
        piece = "\\u0060" if character == "`" else mrkdwn(Shown(character))
        size += len(piece)
        pieces.append(piece)
        if size > limit:
            break
    if size <= limit and len(text) <= limit + _TOKEN_CHARS:
        return "".join(pieces)
    while pieces and size > limit - 1:
        size -= len(pieces.pop())
    return "".join(pieces) + MARK


def _time(moment: datetime) -> str:
    moment = moment.astimezone(UTC)
    # Slack shows the time in each reader's own zone; programs that cannot show the fallback.
    fallback = f"{moment:%Y-%m-%d %H:%M} UTC"
    return f"<!date^{int(moment.timestamp())}^{{date_short_pretty}} {{time}}|{fallback}>"
