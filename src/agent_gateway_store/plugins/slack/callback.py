"""Clicks on the buttons, from Slack to the store. Knows no web framework."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol
from uuid import UUID

from cachetools import FIFOCache

from agent_gateway_store._text import describe, escape, mask_tokens
from agent_gateway_store.errors import ApprovalError, MissingExtraError, NotDeliveredError
from agent_gateway_store.plugins._http.urls import parse_url
from agent_gateway_store.plugins._text import cut
from agent_gateway_store.plugins.slack.api import mrkdwn
from agent_gateway_store.plugins.slack.clicks import Approvers, Click, Signatures, click_in
from agent_gateway_store.plugins.slack.settings import PREFIX, SlackSettings

if TYPE_CHECKING:
    from agent_gateway_store.hooks.manager import Plugins
    from agent_gateway_store.models.values import ApprovalStatus

__all__ = ["Approvals", "Decided", "SlackCallback", "SlackReply"]

logger = logging.getLogger("agent_gateway_store.notifications")

ANSWER_SECONDS = 2.0
"""Slack waits three seconds for an answer."""

MAP_SECONDS = 1.5
REPLY_SECONDS = 5.0
MAX_BODY = 1_000_000
REMEMBERED = 10_000


class Decided(Protocol):
    """What a decision comes to."""

    @property
    def status(self) -> ApprovalStatus: ...


class Approvals(Protocol):
    """What the callback needs of a store: `store.approvals` has it."""

    async def approve(self, *, approval_id: UUID, approver_id: str, note: str, channel: str) -> Decided: ...

    async def deny(self, *, approval_id: UUID, approver_id: str, note: str, channel: str) -> Decided: ...


@dataclass(frozen=True, slots=True)
class SlackReply:
    """What to answer to Slack.

    Attributes:
        status: HTTP status.
        headers: HTTP headers.
        body: The content; always empty.
    """

    status: int
    headers: Mapping[str, str] = field(default_factory=dict)
    body: bytes = b""


class SlackCallback:
    """Decides approvals by signed clicks, each once, in the name of the approver that the clicking user is.

    A request that Slack did not sign within the last five minutes, or that is not a POST, decides nothing. Nor does a
    click of somebody who is not an approver: they get a message, and it is logged at WARNING. The same click again,
    however often and however many at a time, is answered 200 and has no effect; that holds over several processes, too,
    because the store takes one decision. If the store refuses, whoever clicked gets the reason in a message that only
    they see.

    Belongs to one event loop: that of the store.
    """

    def __init__(self, approvals: Approvals, plugins: Plugins, settings: SlackSettings | None = None) -> None:
        """Remember; connect nothing.

        Args:
            approvals: `store.approvals`. Of a store bound by `for_org`, approvals of others look absent.
            plugins: `store.plugins`: for users who are not in the setting APPROVERS, the hook
                `gateway_store_map_approver` says whether they are approvers.
            settings: Default: from the environment.

        Raises:
            ValueError: The signing secret is not set.
            MissingExtraError: The extra `slack` is not installed.
        """
        settings = settings or SlackSettings()
        if settings.signing_secret is None:
            raise ValueError(f"The Slack callback needs {PREFIX}SIGNING_SECRET.")
        try:
            from agent_gateway_store.plugins._http.transport import Transport
        except ImportError as exc:
            raise MissingExtraError("The Slack callback", extra="slack") from exc
        self._approvals = approvals
        self._settings = settings
        self._signatures = Signatures(settings.signing_secret)
        self._approvers = Approvers(plugins, timeout_s=MAP_SECONDS)
        self._transport = Transport(
            None,
            proxy=settings.proxy.get_secret_value() if settings.proxy else None,
            ca_file=settings.ca_file,
        )
        self._clicks: FIFOCache[tuple[str, ...], asyncio.Task[None]] = FIFOCache(REMEMBERED)
        self._tasks: set[asyncio.Task[None]] = set()

    async def handle(self, body: bytes, headers: Mapping[str, str], *, method: str = "POST") -> SlackReply:
        """Take what was sent to the Request URL, and return what to answer. Raises nothing; takes at most two seconds.

        A decision that takes longer goes on in the background, and whoever clicked gets a message about how it ended.

        Args:
            body: The bytes as they came.
            headers: In any case of letters.
            method: HTTP method. Anything but POST (a link scanner's GET) does nothing.

        Returns:
            405 if it is not a POST, 413 if it is longer than a megabyte, 401 if Slack did not sign it or it is too old;
            else 200.
        """
        if method.upper() != "POST":
            return SlackReply(405, {"Allow": "POST"})
        if len(body) > MAX_BODY:
            return SlackReply(413)
        if not self._signatures.are_valid(body, headers):
            return SlackReply(401)
        click = click_in(body, self._settings)
        if click is not None:
            await asyncio.wait({self._task(click)}, timeout=ANSWER_SECONDS)
        return SlackReply(200)

    async def aclose(self, timeout: float = 5.0) -> None:
        """Wait for what goes on in the background, then close the connections.

        Args:
            timeout: Seconds to wait; what is not done by then is cancelled.
        """
        if self._tasks:
            _, late = await asyncio.wait(set(self._tasks), timeout=timeout)
            for task in late:
                task.cancel()
            if late:
                await asyncio.wait(late, timeout=1)
        await self._approvers.aclose()
        await self._transport.aclose()

    def _task(self, click: Click) -> asyncio.Task[None]:
        task = self._clicks.get(click.key)
        if task is None:
            task = asyncio.create_task(self._take(click), name="gateway-store slack click")
            self._clicks[click.key] = task
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
        return task

    async def _take(self, click: Click) -> None:
        try:
            reply = await self._decide(click)
        except ApprovalError as refusal:
            reply = str(refusal)
        except Exception as exc:
            # Slack, or the user, may try again.
            self._clicks.pop(click.key, None)
            logger.warning("A click in Slack on approval %s came to nothing: %s", click.approval_id, describe(exc))
            reply = "Your decision could not be recorded. Try again in a moment."
        if reply:
            await self._reply(click, reply)

    async def _decide(self, click: Click) -> str | None:
        """Return the reply to whoever clicked; None if the message in the channel will say it all."""
        approver_id = self._settings.approvers.get(click.user_id) or await self._approvers.find(click)
        if approver_id is None:
            logger.warning(
                "Refused a click in Slack: user %s is no approver (approval %s).",
                _shown(click.user_id),
                click.approval_id,
            )
            return "You are not an approver here, so nothing was decided. Ask the operator of the gateway."
        decide = self._approvals.approve if click.approve else self._approvals.deny
        result = await decide(
            approval_id=click.approval_id,
            approver_id=approver_id,
            note=f"Slack user {_shown(click.user_id)}",
            channel="slack",
        )
        return "Your approval is recorded. Others must approve as well." if result.status == "PENDING" else None

    async def _reply(self, click: Click, text: str) -> None:
        if click.response_url is None:
            return
        text = mrkdwn(cut(mask_tokens(text), 1000))
        content = {"response_type": "ephemeral", "replace_original": False, "text": text}
        try:
            answer = await self._transport.post(
                parse_url(click.response_url.get_secret_value(), allow_http=True),
                body=json.dumps(content).encode(),
                headers={"Content-Type": "application/json"},
                timeout_s=REPLY_SECONDS,
            )
            if answer.status != 200:
                raise NotDeliveredError(f"Slack answered {answer.status}.")
        except Exception as exc:
            logger.warning("What became of a click in Slack could not be told: %s", describe(exc))


def _shown(user_id: str) -> str:
    return cut(escape(user_id), 40)
