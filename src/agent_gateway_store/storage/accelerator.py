"""Redis behind a guard: every fault is a miss, an outage costs one timeout per interval."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Awaitable, Mapping
from typing import Any, TypeVar

from redis.exceptions import RedisError

from agent_gateway_store.storage.cache import RedisClient, delete, milliseconds

__all__ = ["Accelerator"]

T = TypeVar("T")
_logger = logging.getLogger("agent_gateway_store.redis")
_FAULTS = (RedisError, OSError, TimeoutError, EOFError)

# An older version never replaces a newer one; what is no JSON of ours counts as absent.
_PUT_NEWER = """
local held = redis.call('GET', KEYS[1])
if held then
  local ok, entry = pcall(cjson.decode, held)
  if ok and type(entry) == 'table' and type(entry.version) == 'number' and entry.version > tonumber(ARGV[2]) then
    return 0
  end
end
redis.call('SET', KEYS[1], ARGV[1], 'PX', ARGV[3])
return 1
"""


class Accelerator:
    """What the store does with Redis. No method raises because of Redis; None and False mean "ask SQL".

    After a fault Redis is left alone for `pause_s`, so that a server that hangs costs one timeout in that time.

    Args:
        client: A client of the caller's, or None for no Redis at all.
        pause_s: Seconds without Redis after a fault.
    """

    def __init__(self, client: RedisClient | None, *, pause_s: float = 1.0) -> None:
        self.client = client
        self._pause_s = pause_s
        self._resume_at = 0.0
        self._put_newer = None if client is None else client.register_script(_PUT_NEWER)

    @property
    def is_available(self) -> bool:
        """False without a client, and for a while after a fault."""
        return self.client is not None and time.monotonic() >= self._resume_at

    async def get(self, key: str) -> tuple[dict[str, Any], int] | None:
        """Return the JSON object under `key` and the milliseconds it has left, in one round trip."""
        if not self.is_available or self.client is None:
            return None
        pipeline = self.client.pipeline(transaction=False)
        pipeline.get(key)
        pipeline.pttl(key)
        answer = await self._guarded(pipeline.execute())
        if answer is None or answer[0] is None:
            return None
        try:
            entry = json.loads(answer[0])
        except (ValueError, RecursionError):
            return None
        return (entry, int(answer[1])) if isinstance(entry, dict) else None

    async def put_newer(self, key: str, entry: Mapping[str, Any], *, version: int, ttl_s: float) -> bool:
        """Store `entry` under `key` for `ttl_s` seconds, unless a newer version is there; both in one step."""
        if not self.is_available or self._put_newer is None:
            return False
        text = json.dumps(entry, separators=(",", ":"))
        return bool(await self._guarded(self._put_newer(keys=[key], args=[text, version, milliseconds(ttl_s)])))

    async def delete(self, key: str) -> None:
        """Delete `key`."""
        if self.is_available and self.client is not None:
            await self._guarded(delete(self.client, key))

    async def publish(self, channel: str, message: str) -> None:
        """Publish `message`; lost where Redis does not answer."""
        if self.is_available and self.client is not None:
            await self._guarded(self.client.publish(channel, message))

    async def _guarded(self, answer: Awaitable[T]) -> T | None:
        try:
            return await answer
        except _FAULTS as exc:
            self._resume_at = time.monotonic() + self._pause_s
            _logger.warning("Redis does not answer (%s): going on without it.", type(exc).__name__)
            return None
