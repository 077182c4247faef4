"""Notifier `webhook`: signed posts to your own receivers, and the check for the receiving end.

Contributes one notifier for each receiver in the settings.
"""

from __future__ import annotations

import base64
import binascii
import json
import logging
import re
import threading
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Annotated, Any, NoReturn, Self

from cachetools import FIFOCache
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, SecretStr, field_validator, model_validator
from pydantic_settings import NoDecode, SettingsConfigDict

from agent_gateway_store._text import CUT_CALL
from agent_gateway_store.errors import NotDeliveredError, needs_extra
from agent_gateway_store.hooks import hookimpl
from agent_gateway_store.plugins._http import ReceiverSettings, parse_url, retry_after_s, time_limit_s, words
from agent_gateway_store.plugins._text import cut, fit_arguments

if TYPE_CHECKING:
    from agent_gateway_store.models.values import Notice
    from agent_gateway_store.plugins._http.transport import Answer, Resolve
    from agent_gateway_store.settings import StoreSettings

logger = logging.getLogger("agent_gateway_store.notifications")

PREFIX = "AGENT_GATEWAY_STORE_WEBHOOK_"
# Standard Webhooks, "Signature scheme": between 24 bytes (192 bits) and 64 bytes (512 bits).
MIN_KEY_BYTES, MAX_KEY_BYTES = 24, 64
# Standard Webhooks asks for less than 20 kB (specification, "Payload best practices").
MAX_BYTES = 20_000
# Characters, and for arguments bytes, of one part of a notice: six names, two texts and the arguments make 12,000,
# which leaves room for UTF-8 and for escapes.
_MAX_NAME, _MAX_TEXT, _MAX_ARGUMENTS = 512, 1000, 7000
TYPES = {"pending": "approval.requested", "decision": "approval.decided"}
# Gone (RFC 9110, 15.5.11). Standard Webhooks asks senders to stop when they receive it.
GONE = 410
# More than the secrets of any rotation; a header could otherwise make us compute thousands of signatures.
MAX_SIGNATURES = 16


def key_of(secret: str) -> bytes:
    """Return the key in `whsec_<base64>`.

    Raises:
        ValueError: It has another form, or is not 24 to 64 bytes long (as Standard Webhooks asks).
    """
    try:
        key = base64.b64decode(secret.removeprefix("whsec_"), validate=True)
    except (binascii.Error, ValueError):
        key = b""
    if not secret.startswith("whsec_") or not MIN_KEY_BYTES <= len(key) <= MAX_KEY_BYTES:
        raise ValueError("a secret is whsec_ and the base64 of 24 to 64 random bytes")
    return key


Secrets = Annotated[tuple[SecretStr, ...], BeforeValidator(words)]


