"""The Redis client and its helpers: short timeouts, no retries, because Redis only makes reads and waiting fast."""

from __future__ import annotations

import json
import re
from collections.abc import AsyncIterator
from datetime import timedelta
from typing import Any, TypeAlias
from urllib.parse import parse_qsl, unquote, urlsplit

from redis.asyncio import Redis, RedisCluster, SSLConnection
from redis.asyncio.retry import Retry
from redis.asyncio.sentinel import Sentinel
from redis.backoff import NoBackoff
from redis.exceptions import RedisError

from agent_gateway_store._concurrency import keep_cancellation
from agent_gateway_store._text import code_text
from agent_gateway_store.errors import InvalidUrlError
from agent_gateway_store.settings import StoreSettings, mask_url

RedisClient: TypeAlias = Redis

_SENTINEL_LOGIN = ("sentinel_username", "sentinel_password")

# redis-py raises ValueError or RecursionError for a reply that is not RESP, and RuntimeError for a connection that
# belongs to another event loop.
REDIS_FAULTS = (RedisError, OSError, EOFError, ValueError, RuntimeError)
"""What commands raise if Redis is away, hangs, or sends what is not its protocol."""

NO_CLUSTER = (
    "The store does not use a Redis Cluster: name one Redis, or those with Sentinel by "
    "redis+sentinel://host:26379,host2:26379/name/0."
)
"""What to say of a cluster: without pub/sub on its client and scripts over several keys, it would serve half."""

# `host`, `host:port` or `[address]:port`.
_SENTINEL = re.compile(r"(\[[0-9A-Fa-f:.%]+\]|[^\[\]:@]+)(?::([0-9]{1,5}))?")


def require_redis(client: object) -> None:
    """Raise TypeError for a Sentinel, which is not yet a client, and ValueError for the client of a cluster."""
    if isinstance(client, RedisCluster):
        raise ValueError(NO_CLUSTER)
    if isinstance(client, Sentinel):
        raise TypeError("redis must be a client: give sentinel.master_for(name), not the Sentinel itself.")


class _MasterClient(Redis):
    """A client of the master that sentinels name, which closes their clients as well."""

    async def aclose(self, close_connection_pool: bool | None = None) -> None:
        """Close the connections."""
        await super().aclose(close_connection_pool)
        for sentinel in self.connection_pool.sentinel_manager.sentinels:  # type: ignore[attr-defined]
            await sentinel.aclose()


def create_redis(url: str, *, timeout_s: float = 0.2) -> RedisClient:
    """Return a client for `url`. Nothing is connected yet; the caller closes it with `aclose`.

    Args:
        url: `redis://`, `rediss://` or `unix://`; or `redis+sentinel://host:26379,host2:26379/name/0`, which follows
            the master of that name. There the user and password are those of Redis; those of the sentinels are
            `?sentinel_username=` and `sentinel_password=`.
        timeout_s: Longest wait for one command, in seconds. The driver's default retries would make a server that
            hangs cost most of a minute, so they are off.

    Raises:
        InvalidUrlError: The text is not a Redis URL, or that of a cluster.
    """
    scheme, _, rest = url.partition("://")
    if "cluster" in scheme or (scheme in ("redis", "rediss") and "," in re.split("[/?]", rest)[0].rpartition("@")[2]):
        raise InvalidUrlError(NO_CLUSTER)
    # redis-py drops what has no value, as of a variable that is not set.
    if not all(value for _, value in parse_qsl(rest.partition("#")[0].partition("?")[2], keep_blank_values=True)):
        raise InvalidUrlError(
            f"{code_text(mask_url(url))} has a parameter without a value: give it one, or leave it out; "
            "a question mark in a password is written %3F."
        )
    if scheme == "redis+sentinel":
        return _master_client(url, timeout_s)
    # Without a password OpenSSL would ask for that of an encrypted key on the terminal, and wait.
    options = _impatient(timeout_s) | ({"ssl_password": ""} if scheme == "rediss" else {})
    try:
        # redis-py takes any other path for the database 0, and `/1/2` for 12.
        if scheme in ("redis", "rediss") and not re.fullmatch("/?[0-9]*", urlsplit(url).path):
            raise ValueError
        client: RedisClient = Redis.from_url(url, **options)
        # Does not connect, but raises for parameters in the URL that it does not know.
        connection = client.connection_pool.make_connection()  # type: ignore[no-untyped-call]  # redis gives no hints
        if isinstance(connection, SSLConnection):
            connection.ssl_context.get()
    except OSError as exc:
        raise InvalidUrlError(
            f"A certificate or key named in {code_text(mask_url(url))} cannot be read: check its path and format, and "
            "give ssl_password for a key that is encrypted."
        ) from exc
    except (ValueError, TypeError, RedisError):
        raise InvalidUrlError(f"{code_text(mask_url(url))} is not a Redis URL: write redis://host:6379/0.") from None
    return client


