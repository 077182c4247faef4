"""A click in Slack: whether it is signed, what it decides, and which approver the user is."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qs
from uuid import UUID

from pydantic import SecretStr

from agent_gateway_store._text import escape, is_blank
from agent_gateway_store.errors import MissingExtraError
from agent_gateway_store.hooks.executor import PluginExecutor, PluginFailure, awaited
from agent_gateway_store.plugins.slack.settings import SlackSettings

if TYPE_CHECKING:
    from agent_gateway_store.hooks.manager import Plugins

logger = logging.getLogger("agent_gateway_store.notifications")

APPROVE = "gateway_store_approve"
DENY = "gateway_store_deny"
MAP = "gateway_store_map_approver"
_DECISIONS = {APPROVE: True, DENY: False}
# The hosts of a `response_url` (https://docs.slack.dev/interactivity/handling-user-interaction, and GovSlack's page).
_REPLY_HOSTS = ("hooks.slack.com", "hooks.slack-gov.com")
# Fields of a form. Slack sends one, `payload`.
_MAX_FIELDS = 20


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


class Signatures:
    """Checks that a request comes from Slack, sent within the last five minutes.

    Raises:
        MissingExtraError: The extra `slack` is not installed.
    """

    def __init__(self, signing_secret: SecretStr) -> None:
        try:
            from slack_sdk.signature import SignatureVerifier
        except ImportError as exc:
            raise MissingExtraError("The Slack callback", extra="slack") from exc
        self._verifier = SignatureVerifier(signing_secret.get_secret_value())

    def are_valid(self, body: bytes, headers: Mapping[str, str]) -> bool:
        """Return whether the request is signed. Raises nothing: hostile headers and bodies count as not signed."""
        try:
            return self._verifier.is_valid_request(body, dict(headers.items())) is True
        except Exception:
            return False


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


class Approvers:
    """Asks the plugins (hook `gateway_store_map_approver`) which approver a user is. A plugin that fails refuses.

    Args:
        plugins: Of the store.
        timeout_s: Seconds that each plugin has; they are asked at the same time.
    """

    def __init__(self, plugins: Plugins, *, timeout_s: float) -> None:
        self._plugins = plugins
        self._executor = PluginExecutor(timeout_s)

    async def find(self, click: Click) -> str | None:
        """Return the approver id; None is a refusal. Raises nothing."""
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

    async def aclose(self) -> None:
        """End the threads."""
        await self._executor.aclose()


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