class WebhookEndpoint(BaseModel):
    """One receiver.

    Attributes:
        url: Where to post. Kept secret: anybody who knows it can post there.
        secrets: Keys to sign with. Each adds a signature; give the old and the new one while the receiver changes.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", hide_input_in_errors=True)

    url: SecretStr
    secrets: Secrets = Field(min_length=1)

    @field_validator("secrets")
    @classmethod
    def _keys(cls, secrets: tuple[SecretStr, ...]) -> tuple[SecretStr, ...]:
        for secret in secrets:
            key_of(secret.get_secret_value())
        return secrets


class WebhookSettings(ReceiverSettings):
    """Settings of the webhook notifier, each from `AGENT_GATEWAY_STORE_WEBHOOK_<NAME>`, besides `ReceiverSettings`.

    Attributes:
        url: The receiver. Needs `secrets`.
        secrets: `whsec_...`, separated by blanks or commas.
        endpoints: Receivers with secrets of their own, as JSON: `{"ops": {"url": ..., "secrets": ...}}`. Each is a
            notifier `webhook-<name>`, beside `webhook` for `url`.
        max_connections: Deliveries to one receiver at a time.
    """

    model_config = SettingsConfigDict(env_prefix=PREFIX)

    url: SecretStr | None = None
    secrets: Annotated[Secrets, NoDecode] = ()
    endpoints: dict[str, WebhookEndpoint] = Field(default={})
    max_connections: int = Field(default=20, gt=0)

    @model_validator(mode="after")
    def _usable(self) -> Self:
        if self.secrets and self.url is None:
            raise ValueError(f"{PREFIX}SECRETS is set, but {PREFIX}URL is not")
        for name, endpoint in self.receivers.items():
            # The name of a notifier is a column of the outbox, and a part of URLs of dashboards and of log lines.
            if not re.fullmatch(r"webhook(-[a-z0-9][a-z0-9_-]{0,40})?", name):
                raise ValueError("the name of an endpoint is made of a-z, 0-9, - and _")
            self.check_url(endpoint.url, name)
        return self

    @property
    def receivers(self) -> dict[str, WebhookEndpoint]:
        """Every receiver by the name of its notifier; empty if none is set."""
        named = {f"webhook-{name}": endpoint for name, endpoint in self.endpoints.items()}
        if self.url is None:
            return named
        return {"webhook": WebhookEndpoint(url=self.url, secrets=self.secrets), **named}


class WebhookNotifier:
    """Posts notices to one receiver, by https://www.standardwebhooks.com.

    `webhook-id` is the delivery id and stays the same over attempts, `webhook-timestamp` is the time of the attempt,
    and `webhook-signature` holds one `v1` signature for each secret. Only 2xx means delivered. A redirect is a failure
    and is never followed. `Retry-After` is followed; after 429 and 503 it holds back all notices, a minute at most.
    After a 410 nothing more is sent until the process starts again.

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
            settings: Which addresses are allowed, and how to connect. Default: from the environment.
            name: Unique among all notifiers.
            timeout_s: Seconds for one delivery, if that is less than the setting.
            resolver: How host names are resolved. Default: by the machine's resolver.

        Raises:
            MissingExtraError: The extra `webhook` is not installed.
            ValueError: The URL cannot be used.
        """
        settings = settings or WebhookSettings()
        with needs_extra("The webhook notifier", extra="webhook"):
            from standardwebhooks import Webhook

            self._transport = settings.transport(resolver, max_connections=settings.max_connections)
        self.name = name
        self._url = parse_url(endpoint.url.get_secret_value(), allow_http=settings.allow_http)
        self._signers = [Webhook(secret.get_secret_value()) for secret in endpoint.secrets]
        self._timeout_s = min(settings.timeout_seconds, timeout_s or settings.timeout_seconds)
        self._is_gone = False

    async def notify_pending(self, notice: Notice) -> None:
        """Post `approval.requested`; raises NotDeliveredError if it did not arrive."""
        await self._send(notice)

    async def notify_decision(self, notice: Notice) -> None:
        """Post `approval.decided`; raises NotDeliveredError if it did not arrive."""
        await self._send(notice)

    async def _send(self, notice: Notice) -> None:
        if self._is_gone:
            raise NotDeliveredError("The receiver said earlier that it is gone (410).", is_permanent=True)
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
            # These two are about the whole receiver, not about this notice.
            self._transport.pause(wait_s)
        raise NotDeliveredError(f"The receiver answered {answer.status}.", retry_after_s=wait_s)


def body_of(notice: Notice) -> bytes:
    """Return the JSON to send, at most 20,000 bytes. The same notice gives the same bytes, if it has a time of its own.

    What is too long is cut and ends in an ellipsis; `data.arguments_cut` tells whether arguments were. `data.warning`
    is a sentence for approvers where the call was not even stored whole, else "".
    """
    happened = (notice.created_at if notice.event == "pending" else notice.decided_at) or datetime.now(UTC)
    body = b""
    # A character that JSON escapes takes six bytes (`\\u0001`): then every part is cut shorter, until all of it fits.
    for part in (1, 2, 4, 8):
        content = {"type": TYPES[notice.event], "timestamp": _time(happened), "data": _data(notice, part)}
        text = json.dumps(content, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
        # A lone surrogate, which UTF-8 has no bytes for, becomes a question mark.
        body = text.encode("utf-8", "replace")
        if len(body) <= MAX_BYTES:
            break
    return body


def _data(notice: Notice, part: int) -> dict[str, Any]:
    name, text = _MAX_NAME // part, _MAX_TEXT // part
    arguments, was_cut = fit_arguments(notice.tool_call.arguments, _MAX_ARGUMENTS // part)
    return {
        "version": notice.version,
        "approval_id": str(notice.approval_id),
        "org_id": cut(notice.org_id, name),
        "request_id": cut(notice.request_id, name),
        "caller_id": cut(notice.caller_id, name),
        "tool_call": {
            "server": cut(notice.tool_call.server, name),
            "tool": cut(notice.tool_call.tool, name),
            "arguments": arguments,
        },
        "arguments_cut": was_cut,
        "warning": CUT_CALL if notice.tool_call.is_cut else "",
        "risk_explanation": cut(notice.risk_explanation, text),
        "created_at": _time(notice.created_at),
        "expires_at": _time(notice.expires_at),
        "status": notice.status.value,
        "approver_id": None if notice.approver_id is None else cut(notice.approver_id, name),
        "note": cut(notice.note, text),
        "decided_at": _time(notice.decided_at),
        "scope": notice.scope,
        "required_approvals": notice.required_approvals,
    }


def _time(moment: datetime | None) -> str | None:
    return None if moment is None else moment.astimezone(UTC).isoformat().replace("+00:00", "Z")


@dataclass(frozen=True, slots=True)
class Received:
    """A webhook whose signature is right.

    Attributes:
        id: `webhook-id`: the delivery id. The same over attempts, so that a repeat can be recognised.
        type: `approval.requested` or `approval.decided`.
        timestamp: When it happened, as ISO 8601 text.
        data: The notice.
        is_repeat: True if this receiver has received this id before: answer 2xx, and do nothing.
    """

    id: str
    type: str
    timestamp: str
    data: dict[str, Any]
    is_repeat: bool


class WebhookReceiver:
    """Verifies webhooks of this package, and remembers their ids. May be used from several threads.

    It remembers a limited number of ids, in this process: with several processes, or across restarts, keep the id in a
    column with a unique constraint. A captured webhook is refused when it is five minutes old.

    Args:
        secrets: The secrets of the sender; a signature by one of them is enough.
        remember: How many ids to keep.

    Raises:
        MissingExtraError: The extra `webhook` is not installed.
        ValueError: A secret has the wrong form, or there is none.
    """

    def __init__(self, secrets: Iterable[str | SecretStr], *, remember: int = 10_000) -> None:
        with needs_extra("Verifying webhooks", extra="webhook"):
            from standardwebhooks import Webhook
        texts = [secret.get_secret_value() if isinstance(secret, SecretStr) else secret for secret in secrets]
        if not texts:
            raise ValueError("A receiver needs at least one secret.")
        self._verifiers = [Webhook(key_of(text)) for text in texts]
        self._seen: FIFOCache[str, bool] = FIFOCache(remember)
        self._lock = threading.Lock()

    def verify(self, body: bytes, headers: Mapping[str, str]) -> Received | None:
        """Return what was received; None if its signature, its age or its form is wrong. Raises nothing.

        This call remembers the id; if handling it fails, `forget` the id, and the sender's next attempt is new.

        Args:
            body: The bytes of the request, unchanged: not parsed and written again.
            headers: Names in upper or lower case.
        """
        try:
            own = {name.lower(): value for name, value in headers.items()}
            if not any(_is_valid(verifier, body, own) for verifier in self._verifiers):
                return None
            content, delivery_id = json.loads(body), own["webhook-id"]
            parts = content["type"], content["timestamp"], content["data"]
            if not (isinstance(parts[0], str) and isinstance(parts[1], str) and isinstance(parts[2], dict)):
                return None
            return Received(delivery_id, *parts, is_repeat=self._is_repeat(delivery_id))
        except Exception:
            return None

    def forget(self, delivery_id: str) -> None:
        """Treat the next attempt of `delivery_id` as new."""
        with self._lock:
            self._seen.pop(delivery_id, None)

    def _is_repeat(self, delivery_id: str) -> bool:
        with self._lock:
            is_known = delivery_id in self._seen
            if self._seen.maxsize:
                self._seen[delivery_id] = True
            return is_known


def _is_valid(verifier: Any, body: bytes, headers: dict[str, str]) -> bool:
    # The library gives up at the first odd entry of the signature header, so each entry is verified alone.
    for signature in headers["webhook-signature"].split(" ")[:MAX_SIGNATURES]:
        # It raises errors of many types on hostile headers; each of them means: not valid.
        with suppress(Exception):
            verifier.verify(body, headers | {"webhook-signature": signature}, json_parse=False)
            return True
    return False


@hookimpl
def gateway_store_register_notifiers(settings: StoreSettings) -> list[WebhookNotifier]:
    """Contribute a notifier for each receiver that `AGENT_GATEWAY_STORE_WEBHOOK_...` names."""
    own = WebhookSettings()
    timeout_s = time_limit_s(settings)
    return [WebhookNotifier(endpoint, own, name=name, timeout_s=timeout_s) for name, endpoint in own.receivers.items()]


@hookimpl
def gateway_store_plugin_settings() -> type[WebhookSettings]:
    """Return the class of its settings."""
    return WebhookSettings
