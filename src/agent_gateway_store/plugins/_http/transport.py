"""One POST: to checked addresses only, within a deadline, and with a limit on what is read."""

from __future__ import annotations

import asyncio
import functools
import socket
import ssl
import time
from collections.abc import Awaitable, Callable, Iterable, Mapping
from dataclasses import dataclass
from ipaddress import ip_address
from typing import Any

import httpcore
from pydantic import SecretStr

from agent_gateway_store.errors import NotDeliveredError
from agent_gateway_store.plugins._http import AddressPolicy, ParsedUrl, parse_proxy

# The rest of an answer whose body nobody asked for: read for this long, so that the connection can be used again.
DRAIN_SECONDS = 0.25
# The same in bytes. A body that is longer costs more to read than a new connection would.
DRAIN_BYTES = 16_384
# One of several addresses may take this long to accept a connection. A lost SYN is sent again after one second
# (RFC 6298, section 2), so that one loss is survived, and two addresses fit into the 5 seconds of a plugin call.
ATTEMPT_SECONDS = 2.0
# Shorter than the idle timeouts of usual load balancers (AWS ALB 60 seconds, nginx 75): a connection that the other end
# closed meanwhile costs one failed attempt.
KEEP_ALIVE_SECONDS = 15.0
# A receiver that asks for longer is tried once in this time: one notice must not silence all others for a day.
MAX_PAUSE_SECONDS = 60.0

_keepers: set[asyncio.Task[None]] = set()

Resolve = Callable[[str, int], Awaitable[list[str]]]


@dataclass(frozen=True, slots=True)
class Answer:
    """The answer of a server.

    Attributes:
        status: HTTP status.
        headers: By lower-case name; of several of one name, the last.
        body: At most as many bytes as were asked for.
    """

    status: int
    headers: Mapping[str, str]
    body: bytes


async def resolve(host: str, port: int) -> list[str]:
    """Return the addresses of a host name, as the machine's resolver gives them."""
    found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return [str(address[0]) for *_, address in found]


