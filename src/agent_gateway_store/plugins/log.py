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
        _log(
            notice,
            "APPROVAL_REQUIRED approval_id=%(approval_id)s caller=%(caller_id)s org=%(org_id)s server=%(server)s "
            "tool=%(tool)s risk=%(risk_explanation)s deadline=%(expires_at)s",
            texts={
                "server": notice.tool_call.server,
                "tool": notice.tool_call.tool,
                "risk_explanation": notice.risk_explanation,
            },
            facts={"expires_at": _time(notice.expires_at)},
        )

    async def notify_decision(self, notice: Notice) -> None:
        """Log `APPROVAL_DECIDED`: the decision, and by whom."""
        _log(
            notice,
            "APPROVAL_DECIDED approval_id=%(approval_id)s status=%(status)s approver=%(approver_id)s",
            texts={"approver_id": notice.approver_id},
            facts={"status": notice.status.value, "decided_at": _time(notice.decided_at)},
        )


@hookimpl
def gateway_store_register_notifiers() -> list[LogNotifier]:
    """Contribute the notifier `log`. It has no settings."""
    return [LogNotifier()]


def _log(notice: Notice, line: str, *, texts: dict[str, str | None], facts: dict[str, str]) -> None:
    if not logger.isEnabledFor(logging.INFO):
        return
    texts |= {"caller_id": notice.caller_id, "org_id": notice.org_id}
    clean = {name: None if text is None else safe_text(text, MAX_TEXT) for name, text in texts.items()}
    # Quotes inside are escaped, so no text can pretend to be another field.
    quoted = {name: "none" if text is None else json.dumps(text, ensure_ascii=False) for name, text in clean.items()}
    facts |= {"approval_id": str(notice.approval_id)}
    event = line.partition(" ")[0]
    logger.info(line, facts | quoted, extra={"event": event, "delivery_id": str(notice.delivery_id), **facts, **clean})


def _time(moment: datetime | None) -> str:
    return "none" if moment is None else moment.isoformat(timespec="seconds")
