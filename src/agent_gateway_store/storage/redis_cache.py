"""Redis behind a guard: every fault is a miss, an outage costs one timeout per interval."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

from redis.exceptions import MaxConnectionsError, RedisError, ResponseError

from agent_gateway_store.storage.cache import REDIS_FAULTS, RedisClient, milliseconds
from agent_gateway_store.storage.exchange import Command, exchange
from agent_gateway_store.storage.pipelining import AutoPipeline

__all__ = ["Entry", "RedisCache"]

_logger = logging.getLogger("agent_gateway_store.redis")

# An older version never replaces a newer one; what is no JSON of ours, or of another type, counts as absent.
_PUT_NEWER = """
local held = redis.pcall('GET', KEYS[1])
if type(held) == 'string' then
  local ok, entry = pcall(cjson.decode, held)
  if ok and type(entry) == 'table' and type(entry.version) == 'number' and entry.version > tonumber(ARGV[2]) then
    return 0
  end
end
redis.call('SET', KEYS[1], ARGV[1], 'PX', ARGV[3])
return 1
"""


class Entry(NamedTuple):
    """What is to stand under a key: JSON with a `version`, for `ttl_s` seconds."""

    key: str
    text: str
    version: int
    ttl_s: float


class RedisCache:
    """What the store does with Redis. No method raises because of Redis; None and False mean "ask SQL".

    After a fault Redis is left alone for `pause_s`, so that a server that hangs costs one timeout in that time. What
    many tasks ask at the same time goes out together, so that one connection of the client's pool is enough.

    Args:
        client: A client of the caller's, or None for no Redis at all.
        timeout_s: Longest wait for an answer in seconds, whatever the client's own timeouts are; a connection that is
            made for it may take as long again.
        pause_s: Seconds without Redis after a fault.
    """

    def __init__(self, client: RedisClient | None, *, timeout_s: float = 0.2, pause_s: float = 1.0) -> None:
        self.client = client
        self._timeout_s = timeout_s
        self._pause_s = pause_s
        self._resume_at = 0.0
        self._owner: asyncio.AbstractEventLoop | None = None
        self._pipeline: AutoPipeline[Command] = AutoPipeline(self._send)

    @property
    def is_available(self) -> bool:
        """False without a client, and for a while after a fault."""
        return self.client is not None and time.monotonic() >= self._resume_at

    async def get(self, key: str) -> tuple[bytes | str, int] | None:
        """Return what stands under `key` and the milliseconds it has left, in one round trip; None if it is no text."""
        replies = await self._ask([("GET", key), ("PTTL", key)])
        if replies is None or not isinstance(replies[0], bytes | str) or not isinstance(replies[1], int):
            return None
        return replies[0], replies[1]

    async def put_newer(self, entries: Sequence[Entry], *, message: tuple[str, str] | None = None) -> bool:
        """Store each entry unless a newer version is there, each in one step, then publish; all in one round trip.

        Args:
            entries: What to store. What stands there and has no version is replaced, of whatever type it is.
            message: A channel and what to publish on it, after the entries.

        Returns:
            True if everything was sent and every entry was stored.
        """
        commands: list[Command] = [
            ("EVAL", _PUT_NEWER, 1, key, text, version, milliseconds(ttl_s)) for key, text, version, ttl_s in entries
        ]
        if message is not None:
            commands.append(("PUBLISH", *message))  # not by the script: a Redis that takes no entry still sends it
        replies = await self._ask(commands)
        return replies is not None and all(replies[: len(entries)])

    async def delete(self, key: str) -> None:
        """Delete `key`."""
        await self._ask([("DEL", key)])

    async def publish(self, channel: str, message: str) -> bool:
        """Publish `message`; False if Redis does not answer, and it is lost."""
        return await self._ask([("PUBLISH", channel, message)]) is not None

    async def close(self) -> None:
        """Wait for what cancelled tasks have left under way; the client is not closed."""
        await self._pipeline.close()

    async def _ask(self, commands: Sequence[Command]) -> list[Any] | None:
        if not self.is_available:
            return None
        if self._owner is not (home := asyncio.get_running_loop()):
            self._owner, self._pipeline = home, AutoPipeline(self._send)
        size = sum(len(argument) for command in commands for argument in command if isinstance(argument, str))
        replies = await self._pipeline.ask(commands, size)
        for reply in replies or ():
            if isinstance(reply, RedisError) and not _is_about_one_key(reply):
                self._note_fault(reply)
                return None
        return replies

    async def _send(self, commands: Sequence[Command]) -> list[Any] | None:
        if not self.is_available or self.client is None:
            return None  # it failed those before
        try:
            return await exchange(self.client, commands, timeout_s=self._timeout_s)
        except (UnicodeDecodeError, MaxConnectionsError):
            return None  # no fault: a client that decodes met what is no text, or the host itself uses all of its pool
        except REDIS_FAULTS as exc:
            self._note_fault(exc)
            return None

    def _note_fault(self, exc: BaseException) -> None:
        self._resume_at = time.monotonic() + self._pause_s
        _logger.warning("Redis does not answer (%s): going on without it.", type(exc).__name__)


def _is_about_one_key(error: RedisError) -> bool:
    return isinstance(error, ResponseError) and str(error).startswith("WRONGTYPE")
