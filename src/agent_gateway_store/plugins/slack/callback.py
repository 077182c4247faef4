"""Clicks on the buttons, from Slack to the store. Needs no web framework."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol
from urllib.parse import parse_qs
from uuid import UUID

from cachetools import FIFOCache
from pydantic import SecretStr

from agent_gateway_store._text import describe, escape, is_blank, mask_tokens
from agent_gateway_store.errors import ApprovalError, NotDeliveredError, needs_extra
from agent_gateway_store.hooks.executor import PluginExecutor, PluginFailure, awaited
from agent_gateway_store.plugins._http import parse_url
from agent_gateway_store.plugins._text import cut
from agent_gateway_store.plugins.slack.api import PREFIX, SlackSettings, mrkdwn

if TYPE_CHECKING:
    from agent_gateway_store.hooks.manager import Plugins
    from agent_gateway_store.models.values import ApprovalStatus

logger = logging.getLogger("agent_gateway_store.notifications")

APPROVE = "gateway_store_approve"
DENY = "gateway_store_deny"
MAP = "gateway_store_map_approver"
_DECISIONS = {APPROVE: True, DENY: False}
# The hosts of a `response_url` (https://docs.slack.dev/interactivity/handling-user-interaction, and GovSlack's page).
_REPLY_HOSTS = ("hooks.slack.com", "hooks.slack-gov.com")
# Fields of a form. Slack sends one, `payload`.
_MAX_FIELDS = 20
# Slack waits three seconds for an answer (https://docs.slack.dev/interactivity/handling-user-interaction).
ANSWER_SECONDS = 2.0
# Below ANSWER_SECONDS, so that a plugin that is too slow still leaves time to refuse the click.
MAP_SECONDS = 1.5
# As long as a plugin call may take by default: nobody waits for the reply but the person who clicked.
REPLY_SECONDS = 5.0
# Bytes. The payload of a click repeats the message: 50 blocks of 3,000 characters are 150 kB, six times as much with
# escapes.
MAX_BODY = 1_000_000
# Clicks: a day of a busy channel, in a few megabytes. One that is forgotten costs a second read of the store.
REMEMBERED = 10_000
# Characters. Slack's ids have about a dozen (https://docs.slack.dev/reference/objects/user-object).
_MAX_USER_ID = 40
# Characters of a reply: an error of the store is one sentence, which may quote a note of up to 2,000 characters.
_MAX_REPLY = 1000


@dataclass(frozen=True, slots=True)
class Click:
    """A click on one of our buttons.

    Attributes:
        key: The same for every copy of the same click.
        approve: True for approve, False for deny.
        approval_id: The approval to decide.
        user_id: Slack's id of the user who clicked.
        user_name: Slack's name of the user.
        response_url: Where a message to the user can be sent; None if there is none that can be trusted. Secret.
    """

    key: tuple[str, ...]
    approve: bool
    approval_id: UUID
    user_id: str
    user_name: str
    response_url: SecretStr | None


def click_in(body: bytes, settings: SlackSettings) -> Click | None:
    """Return the click in a signed request; None if it holds none on our buttons. Raises nothing."""
    try:
        (payload,) = parse_qs(body.decode(), max_num_fields=_MAX_FIELDS)["payload"]
        content = json.loads(payload)
        if content["type"] != "block_actions":
            return None
        if settings.team_id is not None and content["team"]["id"] != settings.team_id:
            return None
        # Other apps, and other buttons of the same app, share the Request URL.
        (action,) = [each for each in content["actions"] if each["action_id"] in _DECISIONS]
        user = content["user"]
        moment, user_id, user_name = action["action_ts"], user["id"], user.get("username") or user.get("name") or ""
        approval_id = UUID(action["value"])
        if not all(isinstance(text, str) for text in (moment, user_id, user_name)) or not (moment and user_id):
            return None
        return Click(
            key=(str(approval_id), action["action_id"], user_id, moment),
            approve=_DECISIONS[action["action_id"]],
            approval_id=approval_id,
            user_id=user_id,
            user_name=user_name,
            response_url=_reply_to(content.get("response_url"), settings),
        )
    except Exception:
        return None


def _reply_to(url: Any, settings: SlackSettings) -> SecretStr | None:
    if not isinstance(url, str):
        return None
    api = settings.method_url("")
    own = f"{api.scheme}://{api.authority}/"
    trusted = url.startswith((*(f"https://{host}/" for host in _REPLY_HOSTS), own))
    return SecretStr(url) if trusted else None


async def _answer(caller: Callable[..., list[object]], click: Click) -> str:
    """Run in the plugin's thread: return the approver that it names, "" for none."""
    answers = await awaited(
        caller(channel="slack", user_id=click.user_id, user_name=click.user_name, approval_id=click.approval_id)
    )
    known = [answer for answer in answers if answer is not None]
    for answer in known:
        if not isinstance(answer, str) or is_blank(answer):
            raise TypeError(f"{MAP} returned {type(answer).__name__}, not the id of an approver or None")
    return str(known[0]) if known else ""


class Decided(Protocol):
    """The result of a decision."""

    @property
    def status(self) -> ApprovalStatus: ...


