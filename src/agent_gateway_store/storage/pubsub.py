"""Publish and subscribe between processes: "this key has changed, read it again".

One subscription per process, whatever the number of waiting tasks: Redis pub/sub where there is Redis, else PostgreSQL
LISTEN/NOTIFY in the transaction that makes the change, else none. A message may be lost, so a task that waits also
polls. A message carries nothing but the key, because others may be able to publish as well.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import asyncpg
from sqlalchemy import Text
from sqlalchemy.exc import SQLAlchemyError

from agent_gateway_store.storage.asyncpg_pool import AsyncpgPool
from agent_gateway_store.storage.cache import REDIS_FAULTS
from agent_gateway_store.storage.database import AnyConnection, Database
from agent_gateway_store.storage.errors import OutageLog
from agent_gateway_store.storage.redis_cache import RedisCache
from agent_gateway_store.storage.statements import text_statement

CHANNEL = "agent_gateway_store_changed"
# Connecting raises SQLAlchemy's errors, and InternalClientError where no server takes writes.
_DATABASE_FAULTS = (asyncpg.PostgresError, asyncpg.InterfaceError, asyncpg.InternalClientError, SQLAlchemyError)
# Chosen: a server that restarts is back within seconds.
_RETRY_S = 1.0
# Chosen: a subscription that is silent for so long is asked whether anybody is there, and has as long to answer.
_CHECK_S = 5.0
# Chosen: with a subscription, only for a message that was lost.
_SLOW_POLL_S = 5.0
# Chosen: without a subscription; about what people notice.
_FAST_POLL_S = 0.25
# Chosen: a task that ignored its cancellation gets the next one soon.
_CANCEL_AGAIN_S = 0.1
# Ten years: the pool limits every use of a connection, and this one lasts as long as the store.
_FOREVER_S = 10 * 365 * 86_400.0

# A full queue, the work of a listener that stands still, would fail the commit. As text: `pg_notify` returns void.
NOTIFY_SQL = (
    f"CASE WHEN pg_notification_queue_usage() < 0.9 THEN CAST(pg_notify('{CHANNEL}', CAST({{}} AS TEXT)) AS TEXT) END"
)
"""Sends the message about a key, in whose place it has `{}`."""
_NOTIFY = text_statement(f"SELECT {NOTIFY_SQL.format(':p_key')} AS sent", {"p_key": Text()}, sent=Text())

_logger = logging.getLogger("agent_gateway_store.pubsub")


class Topic:
    """One key that tasks of this process wait for.

    Attributes:
        generation: Grows with each message.
    """

    __slots__ = ("_waiting", "generation", "subscribers")

    def __init__(self) -> None:
        self.generation = 0
        self.subscribers = 0
        self._waiting: set[asyncio.Future[None]] = set()

    @property
    def waiting(self) -> int:
        """How many tasks wait for the next message."""
        return sum(not future.done() for future in self._waiting)

    async def wait(self, seen: int, timeout_s: float) -> None:
        """Return at the next message after generation `seen`, or after `timeout_s` seconds."""
        if self.generation != seen:
            return
        # A timer and a future: for a thousand waiters much cheaper than a task and a timeout for each.
        loop = asyncio.get_running_loop()
        future = loop.create_future()
        alarm = loop.call_later(timeout_s, _settle, future)
        self._waiting.add(future)
        try:
            await future
        finally:
            alarm.cancel()
            self._waiting.discard(future)

    def notify(self) -> None:
        """Wake every task that waits."""
        self.generation += 1
        for future in self._waiting:
            _settle(future)


def _settle(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)


class PubSub:
    """The subscription of one open store. Starts with the first task that waits; belongs to one event loop.

    Attributes:
        is_live: True while messages of other processes arrive; what was published before is dropped or read again.
    """

    def __init__(self, redis: RedisCache, database: Database) -> None:
        self._redis = redis
        self._database = database
        self._topics: dict[str, Topic] = {}
        self._callbacks: dict[str, Callable[[str | None], None]] = {}
        self._subscription: asyncio.Task[None] | None = None
        # A Redis that is away is one outage, for reads and for the subscription.
        self._log = OutageLog(_logger) if redis.client is None else redis.log
        self.is_live = False

    @property
    def keys_subscribed(self) -> int:
        """How many keys tasks of this process wait for."""
        return len(self._topics)

    @property
    def tasks_waiting(self) -> int:
        """How many tasks nothing but a message or their own timeout moves at this moment."""
        return sum(topic.waiting for topic in self._topics.values())

    @property
    def poll_s(self) -> float:
        """How many seconds a task may wait for a message before it polls."""
        return _SLOW_POLL_S if self.is_live else _FAST_POLL_S

    @contextmanager
    def subscription(self, key: str) -> Iterator[Topic]:
        """Receive the messages about `key` inside the block."""
        topic = self._topics.setdefault(key, Topic())
        topic.subscribers += 1
        self._start()
        try:
            yield topic
        finally:
            topic.subscribers -= 1
            if topic.subscribers == 0:
                del self._topics[key]

    def subscribe(self, prefix: str, callback: Callable[[str | None], None]) -> None:
        """Call `callback` with the rest of every published key that begins with `prefix`, until `close`.

        None means that messages may have been missed. Through the database they are received only while a task waits,
        since that takes a connection.
        """
        self._callbacks[prefix] = callback
        if self._redis.client is not None:
            self._start()

    def _start(self) -> None:
        if self._subscription is None and (self._redis.client is not None or self.notifies):
            self._subscription = asyncio.get_running_loop().create_task(self._subscribe())

    async def notify(self, connection: AnyConnection, key: str) -> None:
        """Send the message with the commit of `connection`, where messages go through the database."""
        if self.notifies:
            await _NOTIFY.first(connection, {"p_key": key})

    async def publish(self, key: str) -> None:
        """Publish a change that was committed: to this process at once, to others through Redis, if it answers."""
        self.notify_local(key)
        if self._redis.client is not None:
            await self._redis.publish(CHANNEL, key)

    def message(self, key: str) -> tuple[str, str] | None:
        """Return the channel and the text of the message about `key`, to be published along with a Redis command."""
        return None if self._redis.client is None else (CHANNEL, key)

    def notify_local(self, key: str) -> None:
        """Publish a change to this process alone."""
        if (topic := self._topics.get(key)) is not None:
            topic.notify()
        for prefix, callback in self._callbacks.items():
            if key.startswith(prefix):
                callback(key[len(prefix) :])

    async def close(self) -> None:
        """End the subscription."""
        if self._subscription is not None:
            # redis-py swallows a cancellation that comes while it connects: asyncio.wait_for does before Python 3.12.
            while not self._subscription.done():
                self._subscription.cancel()
                await asyncio.wait([self._subscription], timeout=_CANCEL_AGAIN_S)
            self._subscription = None
        self.is_live = False
        self._callbacks.clear()

    def notify_all(self) -> None:
        """Have every task that waits read once."""
        for topic in list(self._topics.values()):
            topic.notify()

    @property
    def notifies(self) -> bool:
        """True if messages go through the database, with the commit of the change."""
        return self._redis.client is None and self._database.can_listen

    async def _subscribe(self) -> None:
        while self._redis.client is not None or self.notifies:
            listen = self._listen_to_redis if self._redis.client is not None else self._listen_to_postgres
            try:
                await listen()
            except (*REDIS_FAULTS, *_DATABASE_FAULTS) as exc:
                self._log.away("No subscription for now (%s): polling.", type(exc).__name__)
            except Exception:
                _logger.exception("No subscription for now: polling.")
            self.is_live = False
            await asyncio.sleep(_RETRY_S)

    def _begin(self) -> None:
        # Messages published before the subscription are lost, so every waiting task reads once.
        self.is_live = True
        self._log.back("Subscribed again.")
        self.notify_all()
        for callback in self._callbacks.values():
            callback(None)

    async def _listen_to_redis(self) -> None:
        await self._redis.drop_cluster()
        if self._redis.client is None:
            return
        async with self._redis.client.pubsub() as pubsub:
            await pubsub.subscribe(CHANNEL)
            is_asked = False
            while not self._redis.is_cluster:
                message = await pubsub.get_message(timeout=_CHECK_S)
                if message is None:
                    if is_asked:
                        raise TimeoutError
                    await pubsub.ping()
                elif message["type"] == "subscribe":
                    # Only now, and once more where a client of the host's has connected again by itself.
                    self._begin()
                elif message["type"] == "message":
                    # Bytes or text, as the client decodes replies or not.
                    data = message["data"]
                    self.notify_local(data.decode("utf-8", "replace") if isinstance(data, bytes) else str(data))
                is_asked = message is None
                # Messages that are there already would keep the event loop from all other tasks.
                await asyncio.sleep(0)

    async def _listen_to_postgres(self) -> None:
        # It needs a connection for as long as it listens, so it has a pool of one.
        pool = AsyncpgPool(self._database.engine, size=1)
        try:
            async with pool.connection(_FOREVER_S) as driver:
                await driver.add_listener(CHANNEL, lambda _connection, _pid, _channel, key: self.notify_local(str(key)))
                self._begin()
                # A connection that has ended receives nothing more, so the caller begins again.
                asked_at = time.monotonic()
                while not driver.is_closed():
                    await asyncio.sleep(_RETRY_S)
                    if time.monotonic() - asked_at >= _CHECK_S:
                        # Again changes nothing: it asks whether anybody is at the other end.
                        await driver.execute(f"LISTEN {CHANNEL}", timeout=_CHECK_S)
                        asked_at = time.monotonic()
        finally:
            await pool.close()
