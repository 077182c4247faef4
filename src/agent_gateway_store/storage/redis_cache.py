"""Redis behind a breaker: every fault is a miss, and an outage costs one timeout per interval."""

from __future__ import annotations

import asyncio
import logging
import re
import time
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from typing import Any, NamedTuple, TypeVar

from redis.asyncio.sentinel import MasterNotFoundError
from redis.client import NEVER_DECODE
from redis.exceptions import (
    AskError,
    ClusterCrossSlotError,
    ClusterError,
    MasterDownError,
    MaxConnectionsError,
    MovedError,
    ResponseError,
)

from agent_gateway_store._concurrency import BatchQueue, keep_cancellation
from agent_gateway_store._text import describe
from agent_gateway_store.storage.cache import NO_CLUSTER, REDIS_FAULTS, RedisClient, milliseconds, require_redis
from agent_gateway_store.storage.errors import OutageLog

T = TypeVar("T")

_MAX_CONNECTIONS = 32  # one event loop keeps no more busy; further calls wait rather than open a thousand
_SCAN_KEYS = 500  # chosen: Redis looks through them in a few milliseconds
_LARGEST_BYTES = 2**23  # twice what the largest approval takes as JSON, where a character is 12 bytes at most
_MAX_BATCH_BYTES = 2**20  # chosen: Redis takes that within a few milliseconds, far from any timeout

# What a member answers to a command for keys of others, of several, or in a cluster that has lost some.
_OF_CLUSTERS = (AskError, MovedError, ClusterCrossSlotError, ClusterError)

_logger = logging.getLogger("agent_gateway_store.redis")

# The milliseconds that it has left and the value, in one round trip; what is not text, or larger than any entry of
# ours, counts as absent. As one text, because the client's parser takes longer over a list of two than Redis over both
# commands.
_GET = f"""
local value = redis.pcall('GET', KEYS[1])
if type(value) ~= 'string' or #value > {_LARGEST_BYTES} then return false end
return redis.call('PTTL', KEYS[1]) .. ' ' .. value
"""

# An older version never replaces a newer one; what is not JSON of ours, or of another type, counts as absent. The
# messages are published also if Redis takes no entry because its memory is full. It answers with a 1 for each entry
# that was stored, and a 0 for each other one.
_PUT_NEWER = """
local stored = {}
for i, key in ipairs(KEYS) do
  local text, version, ttl_ms = ARGV[3 * i - 2], tonumber(ARGV[3 * i - 1]), ARGV[3 * i]
  local value, is_older = redis.pcall('GET', key), false
  if type(value) == 'string' then
    local ok, entry = pcall(cjson.decode, value)
    is_older = ok and type(entry) == 'table' and type(entry.version) == 'number' and entry.version > version
  end
  stored[i] = (is_older or redis.pcall('SET', key, text, 'PX', ttl_ms).err) and 0 or 1
end
for i = 3 * #KEYS + 1, #ARGV, 2 do redis.call('PUBLISH', ARGV[i], ARGV[i + 1]) end
return table.concat(stored)
"""

# Deletes each entry that names one of the values behind a mark: in Redis, as some take long to send. What is larger
# than any entry is not ours. It answers with how many keys it has looked at: all, or until it had read enough bytes.
_DELETE_NAMING = """
local mark, left, most, wanted = ARGV[1], tonumber(ARGV[2]), tonumber(ARGV[3]), {}
for i = 4, #ARGV do wanted[ARGV[i]] = true end
for i, key in ipairs(KEYS) do
  local size = redis.pcall('STRLEN', key)
  local value = (type(size) ~= 'number' or size <= most) and redis.pcall('GET', key)
  if type(value) == 'string' then
    local _, last = string.find(value, mark, 1, true)
    while last do
      if wanted[value:sub(last + 1, last + #ARGV[4])] then redis.call('DEL', key) break end
      _, last = string.find(value, mark, last + 1, true)
    end
    left = left - #value
    if left < 0 then return i end
  end
end
return #KEYS
"""


