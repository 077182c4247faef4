"""Reads a click out of what Slack sends, once its signature is right."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import parse_qs
from uuid import UUID

from pydantic import SecretStr

from agent_gateway_store.errors import MissingExtraError
from agent_gateway_store.plugins.slack.settings import SlackSettings
from agent_gateway_store.plugins.slack.words import APPROVE, DENY

__all__ = ["Click", "Signatures", "click_in"]

_DECISIONS = {APPROVE: True, DENY: False}
_REPLY_HOSTS = ("hooks.slack.com", "hooks.slack-gov.com")


@dataclass(frozen=True, slots=True)
class Click:
    """Somebody pressed a button of ours.

    Attributes:
        key: The same for every copy of the same click.
        approve: True for approve, False for deny.
        approval_id: What is decided.
        user_id: Slack's id of who clicked.
        user_name: What Slack calls them.
        response_url: Where a word to them can be sent; None if there is none to be trusted. Secret.
    """

    key: tuple[str, ...]
    approve: bool
    approval_id: UUID
    user_id: str
    user_name: str
    response_url: SecretStr | None


class Signatures:
    """Tells whether a request comes from Slack, and within five minutes.

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
        """Raises nothing: the library's verifier raises on hostile headers and bodies, and that is a no as well."""
        try:
            return self._verifier.is_valid_request(body, dict(headers.items())) is True
        except Exception:
            return False


def click_in(body: bytes, settings: SlackSettings) -> Click | None:
    """Return the click in a signed request; None if there is none of ours. Raises nothing."""
    try:
        (payload,) = parse_qs(body.decode(), max_num_fields=20)["payload"]
        content = json.loads(payload)
        if content["type"] != "block_actions":
            return None
        if settings.team_id is not None and content["team"]["id"] != settings.team_id:
            return None
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
    api = settings.target("")
    own = f"{api.scheme}://{api.authority}/"
    trusted = url.startswith((*(f"https://{host}/" for host in _REPLY_HOSTS), own))
    return SecretStr(url) if trusted else None
