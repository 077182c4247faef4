"""The receiving end: verifies a webhook before anything acts on it."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from cachetools import FIFOCache
from pydantic import SecretStr

from agent_gateway_store.errors import MissingExtraError
from agent_gateway_store.plugins.webhook.notifier import key_of

# More than the secrets of any rotation; a header could otherwise make us compute thousands of signatures.
MAX_SIGNATURES = 16


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
        try:
            from standardwebhooks import Webhook
        except ImportError as exc:
            raise MissingExtraError("Verifying webhooks", extra="webhook") from exc
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
