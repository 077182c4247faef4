"""PubSub between processes: "the thing of this key has changed, look again".

One subscription per process, whatever the number of waiting tasks: Redis pub/sub where there is Redis, else PostgreSQL
LISTEN/NOTIFY in the transaction that makes the change, else none. A signal may be missed, so whoever waits looks again
from time to time by itself. Through Redis it may carry news, which its receiver checks before it believes them; through
PostgreSQL it never does, because there every user of the database may listen and send.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import asyncpg
from sqlalchemy import Text, bindparam, func, literal_column, select

from agent_gateway_store.storage.asyncpg_pool import AsyncpgPool
from agent_gateway_store.storage.cache import REDIS_FAULTS
from agent_gateway_store.storage.database import AnyConnection, Database
from agent_gateway_store.storage.redis_cache import RedisCache
from agent_gateway_store.storage.statements import Statement

__all__ = ["PubSub", "Topic"]

_CHANNEL = "agent_gateway_store_changed"
_RETRY_S = 1.0
_LOOK_ALIVE_S = 5.0
_SLOW_POLL_S = 5.0
_CANCEL_AGAIN_S = 0.1
_FAST_POLL_S = 0.25
_FOREVER_S = 10 * 365 * 86_400.0

_NOTIFIED = (
    func.pg_notify(literal_column(f"'{_CHANNEL}'"), bindparam("p_key", type_=Text())).cast(Text).label("notified")
)
_NOTIFY = Statement(select(_NOTIFIED))

_logger = logging.getLogger("agent_gateway_store.pubsub")


class Topic:
    """One key that tasks of this process wait for.

    Attributes:
        generation: Grows with each signal.
        news: What the last signal said; empty if it only said that something has changed.
    """

    __slots__ = ("_waiting", "generation", "listeners", "news")

    def __init__(self) -> None:
        self.generation = 0
        self.news = ""
        self.listeners = 0
        self._waiting: set[asyncio.Future[None]] = set()

    async def wait(self, seen: int, timeout_s: float) -> None:
        """Return at the next signal after generation `seen`, or after `timeout_s` seconds. Leaves nothing behind."""
        if self.generation != seen:
            return
        loop = asyncio.get_running_loop()
        future = loop.create_future()
        alarm = loop.call_later(timeout_s, _settle, future)
        self._waiting.add(future)
        try:
            await future
        finally:
            alarm.cancel()
            self._waiting.discard(future)

    def wake(self, news: str = "") -> None:
        """Signal."""
        self.generation += 1
        self.news = news
        for future in self._waiting:
            _settle(future)


def _settle(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)


class PubSub:
    """The subscription of one open store. Starts with the first task that waits; belongs to one event loop."""

    def __init__(self, redis: RedisCache, database: Database) -> None:
        self._redis = redis
        self._database = database
        self._topics: dict[str, Topic] = {}
        self._ears: dict[str, Callable[[str | None], None]] = {}
        self._subscription: asyncio.Task[None] | None = None
        self._is_live = False

    @property
    def poll_s(self) -> float:
        """How many seconds a task may wait for a signal before it looks by itself."""
        return _SLOW_POLL_S if self._is_live else _FAST_POLL_S

    @contextmanager
    def listening(self, key: str) -> Iterator[Topic]:
        """Hear of changes of `key` inside the block."""
        topic = self._topics.setdefault(key, Topic())
        topic.listeners += 1
        self._start()
        try:
            yield topic
        finally:
            topic.listeners -= 1
            if topic.listeners == 0:
                del self._topics[key]

    def hear(self, prefix: str, heard: Callable[[str | None], None]) -> None:
        """Call `heard` with the rest of every signalled key that begins with `prefix`, until `close`.

        None tells that pubsub may have been missed. Through the database they are heard only while somebody waits,
        since that takes a connection.
        """
        self._ears[prefix] = heard
        if self._redis.client is not None:
            self._start()

    def _start(self) -> None:
        if self._subscription is None and (self._redis.client is not None or self._notifies):
            self._subscription = asyncio.get_running_loop().create_task(self._subscribe())

    async def announce(self, connection: AnyConnection, key: str) -> None:
        """Have the signal go out with the transaction of `connection`, where pubsub go through the database."""
        if self._notifies:
            await _NOTIFY.first(connection, {"p_key": key})

    async def publish(self, key: str) -> bool:
        """Signal a change that was committed: to this process at once, to others through Redis.

        Returns:
            False if Redis does not answer, so that others may not hear of it.
        """
        self.wake(key)
        return await self.send(key)

    async def send(self, key: str) -> bool:
        """Signal a change to other processes through Redis, if there is Redis. Returns as `publish`."""
        return self._redis.client is None or await self._redis.publish(_CHANNEL, key)

    def message(self, key: str, news: str) -> tuple[str, str]:
        """Return the channel and the message of a signal, for whoever sends it along with other commands."""
        return _CHANNEL, f"{key}\n{news}" if news else key

    def wake(self, key: str, news: str = "") -> None:
        """Signal a change to this process alone."""
        if (topic := self._topics.get(key)) is not None:
            topic.wake(news)
        for prefix, heard in self._ears.items():
            if key.startswith(prefix):
                heard(key[len(prefix) :])

    async def close(self) -> None:
        """End the subscription."""
        if self._subscription is not None:
            # redis-py swallows a cancellation that comes while it connects: asyncio.wait_for does before Python 3.12.
            while not self._subscription.done():
                self._subscription.cancel()
                await asyncio.wait([self._subscription], timeout=_CANCEL_AGAIN_S)
            self._subscription = None
        self._is_live = False
        self._ears.clear()

    def wake_all(self) -> None:
        """Have everybody who waits look once."""
        for topic in list(self._topics.values()):
            topic.wake()

    @property
    def _notifies(self) -> bool:
        return self._redis.client is None and self._database.can_listen

    async def _subscribe(self) -> None:
        listen = self._listen_to_redis if self._redis.client is not None else self._listen_to_postgres
        while True:
            try:
                await listen()
            except (*REDIS_FAULTS, asyncpg.PostgresError, asyncpg.InterfaceError) as exc:
                _logger.info("No pubsub for now (%s): polling.", type(exc).__name__)
            except Exception:
                _logger.exception("No pubsub for now: polling.")
            self._is_live = False
            await asyncio.sleep(_RETRY_S)

    def _begin(self) -> None:
        # What was signalled before is gone, so everybody looks once.
        self._is_live = True
        self.wake_all()
        for heard in self._ears.values():
            heard(None)

    async def _listen_to_redis(self) -> None:
        assert self._redis.client is not None  # noqa: S101
        async with self._redis.client.pubsub(ignore_subscribe_messages=True) as pubsub:
            await pubsub.subscribe(_CHANNEL)
            self._begin()
            while True:
                message = await pubsub.get_message(timeout=_LOOK_ALIVE_S)
                if message is not None:
                    key, _, news = _text(message["data"]).partition("\n")
                    self.wake(key, news)

    async def _listen_to_postgres(self) -> None:
        # A connection of its own for as long as it listens, so a pool of one that is closed with it.
        pool = AsyncpgPool(self._database.engine, size=1)
        try:
            async with pool.connection(_FOREVER_S) as driver:
                await driver.add_listener(_CHANNEL, self._heard)
                self._begin()
                while not driver.is_closed():
                    await asyncio.sleep(_RETRY_S)
        finally:
            await pool.close()

    def _heard(self, _connection: object, _pid: int, _channel: str, key: object) -> None:
        self.wake(str(key))


def _text(data: object) -> str:
    return data.decode("utf-8", "replace") if isinstance(data, bytes) else str(data)
