"""Names and texts that messages and clicks share. Loads nothing."""

from __future__ import annotations

from agent_gateway_store._text import escape
from agent_gateway_store.errors import NotDeliveredError

__all__ = ["APPROVE", "DENY", "EVENT_TYPE", "SlackRefusedError", "mrkdwn"]

APPROVE = "gateway_store_approve"
DENY = "gateway_store_deny"
EVENT_TYPE = "gateway_store_approval"
"""Type of the metadata by which a message of ours is known."""

# The same message again would be refused again. Other errors (a revoked token, a bot that is not in the channel) can
# be put right while the notice waits.
_HOPELESS = frozenset({"invalid_blocks", "invalid_blocks_format", "invalid_metadata_format", "msg_too_long", "no_text"})


class SlackRefusedError(NotDeliveredError):
    """Slack answered, and said no.

    Attributes:
        code: Slack's word for it, as in `channel_not_found`.
    """

    def __init__(self, method: str, code: str) -> None:
        super().__init__(f"Slack refused {method}: {code}.", is_permanent=code in _HOPELESS)
        self.code = code


def mrkdwn(text: str) -> str:
    """Return `text` so that Slack shows it as it is: no mention, no link (`&`, `<`, `>` escaped, on one line)."""
    return escape(text).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