class Transport:
    """Posts over HTTP/1.1. Follows no redirect, keeps no cookie, reads no proxy variable, decompresses nothing.

    A name is resolved once for a connection, every address is checked, and the connection goes to a checked address:
    there is no second look-up in between. TLS and the `Host` header keep the name. Connections are kept for 15 seconds
    and closed when the event loop ends; it may be used from one event loop after another.

    Args:
        policy: Which addresses are allowed. None: any, for URLs that the operator gave.
        proxy: `http://[user:password@]host:port` of an HTTP proxy, which then resolves names and connects; only its own
            address is connected to, unchecked.
        ca_file: Certificates to trust in place of the well-known ones.
        resolver: How names are resolved.
        max_connections: At most this many at a time.
    """

    def __init__(
        self,
        policy: AddressPolicy | None,
        *,
        proxy: SecretStr | None = None,
        ca_file: str | None = None,
        resolver: Resolve = resolve,
        max_connections: int = 20,
    ) -> None:
        self._policy = policy
        self._proxy: httpcore.Proxy | None = None
        if proxy:
            parsed, auth = parse_proxy(proxy.get_secret_value())
            self._proxy = httpcore.Proxy(f"{parsed.scheme}://{parsed.authority}", auth=auth)
        self._ca_file = ca_file
        self._backend = _CheckingBackend(None if proxy else policy, resolver)
        self._max_connections = max_connections
        self._loop: asyncio.AbstractEventLoop | None = None
        self._pool: httpcore.AsyncConnectionPool | None = None
        self._paused_until = 0.0

    def pause(self, seconds: float | None) -> None:
        """Post nothing for `seconds`, at most a minute; None or 0 changes nothing. May be called in any thread."""
        if seconds:
            self._paused_until = max(self._paused_until, time.monotonic() + min(seconds, MAX_PAUSE_SECONDS))

    async def post(
        self, url: ParsedUrl, *, body: bytes, headers: Mapping[str, str], timeout_s: float, max_body: int = 0
    ) -> Answer:
        """Send `body` and return the answer, whatever its status.

        Args:
            url: Where to send it.
            body: Sent as it is.
            headers: Besides `Host`, `Content-Length`, `User-Agent` and `Accept`.
            timeout_s: Seconds for everything: look-up, connection, request, answer.
            max_body: Bytes of the answer to return. 0: its body is read for a quarter of a second, and dropped.

        Raises:
            NotDeliveredError: No answer came, or a longer one than asked for; or `pause` holds, for `retry_after_s`.
            RefusedAddressError: The host leads to an address that is not allowed.
        """
        if (left := self._paused_until - time.monotonic()) > 0:
            raise NotDeliveredError("The receiver asked for a pause, which is not over.", retry_after_s=left)
        if url.address is not None and self._policy is not None:
            self._policy.check([str(url.address)])
        try:
            async with asyncio.timeout(timeout_s) as deadline:
                return await self._post(url, body, headers, max_body, deadline)
        except TimeoutError:
            raise NotDeliveredError(f"{url.host} did not answer within {timeout_s:g} seconds.") from None
        except (httpcore.NetworkError, httpcore.ProtocolError, httpcore.TimeoutException, httpcore.ProxyError) as exc:
            if (why := _why_untrusted(exc)) is not None:
                raise NotDeliveredError(
                    f"The certificate of {url.host} is not to be trusted ({why}): renew it, or set CA_FILE."
                ) from exc
            raise NotDeliveredError(f"{url.host} gave no answer ({type(exc).__name__}).") from exc
        except (OSError, UnicodeError) as exc:
            raise NotDeliveredError(f"{url.host} cannot be reached ({type(exc).__name__}).") from exc

    async def _post(
        self, url: ParsedUrl, body: bytes, headers: Mapping[str, str], max_body: int, deadline: asyncio.Timeout
    ) -> Answer:
        sent = {"Host": url.authority, "User-Agent": "agent-gateway-store", "Accept": "*/*", **headers}
        where = httpcore.URL(
            scheme=url.scheme.encode(), host=url.host.encode(), port=url.port, target=url.path.encode()
        )
        async with self._open().stream("POST", where, headers=list(sent.items()), content=body) as got:
            stream = got.extensions["network_stream"]
            if isinstance(stream, _Stream) and not stream.was_read:
                # It came behind the answer before, and does not answer this request.
                raise NotDeliveredError(f"{url.host} sent an answer before it was asked.")
            found = {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in got.headers}
            if not max_body:
                # The status is known: a slow body must not turn it into "no answer".
                deadline.reschedule(None)
            return Answer(got.status, found, await _body(got, max_body))

    async def aclose(self) -> None:
        """Close the connections. Further posts open new ones."""
        if self._pool is not None and self._loop is asyncio.get_running_loop():
            self._pool = None
            self._keeper.cancel()
            await asyncio.wait({self._keeper})

    def _open(self) -> httpcore.AsyncConnectionPool:
        loop = asyncio.get_running_loop()
        if self._pool is None or self._loop is not loop:
            self._loop = loop
            self._pool = httpcore.AsyncConnectionPool(
                ssl_context=_ssl_context(self._ca_file),
                proxy=self._proxy,
                max_connections=self._max_connections,
                keepalive_expiry=KEEP_ALIVE_SECONDS,
                network_backend=self._backend,
            )
            self._keeper = loop.create_task(_keep(self._pool), name="gateway-store connections")
            # A loop has only weak references to its tasks.
            _keepers.add(self._keeper)
            self._keeper.add_done_callback(_keepers.discard)
        return self._pool


