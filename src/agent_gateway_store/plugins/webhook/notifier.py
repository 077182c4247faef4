"""Notifier `webhook`: posts each notice, signed as Standard Webhooks says."""

from __future__ import annotations

import logging
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import TYPE_CHECKING, NoReturn

from agent_gateway_store.errors import MissingExtraError, NotDeliveredError
from agent_gateway_store.plugins._http.pause import Pause
from agent_gateway_store.plugins._http.urls import parse_url
from agent_gateway_store.plugins.webhook.payload import body_of
from agent_gateway_store.plugins.webhook.settings import WebhookEndpoint, WebhookSettings

if TYPE_CHECKING:
    from agent_gateway_store.models.values import Notice
    from agent_gateway_store.plugins._http.transport import Answer, Resolve

__all__ = ["WebhookNotifier", "retry_after_s"]

logger = logging.getLogger("agent_gateway_store.notifications")

MAX_RETRY_AFTER_SECONDS = 24 * 3600.0
GONE = 410


class WebhookNotifier:
    """Posts notices to one receiver, by https://www.standardwebhooks.com.

    `webhook-id` is the delivery id and stays the same over tries, `webhook-timestamp` is the time of the try, and
    `webhook-signature` holds one `v1` signature for each secret. Only 2xx is delivered. A redirect is a failure and is
    never followed. `Retry-After` is honoured; after 429 and 503 it holds back all notices, a minute at most. After a
    410 nothing more is sent until the process starts again.

    Attributes:
        name: `webhook`, or `webhook-<name>` of an endpoint.
    """

    def __init__(
        self,
        endpoint: WebhookEndpoint,
        settings: WebhookSettings | None = None,
        *,
        name: str = "webhook",
        timeout_s: float | None = None,
        resolver: Resolve | None = None,
    ) -> None:
        """Remember; connect nothing.

        Args:
            endpoint: Where to send and what to sign with.
            settings: What may be connected to, and how. Default: from the environment.
            name: Unique among all notifiers.
            timeout_s: Seconds for one delivery, if that is less than the setting.
            resolver: How host names are resolved. Default: by the machine's resolver.

        Raises:
            MissingExtraError: The extra `webhook` is not installed.
            ValueError: The URL cannot be used.
        """
        try:
            from standardwebhooks import Webhook

            from agent_gateway_store.plugins._http.transport import Transport, resolve
        except ImportError as exc:
            raise MissingExtraError("The webhook notifier", extra="webhook") from exc
        settings = settings or WebhookSettings()
        self.name = name
        self._url = parse_url(endpoint.url.get_secret_value(), allow_http=settings.allow_http)
        self._signers = [Webhook(secret.get_secret_value()) for secret in endpoint.secrets]
        self._timeout_s = min(settings.timeout_seconds, timeout_s or settings.timeout_seconds)
        self._is_gone = False
        self._pause = Pause()
        self._transport = Transport(
            settings.policy,
            proxy=settings.proxy.get_secret_value() if settings.proxy else None,
            ca_file=settings.ca_file,
            resolver=resolver or resolve,
            max_connections=settings.max_connections,
        )

    async def notify_pending(self, notice: Notice) -> None:
        """Post `approval.requested`.

        Raises:
            NotDeliveredError: It did not arrive.
        """
        await self._send(notice)

    async def notify_decision(self, notice: Notice) -> None:
        """Post `approval.decided`.

        Raises:
            NotDeliveredError: It did not arrive.
        """
        await self._send(notice)

    async def _send(self, notice: Notice) -> None:
        if self._is_gone:
            raise NotDeliveredError("The receiver said earlier that it is gone (410).", is_permanent=True)
        self._pause.require_over()
        body = body_of(notice)
        headers = {"Content-Type": "application/json", **self._signed(str(notice.delivery_id), body)}
        answer = await self._transport.post(self._url, body=body, headers=headers, timeout_s=self._timeout_s)
        if not 200 <= answer.status < 300:
            self._refused(answer)

    def _signed(self, delivery_id: str, body: bytes) -> dict[str, str]:
        now = datetime.now(UTC)
        text = body.decode()
        return {
            "webhook-id": delivery_id,
            "webhook-timestamp": str(int(now.timestamp())),
            "webhook-signature": " ".join(signer.sign(delivery_id, now, text) for signer in self._signers),
        }

    def _refused(self, answer: Answer) -> NoReturn:
        if answer.status == GONE:
            self._is_gone = True
            logger.warning(
                "Notifier %s: %s answered 410 Gone. Nothing more is sent there until this process starts again: remove "
                "the URL from the settings.",
                self.name,
                self._url.host,
            )
            raise NotDeliveredError("The receiver is gone (410).", is_permanent=True)
        if 300 <= answer.status < 400:
            raise NotDeliveredError(f"The receiver answered {answer.status}, a redirect; redirects are not followed.")
        wait_s = retry_after_s(answer.headers.get("retry-after"))
        if answer.status in (429, 503):
            self._pause.begin(wait_s)  # it speaks for all of the receiver, not for this notice
        raise NotDeliveredError(f"The receiver answered {answer.status}.", retry_after_s=wait_s)


def retry_after_s(header: str | None) -> float | None:
    """Return the seconds that a `Retry-After` header asks for (RFC 9110, 10.2.3), at most a day; None if none.

    Args:
        header: A number of seconds, or a date.
    """
    if header is None:
        return None
    header = header.strip()
    if header.isascii() and header.isdecimal():
        return min(float(header[:9]), MAX_RETRY_AFTER_SECONDS)
    try:
        moment = parsedate_to_datetime(header)
    except (TypeError, ValueError, OverflowError):
        return None
    moment = moment if moment.tzinfo else moment.replace(tzinfo=UTC)
    return min(max((moment - datetime.now(UTC)).total_seconds(), 0.0), MAX_RETRY_AFTER_SECONDS)
