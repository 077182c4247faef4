"""Notifier `apprise`: any of the services that https://appriseit.com supports, by URL."""

from __future__ import annotations

import logging
from datetime import UTC
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import BeforeValidator, SecretStr
from pydantic_settings import NoDecode, SettingsConfigDict

from agent_gateway_store._text import CUT_CALL
from agent_gateway_store.errors import NotDeliveredError, needs_extra
from agent_gateway_store.hooks import hookimpl
from agent_gateway_store.plugins._text import safe_text
from agent_gateway_store.settings import EnvironmentSettings

if TYPE_CHECKING:
    from agent_gateway_store.models.values import Notice

PREFIX = "AGENT_GATEWAY_STORE_APPRISE_"
# Characters of one text. Apprise splits or cuts what is longer than a service takes; SMS and pagers take a few hundred.
MAX_TEXT = 500


def _words(value: Any) -> Any:
    return value.split() if isinstance(value, str) else value


class AppriseSettings(EnvironmentSettings):
    """Settings for Apprise, each from `AGENT_GATEWAY_STORE_APPRISE_<NAME>`. A repr shows no secret.

    Attributes:
        urls: Where to send, as URLs of Apprise, separated by blanks. They hold passwords.
    """

    model_config = SettingsConfigDict(env_prefix=PREFIX, frozen=True)

    urls: Annotated[tuple[SecretStr, ...], NoDecode, BeforeValidator(_words)] = ()


class AppriseNotifier:
    """Sends a title and a few lines of plain text to every service that is set.

    Apprise reports one result for all of them: if one failed, the notice is sent to all of them again. Arguments are
    not sent, because it is not known who can read what these services receive. Approvers decide elsewhere.
    """

    name = "apprise"

    def __init__(self, settings: AppriseSettings | None = None) -> None:
        """Read the URLs; connect nothing.

        Args:
            settings: Default: from the environment.

        Raises:
            MissingExtraError: The extra `apprise` is not installed.
            ValueError: Apprise supports no service for one of the URLs; the text holds its number, not the URL.
        """
        with needs_extra("The Apprise notifier", extra="apprise"):
            import apprise
        settings = settings or AppriseSettings()
        # The text of a notice must not be read as escapes, emojis or markup.
        asset = apprise.AppriseAsset(interpret_escapes=False, interpret_emojis=False)
        self._apprise = apprise.Apprise(asset=asset)
        self._text = apprise.NotifyFormat.TEXT
        with _Silenced():
            for number, url in enumerate(settings.urls, 1):
                if not self._apprise.add(url.get_secret_value()):
                    raise ValueError(f"Apprise supports no service for URL number {number} in {PREFIX}URLS.")

    async def notify_pending(self, notice: Notice) -> None:
        """Send who wants which call, why a human is asked, and until when; NotDeliveredError if a service failed."""
        await self._send(
            f"Approval needed: {_shown(notice.tool_call.tool)}",
            f"Caller: {_shown(notice.caller_id)}",
            f"Call: {_shown(notice.tool_call.server)} / {_shown(notice.tool_call.tool)}",
            f"Why: {_shown(notice.risk_explanation)}",
            f"Decide by: {f'{notice.expires_at.astimezone(UTC):%Y-%m-%d %H:%M} UTC' if notice.expires_at else '-'}",
            *_where(notice),
        )

    async def notify_decision(self, notice: Notice) -> None:
        """Send the decision, and by whom; NotDeliveredError if a service failed."""
        await self._send(
            f"Approval {notice.status.value.lower()}: {_shown(notice.tool_call.tool)}",
            f"Caller: {_shown(notice.caller_id)}",
            f"By: {_shown(notice.approver_id) if notice.approver_id else '-'}",
            f"Note: {_shown(notice.note) or '-'}",
            *_where(notice),
        )

    async def _send(self, title: str, *lines: str) -> None:
        went_well = await self._apprise.async_notify(title=title, body="\n".join(lines), body_format=self._text)
        if not went_well:
            raise NotDeliveredError("At least one Apprise service failed; see the logger `apprise`.")


class _Silenced(logging.Filter):
    """While entered, drops what Apprise logs: a URL that it cannot read it logs whole, with the password."""

    def __enter__(self) -> None:
        logging.getLogger("apprise").addFilter(self)

    def __exit__(self, *_: object) -> None:
        logging.getLogger("apprise").removeFilter(self)

    def filter(self, record: logging.LogRecord) -> bool:
        return False


@hookimpl
def gateway_store_register_notifiers() -> list[AppriseNotifier]:
    """Contribute the notifier, if `AGENT_GATEWAY_STORE_APPRISE_URLS` names a service."""
    settings = AppriseSettings()
    return [AppriseNotifier(settings)] if settings.urls else []


@hookimpl
def gateway_store_plugin_settings() -> type[AppriseSettings]:
    """Return the class of its settings."""
    return AppriseSettings


def _where(notice: Notice) -> list[str]:
    command = f"gateway-store approvals show {notice.approval_id}"
    return [CUT_CALL, f"What is stored: {command}"] if notice.tool_call.is_cut else [f"All of it: {command}"]


def _shown(text: str) -> str:
    return safe_text(text, MAX_TEXT)
