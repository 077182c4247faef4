"""The Redis client and its helpers: short timeouts, no retries, because Redis only makes reads and waiting fast."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from datetime import timedelta
from typing import Any, TypeAlias

from redis.asyncio import Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import RedisError

from agent_gateway_store._text import code_text
from agent_gateway_store.errors import InvalidUrlError
from agent_gateway_store.settings import StoreSettings, mask_url

RedisClient: TypeAlias = Redis

# redis-py raises ValueError or RecursionError for a reply that is not RESP, and RuntimeError for a connection that
# belongs to another event loop.
REDIS_FAULTS = (RedisError, OSError, EOFError, ValueError, RuntimeError)
"""What commands raise if Redis is away, hangs, or sends what is not its protocol."""


def create_redis(url: str, *, timeout_s: float = 0.2) -> RedisClient:
    """Return a client for `url`. Nothing is connected yet; the caller closes it with `aclose`.

    Args:
        url: `redis://`, `rediss://` or `unix://`.
        timeout_s: Longest wait for one command, in seconds. The driver's default retries would make a server that
            hangs cost most of a minute, so they are off.

    Raises:
        InvalidUrlError: The text is not a Redis URL.
    """
    try:
        client: RedisClient = Redis.from_url(
            url,
            socket_timeout=timeout_s,
            socket_connect_timeout=timeout_s,
            retry=Retry(NoBackoff(), 0),
            retry_on_error=[],
        )
        # Does not connect, but raises for parameters in the URL that it does not know.
        client.connection_pool.make_connection()  # type: ignore[no-untyped-call]  # redis gives it no hints
    except (ValueError, TypeError):
        raise InvalidUrlError(f"{code_text(mask_url(url))} is not a Redis URL: write redis://host:6379/0.") from None
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
    """Return a TTL (seconds or timedelta) in whole milliseconds, at least 1.

    Raises:
        ValueError: It is not above zero. An entry without an end would outlive the row that it copies.
    """
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
    await client.set(key, json.dumps(value, separators=(",", ":"), allow_nan=False), px=expiry)


async def get_json(client: RedisClient, key: str) -> Any | None:
    """Return the JSON value under `key`; None if there is none, or if the value is not JSON."""
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
    return bool(await client.delete(key))
