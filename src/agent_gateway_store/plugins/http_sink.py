"""Sink `http-sink`: posts events as lines of JSON, with headers of your own."""

from __future__ import annotations

import gzip
from collections.abc import Sequence
from typing import TYPE_CHECKING, Self

from pydantic import Field, SecretStr, model_validator
from pydantic_settings import SettingsConfigDict

from agent_gateway_store.errors import NotDeliveredError, needs_extra
from agent_gateway_store.hooks import hookimpl
from agent_gateway_store.plugins._http import ReceiverSettings, parse_url, retry_after_s, time_limit_s

if TYPE_CHECKING:
    from agent_gateway_store.models.audit import AuditEvent
    from agent_gateway_store.plugins._http.transport import Resolve
    from agent_gateway_store.settings import StoreSettings

PREFIX = "AGENT_GATEWAY_STORE_HTTP_SINK_"
# Bad Request, Content Too Large, Unprocessable Content (RFC 9110, 15.5): about the events. Every other answer is about
# the receiver or the settings, and the events can be taken once that is put right.
_REFUSALS = (400, 413, 422)
# They say where a body ends, and to whom it goes.
_FRAMING = frozenset({"connection", "content-encoding", "content-length", "host", "transfer-encoding"})


class HttpSinkSettings(ReceiverSettings):
    """Settings of the HTTP sink, each from `AGENT_GATEWAY_STORE_HTTP_SINK_<NAME>`, besides `ReceiverSettings`.

    Attributes:
        url: Where to post. Kept secret, since a URL may hold a token. None: the plugin does nothing.
        headers: Headers to send besides, as JSON: `{"Authorization": "Splunk 1234"}`.
        gzip: Whether the body is compressed (`Content-Encoding: gzip`), for a receiver that takes that.
    """

    model_config = SettingsConfigDict(env_prefix=PREFIX)

    url: SecretStr | None = None
    headers: dict[str, SecretStr] = Field(default={})
    gzip: bool = False

    @model_validator(mode="after")
    def _usable(self) -> Self:
        if self.url is not None:
            self.check_url(self.url, "http-sink")
        for name, value in self.headers.items():
            text = value.get_secret_value()
            # What HTTP allows in a name, and what cannot end a line in a value (RFC 9110, 5.1 and 5.5).
            if not name.replace("-", "").isalnum() or not (name + text).isascii():
                raise ValueError("a header is made of letters, digits and hyphens, its value of printable ASCII")
            if not text.isprintable() or text != text.strip():
                raise ValueError("the value of a header must be printable ASCII, without blanks at its ends")
            if name.lower() in _FRAMING:
                raise ValueError(f"the header {name} is set for each batch: leave it out")
        return self


class HttpSink:
    """Posts a batch as JSON lines (`application/x-ndjson`), the lines that `audit export` writes.

    2xx is an acknowledgement. 400, 413 and 422 refuse the batch for good; everything else, redirects included, is tried
    again. `Retry-After` is followed.

    Attributes:
        name: `http-sink`.
    """

    name = "http-sink"

    def __init__(
        self, settings: HttpSinkSettings, *, timeout_s: float | None = None, resolver: Resolve | None = None
    ) -> None:
        """Remember; connect nothing.

        Args:
            settings: Where to post, and how to connect.
            timeout_s: Seconds for one batch, if that is less than the setting.
            resolver: How host names are resolved. Default: by the machine's resolver.

        Raises:
            MissingExtraError: The extra `webhook` is not installed.
            ValueError: No URL is set.
        """
        with needs_extra("The HTTP sink", extra="webhook"):
            self._transport = settings.transport(resolver, max_connections=1)
        if settings.url is None:
            raise ValueError(f"{PREFIX}URL is not set")
        self._url = parse_url(settings.url.get_secret_value(), allow_http=settings.allow_http)
        self._headers = {name: value.get_secret_value() for name, value in settings.headers.items()}
        self._gzip = settings.gzip
        self._timeout_s = min(settings.timeout_seconds, timeout_s or settings.timeout_seconds)

    async def send(self, events: Sequence[AuditEvent]) -> None:
        """Post the events.

        Raises:
            NotDeliveredError: They were not acknowledged.
        """
        body = "".join(f"{event.model_dump_json()}\n" for event in events).encode()
        headers = {"Content-Type": "application/x-ndjson", **self._headers}
        if self._gzip:
            body, headers["Content-Encoding"] = gzip.compress(body), "gzip"
        answer = await self._transport.post(self._url, body=body, headers=headers, timeout_s=self._timeout_s)
        if not 200 <= answer.status < 300:
            raise NotDeliveredError(
                f"The receiver answered {answer.status}.",
                retry_after_s=retry_after_s(answer.headers.get("retry-after")),
                is_permanent=answer.status in _REFUSALS,
            )


@hookimpl
def gateway_store_register_sinks(settings: StoreSettings) -> list[HttpSink]:
    """Contribute the sink if its URL is set."""
    own = HttpSinkSettings()
    return [] if own.url is None else [HttpSink(own, timeout_s=time_limit_s(settings))]


@hookimpl
def gateway_store_plugin_settings() -> type[HttpSinkSettings]:
    """Return the class of its settings."""
    return HttpSinkSettings
