"""A notice as the body of a webhook: `{"type", "timestamp", "data"}`, below 20 kB."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from agent_gateway_store.plugins._text import cut, fit_arguments

if TYPE_CHECKING:
    from agent_gateway_store.models.values import Notice

__all__ = ["MAX_BYTES", "TYPES", "body_of"]

MAX_BYTES = 20_000
"""Standard Webhooks asks for less than 20 kB."""

TYPES = {"pending": "approval.requested", "decision": "approval.decided"}

_MAX_NAME, _MAX_TEXT, _MAX_ARGUMENTS = 512, 1000, 7000


def body_of(notice: Notice) -> bytes:
    """Return the JSON to send, at most 20,000 bytes. The same notice gives the same bytes, if it has a time of its own.

    What is too long is cut and ends in an ellipsis; `data.arguments_cut` tells whether arguments were.
    """
    happened = (notice.created_at if notice.event == "pending" else notice.decided_at) or datetime.now(UTC)
    body = b""
    # Text that needs escapes is up to six times as long in JSON; then it is cut shorter.
    for part in (1, 2, 4, 8):
        content = {"type": TYPES[notice.event], "timestamp": _time(happened), "data": _data(notice, part)}
        # A lone surrogate, which UTF-8 has no bytes for, becomes a question mark.
        body = json.dumps(content, ensure_ascii=False, separators=(",", ":"), allow_nan=False).encode(
            "utf-8", "replace"
        )
        if len(body) <= MAX_BYTES:
            break
    return body


def _data(notice: Notice, part: int) -> dict[str, Any]:
    name, text = _MAX_NAME // part, _MAX_TEXT // part
    arguments, was_cut = fit_arguments(notice.tool_call.arguments, _MAX_ARGUMENTS // part)
    return {
        "version": notice.version,
        "approval_id": str(notice.approval_id),
        "org_id": cut(notice.org_id, name),
        "request_id": cut(notice.request_id, name),
        "caller_id": cut(notice.caller_id, name),
        "tool_call": {
            "server": cut(notice.tool_call.server, name),
            "tool": cut(notice.tool_call.tool, name),
            "arguments": arguments,
        },
        "arguments_cut": was_cut,
        "risk_explanation": cut(notice.risk_explanation, text),
        "created_at": _time(notice.created_at),
        "expires_at": _time(notice.expires_at),
        "status": notice.status.value,
        "approver_id": None if notice.approver_id is None else cut(notice.approver_id, name),
        "note": cut(notice.note, text),
        "decided_at": _time(notice.decided_at),
    }


def _time(moment: datetime | None) -> str | None:
    return None if moment is None else moment.astimezone(UTC).isoformat().replace("+00:00", "Z")
