"""Wait for decisions: any number of tasks, which share one subscription and one read for each approval."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, TypeAlias, TypeVar

from agent_gateway_store._concurrency import SingleFlight
from agent_gateway_store.clock import utc_now
from agent_gateway_store.errors import StoreUnavailableError, UnreadableRowError
from agent_gateway_store.models.approval import ApprovalResult
from agent_gateway_store.models.values import ApprovalStatus
from agent_gateway_store.storage.filters import number
from agent_gateway_store.storage.pubsub import PubSub, Topic
from agent_gateway_store.telemetry import traced

_POLL_S = 0.25  # without messages: what people notice, and four reads a second
_LAST_READ_S = 1.0  # a database that hangs keeps nobody longer past the timeout
_FIRST_READ_S = 5.0  # chosen: a database that is slow, and does not hang, still answers a short wait
_RETRY_S = 1.0  # chosen: a server that restarts or is replaced is back within seconds
_AFTER_DEADLINE_S = 0.01  # the database's clock counts milliseconds

T = TypeVar("T")
_Read: TypeAlias = Callable[[], Coroutine[Any, Any, ApprovalResult]]


class Waiting:
    """The tasks of one store that read and wait, whichever view of an organisation they came by.

    Without `pubsub` they poll. No task gets a read that began more than `trust_s` seconds before.
    """

    def __init__(self, pubsub: PubSub | None, *, trust_s: float) -> None:
        self.pubsub = pubsub
        self._trust_s = trust_s
        self._changes = 0
        self._reads: SingleFlight[ApprovalResult] = SingleFlight()

    def note_change(self) -> None:
        """Some approval was changed here: tasks that read from now on share no read that began before."""
        self._changes += 1

    async def read(self, org_id: str | None, token: str, read: _Read) -> ApprovalResult:
        """Return what `read` returns; tasks that ask for the same approval at the same time share one."""
        return await self._reads.run((org_id, token, self._changes), read, max_age_s=self._trust_s)

    @traced("approval.wait")
    async def wait(self, org_id: str | None, token: str, read: _Read, *, timeout_s: float) -> ApprovalResult:
        """Return what `read` returns once that is not PENDING, or at the timeout (seconds).

        A database that is away is waited for. The last read may take a second longer; if it does not answer by then,
        the one before it is returned.

        Raises:
            StoreUnavailableError: It was away all the time.
            TypeError, ValueError: `timeout_s` is not a number.
        """
        timeout_s = number("timeout_s", timeout_s)
        end = asyncio.get_running_loop().time() + timeout_s
        last = await self.through_outage(lambda: self._first_read(org_id, token, read, end), end)
        if last.status is not ApprovalStatus.PENDING or timeout_s <= 0:
            return last
        if self.pubsub is None:
            return await self._wait(org_id, token, read, Topic(), last, end)
        with self.pubsub.subscription(str(last.approval_id)) as topic:
            return await self._wait(org_id, token, read, topic, last, end)

    async def through_outage(self, work: Callable[[], Awaitable[T]], end: float) -> T:
        """Return what `work` returns; while the database is away it is tried again, until `end` by the loop's clock.

        Raises:
            StoreUnavailableError: It is away then; or it was, and what ended was a transaction of the caller's session.
        """
        loop = asyncio.get_running_loop()
        while True:
            try:
                return await work()
            except UnreadableRowError:
                raise
            except StoreUnavailableError:
                if self.pubsub is None or (left := end - loop.time()) <= 0:
                    raise
            await asyncio.sleep(min(left, _RETRY_S))

    async def _first_read(self, org_id: str | None, token: str, read: _Read, end: float) -> ApprovalResult:
        left = end - asyncio.get_running_loop().time()
        if self.pubsub is None or left <= 0:
            return await self.read(org_id, token, read)
        try:
            async with asyncio.timeout(max(left + _LAST_READ_S, _FIRST_READ_S)):
                return await self.read(org_id, token, read)
        except TimeoutError as exc:
            raise StoreUnavailableError("The database could not be read in time: check its health.") from exc

    async def _wait(
        self, org_id: str | None, token: str, read: _Read, topic: Topic, last: ApprovalResult, end: float
    ) -> ApprovalResult:
        loop = asyncio.get_running_loop()
        while True:
            # Taken before the read, so a decision between the two is noticed; a read that is joined began after it.
            seen = topic.generation
            try:
                async with asyncio.timeout(max(end - loop.time(), 0) + _LAST_READ_S):
                    last = await self._reads.run((org_id, token, topic, seen), read)
            except TimeoutError:
                return last
            except StoreUnavailableError as exc:
                if self.pubsub is None or isinstance(exc, UnreadableRowError):
                    raise
                if (left := end - loop.time()) <= 0:
                    return last
                await topic.wait(seen, min(left, _RETRY_S))
                continue
            left = end - loop.time()
            if last.status is not ApprovalStatus.PENDING or left <= 0:
                return last
            poll_s = _POLL_S if self.pubsub is None else self.pubsub.poll_s
            await topic.wait(seen, min(left, poll_s, _until_deadline(last)))


def _until_deadline(result: ApprovalResult) -> float:
    left = 0.0 if result.expires_at is None else (result.expires_at - utc_now()).total_seconds()
    # Over by this machine's clock, which is ahead of the database's.
    return left + _AFTER_DEADLINE_S if left > 0 else _POLL_S