def _impatient(timeout_s: float) -> dict[str, Any]:
    return {
        "socket_timeout": timeout_s,
        "socket_connect_timeout": timeout_s,
        "retry": Retry(NoBackoff(), 0),
        "retry_on_error": [],
    }


def _master_client(url: str, timeout_s: float) -> RedisClient:
    parts = urlsplit(url)
    user, _, hosts = parts.netloc.rpartition("@")
    found = [_SENTINEL.fullmatch(host) for host in hosts.split(",")]
    name, _, database = parts.path.removeprefix("/").partition("/")
    query = dict(parse_qsl(parts.query))
    credentials = {key.removeprefix("sentinel_"): query.pop(key) for key in _SENTINEL_LOGIN if key in query}
    if query or not name or not (database or "0").isdecimal() or not all(found):
        raise InvalidUrlError(
            f"{code_text(mask_url(url))} is not a Redis URL: write redis+sentinel://host:26379,host2:26379/name/0."
        )
    username, _, password = (unquote(part) for part in user.partition(":"))
    sentinel = Sentinel(  # type: ignore[no-untyped-call]  # redis gives it no hints
        [(match[1].strip("[]"), int(match[2] or 26379)) for match in found if match],
        # Together they have the time of one: a sentinel that hangs must leave time to ask the next one.
        sentinel_kwargs={**_impatient(timeout_s / len(found)), **credentials},
        db=int(database or 0),
        username=username or None,
        password=password or None,
        **_impatient(timeout_s),
    )
    client: RedisClient = sentinel.master_for(unquote(name), redis_class=_MasterClient)
    return client


async def get_redis() -> AsyncIterator[RedisClient | None]:
    """Yield a client for REDIS_URL, closed afterwards, or None where there is none. For FastAPI's `Depends`."""
    settings = StoreSettings()
    if not settings.redis_url:
        yield None
        return
    client = create_redis(settings.redis_url, timeout_s=settings.redis_timeout_seconds)
    try:
        yield client
    finally:
        await client.aclose()


def milliseconds(ttl: float | timedelta) -> int:
    """Return a TTL in milliseconds; raise ValueError for 0, as such an entry would outlive the row that it copies."""
    seconds = ttl.total_seconds() if isinstance(ttl, timedelta) else float(ttl)
    if not 0 < seconds < float("inf"):
        raise ValueError("ttl must be above zero seconds: every cached entry has an end.")
    return max(1, int(seconds * 1000))


async def set_json(client: RedisClient, key: str, value: Any, ttl: float | timedelta) -> None:
    """Store `value` as JSON under `key` for `ttl` (seconds or timedelta).

    Raises:
        ValueError: `ttl` is not above zero, or `value` holds NaN or an infinity.
        TypeError: JSON does not know `value`.
    """
    expiry = milliseconds(ttl)
    with keep_cancellation():
        await client.set(key, json.dumps(value, separators=(",", ":"), allow_nan=False), px=expiry)


async def get_json(client: RedisClient, key: str) -> Any | None:
    """Return the JSON value under `key`; None if there is none, or if the value is not JSON."""
    with keep_cancellation():
        data = await client.get(key)
    if data is None:
        return None
    try:
        return json.loads(data)
    except (ValueError, RecursionError):
        # Others may write to this Redis, also JSON that is nested deeper than Python reads.
        return None


async def delete(client: RedisClient, key: str) -> bool:
    """Delete `key`; True if it was there."""
    with keep_cancellation():
        return bool(await client.delete(key))
