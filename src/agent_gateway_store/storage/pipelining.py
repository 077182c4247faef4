"""Automatic pipelining: what many tasks ask of a server at the same time goes out together.

A task that finds nothing under way sends at once, by itself, so that a lone one pays nothing; what is asked meanwhile
waits for it and then goes together, in the order in which it came. (As the clients rueidis and ioredis do it.)
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, Generic, NamedTuple, TypeVar

__all__ = ["AutoPipeline"]

C = TypeVar("C")

_MOST_AT_ONCE = 128
_LARGE_BYTES = 65_536


class AutoPipeline(Generic[C]):
    """Belongs to one event loop. A task that is cancelled takes no other's reply, and none away.

    Args:
        send: Sends commands and returns as many replies, or None if there is no answer; does not raise.
    """

    def __init__(self, send: Callable[[Sequence[C]], Awaitable[list[Any] | None]]) -> None:
        self._send = send
        self._waiting: deque[_Asked[C]] = deque()
        self._is_busy = False
        self._draining: asyncio.Task[None] | None = None

    async def ask(self, commands: Sequence[C], size: int) -> list[Any] | None:
        """Return a reply for each command, or None if there is no answer.

        Args:
            commands: They stay together and in order.
            size: About how many bytes they are; what is large is not sent with others.
        """
        if self._is_busy:
            asked = _Asked(commands, size, asyncio.get_running_loop().create_future())
            self._waiting.append(asked)
            return await asked.replies
        self._is_busy = True
        try:
            return await self._send(commands)
        finally:
            if self._waiting:
                self._draining = asyncio.get_running_loop().create_task(self._drain())
            else:
                self._is_busy = False

    async def close(self) -> None:
        """Wait for what is under way."""
        if self._draining is not None:
            await asyncio.wait({self._draining})

    async def _drain(self) -> None:
        batch: list[_Asked[C]] = []
        try:
            while batch := self._next_batch():
                replies = await self._send([command for asked in batch for command in asked.commands])
                for asked in batch:
                    count = len(asked.commands)
                    if not asked.replies.done():
                        asked.replies.set_result(None if replies is None else replies[:count])
                    replies = None if replies is None else replies[count:]
        finally:
            self._is_busy, self._draining = False, None
            for asked in (*batch, *self._waiting):
                asked.replies.cancel()
            self._waiting.clear()

    def _next_batch(self) -> list[_Asked[C]]:
        batch: list[_Asked[C]] = []
        size = 0
        while self._waiting and len(batch) < _MOST_AT_ONCE:
            if batch and size + self._waiting[0].size > _LARGE_BYTES:
                break
            asked = self._waiting.popleft()
            if not asked.replies.done():  # nobody waits for it any more
                batch.append(asked)
                size += asked.size
        return batch


class _Asked(NamedTuple, Generic[C]):
    commands: Sequence[C]
    size: int
    replies: asyncio.Future[list[Any] | None]
