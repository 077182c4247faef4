"""Notifier `log`: one line in the application's log for every notice."""

from __future__ import annotations

import json
import logging
from typing import TYPE_CHECKING

from agent_gateway_store.hooks import hookimpl
from agent_gateway_store.plugins._text import safe_text

if TYPE_CHECKING:
    from datetime import datetime

    from agent_gateway_store.models.values import Notice

logger = logging.getLogger("agent_gateway_store.notifications")

# Characters: half of the 2,048 octets that a receiver of syslog should accept in one message (RFC 5424, 6.1). Only the
# risk explanation is usually longer than a few words.
MAX_TEXT = 1000


class LogNotifier:
    """Logs on `agent_gateway_store.notifications` at INFO.

    A notice is one line, whatever its text holds: line breaks, ANSI and bidi marks are escaped, texts are quoted and
    cut at 1000 characters. No token and no argument is logged. The same facts are attributes of the log record.
    """

    name = "log"

    async def notify_pending(self, notice: Notice) -> None:
        """Log `APPROVAL_REQUIRED`: who wants which call, why a human is asked, and until when it can be decided."""
        if not logger.isEnabledFor(logging.INFO):
            return
        facts = {
            "approval_id": str(notice.approval_id),
            "caller_id": _clean(notice.caller_id),
            "org_id": _clean(notice.org_id),
            "server": _clean(notice.tool_call.server),
            "tool": _clean(notice.tool_call.tool),
            "risk_explanation": _clean(notice.risk_explanation),
            "expires_at": _time(notice.expires_at),
        }
        logger.info(
            "APPROVAL_REQUIRED approval_id=%s caller=%s org=%s server=%s tool=%s risk=%s deadline=%s",
            facts["approval_id"],
            *(_quoted(facts[key]) for key in ("caller_id", "org_id", "server", "tool", "risk_explanation")),
            facts["expires_at"],
            extra={"event": "APPROVAL_REQUIRED", "delivery_id": str(notice.delivery_id), **facts},
        )

    async def notify_decision(self, notice: Notice) -> None:
        """Log `APPROVAL_DECIDED`: the decision, and by whom."""
        if not logger.isEnabledFor(logging.INFO):
            return
        facts = {
            "approval_id": str(notice.approval_id),
            "status": notice.status.value,
            "approver_id": None if notice.approver_id is None else _clean(notice.approver_id),
            "caller_id": _clean(notice.caller_id),
            "org_id": _clean(notice.org_id),
            "decided_at": _time(notice.decided_at),
        }
        logger.info(
            "APPROVAL_DECIDED approval_id=%s status=%s approver=%s",
            facts["approval_id"],
            facts["status"],
            _quoted(facts["approver_id"]),
            extra={"event": "APPROVAL_DECIDED", "delivery_id": str(notice.delivery_id), **facts},
        )


@hookimpl
def gateway_store_register_notifiers() -> list[LogNotifier]:
    """Contribute the notifier `log`. It has no settings."""
    return [LogNotifier()]


def _clean(text: str) -> str:
    return safe_text(text, MAX_TEXT)


def _quoted(text: str | None) -> str:
    # Quotes inside are escaped, so no text can pretend to be another field.
    return "none" if text is None else json.dumps(text, ensure_ascii=False)


def _time(moment: datetime | None) -> str:
    return "none" if moment is None else moment.isoformat(timespec="seconds")