@functools.cache
def _ssl_context(ca_file: str | None) -> ssl.SSLContext:
    # Once for each file: to read the certificates takes tens of milliseconds.
    try:
        return ssl.create_default_context(cafile=ca_file) if ca_file else httpcore.default_ssl_context()
    except OSError as exc:
        raise NotDeliveredError(
            f"CA_FILE cannot be read ({type(exc).__name__}): it must name a file of certificates in PEM."
        ) from exc


def _why_untrusted(error: BaseException | None) -> str | None:
    """Return what is wrong with the certificate, if that is the reason somewhere behind `error`."""
    while error is not None:
        if isinstance(error, ssl.SSLCertVerificationError):
            return error.verify_message.rstrip(".")
        error = error.__cause__ or error.__context__
    return None


async def _keep(pool: httpcore.AsyncConnectionPool) -> None:
    # An event loop that ends cancels its tasks: only then, and only in that loop, can the connections be closed.
    try:
        await asyncio.Event().wait()
    finally:
        await pool.aclose()


async def _body(response: httpcore.Response, max_body: int) -> bytes:
    read = bytearray()
    try:
        async with asyncio.timeout(None if max_body else DRAIN_SECONDS):
            async for chunk in response.aiter_stream():
                read += chunk
                if len(read) > max(max_body, DRAIN_BYTES):
                    break
    except (TimeoutError, httpcore.NetworkError, httpcore.ProtocolError):
        if max_body:
            raise
    if max_body and len(read) > max_body:
        raise NotDeliveredError("The answer is longer than allowed.")
    return bytes(read) if max_body else b""


class _Stream(httpcore.AsyncNetworkStream):
    """Knows whether anything was read since the last write: an answer without that was there before its request."""

    def __init__(self, inner: httpcore.AsyncNetworkStream) -> None:
        self._inner = inner
        self.was_read = False

    async def read(self, max_bytes: int, timeout: float | None = None) -> bytes:
        read = await self._inner.read(max_bytes, timeout)
        self.was_read = True
        return read

    async def write(self, buffer: bytes, timeout: float | None = None) -> None:
        self.was_read = False
        await self._inner.write(buffer, timeout)

    async def aclose(self) -> None:
        await self._inner.aclose()

    async def start_tls(
        self, ssl_context: ssl.SSLContext, server_hostname: str | None = None, timeout: float | None = None
    ) -> httpcore.AsyncNetworkStream:
        return _Stream(await self._inner.start_tls(ssl_context, server_hostname, timeout))

    def get_extra_info(self, info: str) -> Any:
        return self._inner.get_extra_info(info)


class _CheckingBackend(httpcore.AsyncNetworkBackend):
    def __init__(self, policy: AddressPolicy | None, resolver: Resolve) -> None:
        self._policy = policy
        self._resolve = resolver
        self._inner = httpcore.AnyIOBackend()

    async def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: Iterable[httpcore.SOCKET_OPTION] | None = None,
    ) -> httpcore.AsyncNetworkStream:
        try:
            answers = [str(ip_address(host))]
        except ValueError:
            answers = await self._resolve(host, port)
        addresses = list(dict.fromkeys(answers))
        if self._policy is not None:
            addresses = [str(address) for address in self._policy.check(answers)]
        failure: Exception = httpcore.ConnectError("no address")
        started = time.monotonic()
        for index, address in enumerate(addresses):
            # One that does not answer must not use up the time of the next; the last may take all that is left.
            share = timeout if index == len(addresses) - 1 else ATTEMPT_SECONDS
            if timeout is not None and share is not None:
                share = min(share, max(0.0, timeout - (time.monotonic() - started)))
            try:
                return _Stream(await self._inner.connect_tcp(address, port, share, local_address, socket_options))
            except (httpcore.ConnectError, httpcore.ConnectTimeout) as exc:
                failure = exc
        raise failure

    async def connect_unix_socket(self, *_: object, **__: object) -> httpcore.AsyncNetworkStream:
        raise httpcore.ConnectError("sockets in the file system are not used")

    async def sleep(self, seconds: float) -> None:
        await asyncio.sleep(seconds)