class CacheEntry(NamedTuple):
    """The value to store under a key: JSON with a `version`, for `ttl_s` seconds."""

    key: str
    text: str
    version: int
    ttl_s: float


class _Put(NamedTuple):
    keys: list[str]
    # Three for each key, as the script takes them.
    fields: list[Any]
    # A channel and what to publish on it, or nothing.
    message: Sequence[str]


class RedisCache:
    """What the store does with Redis. No method raises because of Redis; None and False mean "ask SQL".

    The breaker: after a fault Redis is not used for `pause_s` seconds, so a server that hangs costs one timeout in that
    time.

    Args:
        client: A client of the caller's, or None for no Redis at all. One that leads to a member of a cluster is
            dropped when that is noticed.
        timeout_s: Longest wait for an answer in seconds, whatever the client's own timeouts are; connecting may take as
            long again.
        pause_s: Seconds without Redis after a fault.

    Attributes:
        log: Where faults of this Redis are noted.
        fault: What the last one said.
        is_cluster: True once the client turned out to lead to a member of a cluster.
    """

    def __init__(self, client: RedisClient | None, *, timeout_s: float = 0.2, pause_s: float = 1.0) -> None:
        require_redis(client)
        self.client = client
        self.is_cluster = False
        self._timeout_s = timeout_s
        self._pause_s = pause_s
        self._breaker_until = 0.0
        self.log = OutageLog(_logger)
        self.fault = ""
        if client is not None:
            self._get, self._put_newer = client.register_script(_GET), client.register_script(_PUT_NEWER)
            self._delete_naming = client.register_script(_DELETE_NAMING)
        self.open()

    def open(self) -> None:
        """Serve the event loop in which the store opens, and leave to the last one what was its own."""
        if self.client is not None:
            # The pool of a client from outside may be smaller.
            self._places = asyncio.Semaphore(min(_MAX_CONNECTIONS, self.client.connection_pool.max_connections))
        self._puts: BatchQueue[_Put, bool] = BatchQueue(
            self._put_batch,
            max_items=_MAX_CONNECTIONS,
            max_bytes=_MAX_BATCH_BYTES,
            size=lambda put: sum(map(len, put.fields[::3])),
        )

    @property
    def is_available(self) -> bool:
        """False without a client, and for a while after a fault."""
        return self.client is not None and time.monotonic() >= self._breaker_until

    async def get(self, key: str) -> tuple[bytes | str, int] | None:
        """Return the text under `key` and the milliseconds it has left, in one round trip; None if there is none."""
        reply: object = await self._run(lambda client: self._get([key], client=client))
        if not isinstance(reply, bytes | str):
            return None
        left_ms, _, value = reply.partition(" ") if isinstance(reply, str) else reply.partition(b" ")
        try:
            return value, int(left_ms)
        except ValueError:
            return None  # a server that answers anything

    async def put_newer(self, entries: Sequence[CacheEntry], *, message: tuple[str, str] | None = None) -> bool:
        """Store each entry unless a newer version is there, then publish.

        What tasks put at the same time shares one round trip. Cancelling a task does not withdraw what it puts.

        A value that is there without a version is replaced. Returns True if every entry was stored, and the message,
        a channel and what to publish on it, was sent.
        """
        if not entries:
            return message is None or await self.publish(*message)
        fields = [field for _, text, version, ttl_s in entries for field in (text, version, milliseconds(ttl_s))]
        put = _Put([entry.key for entry in entries], fields, message or ())
        return self.is_available and await self._puts.run(put)

    async def _put_batch(self, puts: Sequence[_Put]) -> Sequence[bool | Exception]:
        keys = [key for put in puts for key in put.keys]
        args = [*(field for put in puts for field in put.fields), *(text for put in puts for text in put.message)]
        try:
            reply: object = await self._run(lambda client: self._put_newer(keys, args, client))
        except Exception as exc:
            return [exc] * len(puts)
        flags = reply.decode() if isinstance(reply, bytes) else reply
        stored = iter(flags if isinstance(flags, str) and len(flags) == len(keys) else "0" * len(keys))
        return [[next(stored) for _ in put.keys].count("1") == len(put.keys) for put in puts]

    async def join(self) -> None:
        """Wait for what was put by tasks that did not wait for it."""
        await self._puts.join()

    async def delete(self, *keys: str) -> bool:
        """Delete keys; False if Redis does not answer, and they may be there."""
        return await self._run(lambda client: client.delete(*keys)) is not None

    async def delete_naming(self, pattern: str, mark: str, values: Sequence[str]) -> bool:
        """Delete the keys like `pattern` whose value holds `mark` and right behind it one of `values`, of one length.

        Reads all of them: not for what is done often. False if Redis does not answer, and some may be there.
        """
        args = [mark, str(_MAX_BATCH_BYTES), str(_LARGEST_BYTES), *values]
        cursor, is_over = 0, False

        async def scan(client: RedisClient) -> tuple[int, list[bytes | str]]:
            # As bytes: others may have keys like these that are not text.
            return await client.scan(cursor, match=pattern, count=_SCAN_KEYS, **{NEVER_DECODE: ""})

        while not is_over:
            if (page := await self._run(scan)) is None:
                return False
            cursor, keys = page
            is_over = cursor == 0
            while keys:
                if not (seen := await self._run(partial(self._delete_naming, keys, args))):
                    return False
                keys = keys[seen:]
        return True

    async def publish(self, channel: str, message: str) -> bool:
        """Publish `message`; False if Redis does not answer, and it is lost."""
        return await self._run(lambda client: client.publish(channel, message)) is not None

    async def drop_cluster(self) -> None:
        """Ask whether the client leads to a member of a cluster, and drop it if so."""

        async def ask(client: RedisClient) -> bool:
            try:
                return bool((await client.info("cluster")).get("cluster_enabled"))
            except ResponseError:
                # A user without the right to ask: the first key of another member tells as well.
                return False

        if await self._run(ask):
            self._drop_cluster()

    def _drop_cluster(self) -> None:
        # Some keys would be served and others not, so that it would seem to go away and come back all the time.
        self.client, self.is_cluster = None, True
        _logger.warning("Redis is a member of a cluster: going on without it. %s", NO_CLUSTER)

    async def _run(self, command: Callable[[RedisClient], Awaitable[T]]) -> T | None:
        if not self.is_available or self.client is None:
            return None
        async with self._places:
            if not self.is_available:
                # The commands before this one have met the fault while it waited.
                return None
            try:
                # Twice: once to connect, once to answer.
                with keep_cancellation():
                    async with asyncio.timeout(2 * self._timeout_s):
                        reply = await command(self.client)
            except (UnicodeDecodeError, MaxConnectionsError):
                # Not a fault of Redis: a client that decodes met bytes, or the host itself uses the whole pool.
                return None
            except REDIS_FAULTS as exc:
                # A replica outside of a cluster says MASTERDOWN, which is to redis-py a kind of CLUSTERDOWN.
                if isinstance(exc, _OF_CLUSTERS) and not isinstance(exc, MasterDownError):
                    if self.client is not None:
                        self._drop_cluster()
                    return None
                if isinstance(exc, MasterNotFoundError):
                    # Before what each sentinel answered stands its client, with all its settings.
                    exc = MasterNotFoundError(re.sub(r"<redis\b.*?\)> - ", "", str(exc)))
                # A server that does not know AUTH answers with its arguments: the password.
                self.fault = describe(exc).partition(", with args")[0]
                self._breaker_until = time.monotonic() + self._pause_s
                self.log.away("Redis does not answer (%s): going on without it.", type(exc).__name__)
                return None
        self.log.back("Redis answers again.")
        return reply
