"""Notifier `slack`: one message for an approval, with buttons while it waits."""

from __future__ import annotations

import logging
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any
from uuid import UUID

from cachetools import FIFOCache

from agent_gateway_store.errors import NotDeliveredError, needs_extra
from agent_gateway_store.plugins.slack.api import EVENT_TYPE, SlackApi, SlackRefusedError, SlackSettings

if TYPE_CHECKING:
    from agent_gateway_store.models.values import Notice

logger = logging.getLogger("agent_gateway_store.notifications")

# Approvals: a day of a busy channel, in a few megabytes. A message that is forgotten is looked up in the channel.
REMEMBERED = 10_000
# A notice this old may have been posted by a process that died before it recorded that: a first attempt comes within a
# second or two, and lasts at most the 5 seconds of a plugin call.
OLD = timedelta(seconds=20)
# By how much Slack's clock and the database's may differ. Machines without NTP are minutes off, rarely more.
LOOK_BACK = timedelta(minutes=10)
# Slack recommends at most 200 a page (https://docs.slack.dev/apis/web-api/pagination). Five pages are 1000 messages;
# each is one call, and all must fit into the time of one delivery.
PAGES, PER_PAGE = 5, 200

_UNREADABLE = frozenset(
    {"channel_not_found", "method_not_supported_for_channel_type", "missing_scope", "no_permission", "not_in_channel"}
)
_NOT_CHANGEABLE = frozenset({"message_not_found", "cant_update_message", "edit_window_closed"})


class SlackNotifier:
    """Posts each approval to a channel, and replaces the message once it is decided.

    This process remembers which messages it posted. After a restart, and where another process posted it, a message is
    looked up in the channel by its metadata (scope `channels:history` or `groups:history`); without that scope, or when
    more than 1000 messages came after it, the decision is a message of its own. The same look-up comes before a message
    that may have been posted already, so that a repeated delivery shows once.
    """

    name = "slack"

    def __init__(self, settings: SlackSettings | None = None) -> None:
        """Remember; connect nothing.

        Args:
            settings: Default: from the environment.

        Raises:
            MissingExtraError: The extra `slack` is not installed.
            ValueError: The bot token and the channel are not set.
        """
        settings = settings or SlackSettings()
        if settings.channel is None or settings.bot_token is None:
            raise ValueError("The Slack notifier needs a bot token and a channel.")
        with needs_extra("The Slack notifier", extra="slack"):
            from agent_gateway_store.plugins.slack import messages

            self._api = SlackApi(settings, settings.bot_token)
        self._channel = settings.channel
        self._messages = messages
        self._posted: FIFOCache[UUID, str] = FIFOCache(REMEMBERED)
        self._unsure: FIFOCache[UUID, bool] = FIFOCache(REMEMBERED)
        self._may_search = True

    async def notify_pending(self, notice: Notice) -> None:
        """Post the question, unless it is known to be posted; NotDeliveredError if Slack did not take it."""
        is_old = notice.created_at is not None and datetime.now(UTC) - notice.created_at > OLD
        may_be_there = is_old or notice.approval_id in self._unsure
        if notice.approval_id not in self._posted and not (may_be_there and await self._find(notice)):
            await self._post(notice, self._messages.pending_message(notice))

    async def notify_decision(self, notice: Notice) -> None:
        """Replace the question by the decision, or post that alone; NotDeliveredError if Slack did not take it."""
        message = self._messages.decided_message(notice)
        timestamp = self._posted.get(notice.approval_id) or await self._find(notice)
        if timestamp is not None and await self._update(timestamp, message):
            return
        await self._post(notice, message)

    async def _post(self, notice: Notice, message: dict[str, Any]) -> None:
        # Without an answer it is not known whether Slack posted it; then the next attempt looks it up first.
        self._unsure[notice.approval_id] = True
        try:
            answer = await self._api.call(
                "chat.postMessage",
                channel=self._channel,
                parse="none",
                link_names="false",
                unfurl_links="false",
                unfurl_media="false",
                **message,
            )
        except SlackRefusedError:
            self._unsure.pop(notice.approval_id, None)
            raise
        self._posted[notice.approval_id] = str(answer.get("ts"))
        self._unsure.pop(notice.approval_id, None)

    async def _update(self, timestamp: str, message: dict[str, Any]) -> bool:
        try:
            await self._api.call("chat.update", channel=self._channel, ts=timestamp, parse="none", **message)
        except SlackRefusedError as exc:
            if exc.code in _NOT_CHANGEABLE:
                return False
            raise
        return True

    async def _find(self, notice: Notice) -> str | None:
        """Look the message up in the channel; remember and return its timestamp, which is its id."""
        if not self._may_search:
            return None
        oldest = None if notice.created_at is None else f"{(notice.created_at - LOOK_BACK).timestamp():.6f}"
        cursor: str | None = None
        for _ in range(PAGES):
            try:
                page = await self._api.call(
                    "conversations.history",
                    channel=self._channel,
                    oldest=oldest,
                    limit=str(PER_PAGE),
                    include_all_metadata="true",
                    cursor=cursor,
                )
            except SlackRefusedError as exc:
                if exc.code not in _UNREADABLE:
                    raise
                self._may_search = False
                logger.warning(
                    "Notifier slack: the channel's history cannot be read (%s), so a message of another process is not "
                    "found again. Give the bot the scope channels:history or groups:history.",
                    exc.code,
                )
                return None
            timestamp = _timestamp_in(page, notice)
            if timestamp is not None:
                self._posted[notice.approval_id] = timestamp
                return timestamp
            cursor = _next_cursor(page)
            if cursor is None:
                return None
        return None


def _timestamp_in(page: dict[str, Any], notice: Notice) -> str | None:
    try:
        for message in page["messages"]:
            metadata = message.get("metadata") or {}
            payload = metadata.get("event_payload") or {}
            if metadata.get("event_type") == EVENT_TYPE and payload.get("approval_id") == str(notice.approval_id):
                return str(message["ts"])
    except (AttributeError, KeyError, TypeError):
        raise NotDeliveredError("Slack's answer to conversations.history cannot be read.") from None
    return None


def _next_cursor(page: dict[str, Any]) -> str | None:
    metadata = page.get("response_metadata")
    cursor = metadata.get("next_cursor") if isinstance(metadata, dict) else None
    return cursor if isinstance(cursor, str) and cursor else None
