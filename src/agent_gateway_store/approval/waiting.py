"""Wait for decisions: any number of tasks, which share one subscription and one read for each approval."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any, TypeAlias

from agent_gateway_store._concurrency import SingleFlight
from agent_gateway_store.clock import utc_now
from agent_gateway_store.models.approval import ApprovalResult
from agent_gateway_store.models.values import ApprovalStatus
from agent_gateway_store.storage.filters import number
from agent_gateway_store.storage.pubsub import PubSub, Topic

_POLL_S = 0.25  # without messages: what people notice, and four reads a second
_LAST_READ_S = 1.0  # a database that hangs keeps nobody longer past the timeout
_AFTER_DEADLINE_S = 0.01  # the database's clock counts milliseconds

_Read: TypeAlias = Callable[[], Coroutine[Any, Any, ApprovalResult]]


class Waiting:
    """The tasks of one store that read and wait, whichever view of an organisation they came by.

    Args:
        pubsub: Publishes which approvals have changed; None: waiting tasks poll.
        trust_s: How old a status that is read may be, in seconds: no task gets a read that began before.
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

    async def wait(self, org_id: str | None, token: str, read: _Read, *, timeout_s: float) -> ApprovalResult:
        """Return what `read` returns once that is not PENDING, or at the timeout (seconds).

        The last read may take a second longer; if it does not answer by then, the one before it is returned.

        Raises:
            TypeError, ValueError: `timeout_s` is not a number.
        """
        timeout_s = number("timeout_s", timeout_s)
        end = asyncio.get_running_loop().time() + timeout_s
        last = await self.read(org_id, token, read)
        if last.status is not ApprovalStatus.PENDING or timeout_s <= 0:
            return last
        if self.pubsub is None:
            return await self._wait(org_id, token, read, Topic(), last, end)
        with self.pubsub.subscription(str(last.approval_id)) as topic:
            return await self._wait(org_id, token, read, topic, last, end)

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
            left = end - loop.time()
            if last.status is not ApprovalStatus.PENDING or left <= 0:
                return last
            poll_s = _POLL_S if self.pubsub is None else self.pubsub.poll_s
            await topic.wait(seen, min(left, poll_s, _until_deadline(last)))


def _until_deadline(result: ApprovalResult) -> float:
    if result.expires_at is None:
        return _POLL_S
    return max(_AFTER_DEADLINE_S, (result.expires_at - utc_now()).total_seconds() + _AFTER_DEADLINE_S)