class Approvals(Protocol):
    """What the callback needs of a store; `store.approvals` has it."""

    async def approve(self, *, approval_id: UUID, approver_id: str, note: str, channel: str) -> Decided: ...

    async def deny(self, *, approval_id: UUID, approver_id: str, note: str, channel: str) -> Decided: ...


@dataclass(frozen=True, slots=True)
class SlackReply:
    """The HTTP answer to Slack.

    Attributes:
        status: HTTP status.
        headers: HTTP headers.
        body: The content; always empty.
    """

    status: int
    headers: Mapping[str, str] = field(default_factory=dict)
    body: bytes = b""


class SlackCallback:
    """Decides approvals by signed clicks, each once, as the approver that the Slack user is.

    A request that Slack did not sign within the last five minutes, or that is not a POST, decides nothing. Nor does a
    click of somebody who is not an approver: they receive a message, and it is logged at WARNING. A repeated click,
    however often and however many at a time, is answered 200 and has no effect. This holds over several processes, too,
    because the store takes one decision. If the store refuses, the user receives the reason in a message that only they
    see.

    Belongs to one event loop: that of the store.
    """

    def __init__(self, approvals: Approvals, plugins: Plugins, settings: SlackSettings | None = None) -> None:
        """Remember; connect nothing.

        Args:
            approvals: `store.approvals`. With a store bound by `for_org`, approvals of other organisations are not
                found.
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
        with needs_extra("The Slack callback", extra="slack"):
            from slack_sdk.signature import SignatureVerifier

            from agent_gateway_store.plugins._http.transport import Transport
        self._approvals = approvals
        self._settings = settings
        self._verifier = SignatureVerifier(settings.signing_secret.get_secret_value())
        self._plugins, self._executor = plugins, PluginExecutor(MAP_SECONDS)
        self._transport = Transport(None, proxy=settings.proxy, ca_file=settings.ca_file)
        self._clicks: FIFOCache[tuple[str, ...], asyncio.Task[None]] = FIFOCache(REMEMBERED)
        self._tasks: set[asyncio.Task[None]] = set()

    async def handle(self, body: bytes, headers: Mapping[str, str], *, method: str = "POST") -> SlackReply:
        """Take a request to the Request URL, and return the answer. Raises nothing; takes at most two seconds.

        A decision that takes longer goes on in the background, and the user receives a message about how it ended.

        Args:
            body: The bytes of the request, unchanged: the signature covers them.
            headers: Names in upper or lower case.
            method: HTTP method. Anything but POST (a link scanner's GET) does nothing.

        Returns:
            405 if it is not a POST, 413 if it is longer than a megabyte, 401 if Slack did not sign it or it is too old;
            else 200.
        """
        if method.upper() != "POST":
            return SlackReply(405, {"Allow": "POST"})
        if len(body) > MAX_BODY:
            return SlackReply(413)
        if not self._is_signed(body, headers):
            return SlackReply(401)
        click = click_in(body, self._settings)
        if click is not None:
            # A wait, not a timeout: the decision must not be cancelled because it is slow.
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
        await self._executor.aclose()
        await self._transport.aclose()

    def _is_signed(self, body: bytes, headers: Mapping[str, str]) -> bool:
        """Return whether Slack sent it within the last five minutes; hostile headers and bodies count as not signed."""
        try:
            return self._verifier.is_valid_request(body, dict(headers.items())) is True
        except Exception:
            return False

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
            # Forgotten, so that the same click counts when Slack or the user tries again.
            self._clicks.pop(click.key, None)
            logger.warning(
                "A click in Slack on approval %s could not be recorded: %s", click.approval_id, describe(exc)
            )
            reply = "Your decision could not be recorded. Try again in a moment."
        if reply:
            await self._reply(click, reply)

    async def _decide(self, click: Click) -> str | None:
        """Return the reply to the user; None if the new message in the channel says enough."""
        user = cut(escape(click.user_id), _MAX_USER_ID)
        approver_id = self._settings.approvers.get(click.user_id) or await self._approver_of(click)
        if approver_id is None:
            logger.warning(
                "Refused a click in Slack: user %s is not an approver (approval %s).", user, click.approval_id
            )
            return "You are not an approver here, so nothing was decided. Ask the operator of the gateway."
        decide = self._approvals.approve if click.approve else self._approvals.deny
        result = await decide(
            approval_id=click.approval_id,
            approver_id=approver_id,
            note=f"Slack user {user}",
            channel="slack",
        )
        return "Your approval is recorded. Others must approve as well." if result.status == "PENDING" else None

    async def _approver_of(self, click: Click) -> str | None:
        """Ask the plugins, side by side, which approver a user is; None is a refusal, as is a plugin that fails."""
        callers = self._plugins.callers(MAP)
        answers = await asyncio.gather(
            *(self._executor.run("map", name, partial(_answer, caller, click)) for name, caller in callers.items())
        )
        for name, answer in zip(callers, answers, strict=True):
            if isinstance(answer, PluginFailure):
                logger.warning("Plugin %s failed when asked who clicked: %s", escape(name), answer.text)
                return None
            # In the order of the plugins, so that two that disagree give the same approver each time.
            if answer:
                return answer
        return None

    async def _reply(self, click: Click, text: str) -> None:
        if click.response_url is None:
            return
        text = mrkdwn(cut(mask_tokens(text), _MAX_REPLY))
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
            logger.warning("The reply to a click in Slack was not delivered: %s", describe(exc))
