"""What the tests of the Redis cache need."""

from __future__ import annotations

import json
from typing import Any

from agent_gateway_store.storage.redis_cache import CacheEntry, RedisCache


async def put(cache: RedisCache, entry: Any, *, version: int, ttl_s: float) -> bool:
    """Put JSON under the one key of these tests; True if it stands there now."""
    return await cache.put_newer([CacheEntry("key", json.dumps(entry), version, ttl_s)])
