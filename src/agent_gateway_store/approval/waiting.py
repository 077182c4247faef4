"""Wait for decisions: any number of tasks, which the signal of a decision tells how it went, or else one read for all
who wait for the same approval."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any, TypeAlias

from agent_gateway_store._concurrency import NextFlight, SingleFlight
from agent_gateway_store.approval.told import Look, believed
from agent_gateway_store.clock import utc_now
from agent_gateway_store.models.approval import ApprovalResult
from agent_gateway_store.models.values import ApprovalStatus
from agent_gateway_store.storage.pubsub import PubSub, Topic

__all__ = ["Waiting"]

_POLL_S = 0.25
_LAST_LOOK_S = 1.0
_AFTER_DEADLINE_S = 0.01


_Looking: TypeAlias = Callable[[], Coroutine[Any, Any, Look]]


class Waiting:
    """The waiting tasks of one store.

    Args:
        pubsub: Tells of decisions made elsewhere; None: they are found by polling.
        trust_s: How old news may be that can still change, in seconds.
    """

    def __init__(self, pubsub: PubSub | None, *, trust_s: float) -> None:
        self._pubsub = pubsub
        self._trust_s = trust_s
        self._first_looks: NextFlight[Look] = NextFlight()
        self._looks: SingleFlight[Look] = SingleFlight()

    async def until_decided(
        self, org_id: str | None, token: str, look: _Looking, *, timeout_s: float
    ) -> ApprovalResult:
        """Return what `look` or a signal says once that is not PENDING, or at the timeout (seconds).

        The last look may take a second longer; if it does not answer by then, what was seen before is returned.
        Tasks that wait for the same token on behalf of the same organisation share what they see.
        """
        end = asyncio.get_running_loop().time() + timeout_s
        last = await self._first_looks.run((org_id, token), look)
        if not _is_open(last.result) or timeout_s <= 0:
            return last.result
        if self._pubsub is None:
            return await self._until(org_id, token, look, Topic(), last, end)
        with self._pubsub.listening(str(last.result.approval_id)) as topic:
            return await self._until(org_id, token, look, topic, last, end)

    async def _until(
        self, org_id: str | None, token: str, look: _Looking, topic: Topic, last: Look, end: float
    ) -> ApprovalResult:
        loop = asyncio.get_running_loop()
        while True:
            # Before the look, so that a decision between the two is noticed; who joins a look joins one since then.
            seen = topic.generation
            try:
                async with asyncio.timeout(max(end - loop.time(), 0) + _LAST_LOOK_S):
                    last = await self._looks.run((org_id, token, seen), look)
            except TimeoutError:
                return last.result
            left = end - loop.time()
            if not _is_open(last.result) or left <= 0:
                return last.result
            poll_s = _POLL_S if self._pubsub is None else self._pubsub.poll_s
            await topic.wait(seen, min(left, poll_s, _until_deadline(last.result)))
            if topic.generation != seen and topic.news:
                told = believed(topic.news, token, last, trust_s=self._trust_s)
                if told is not None:
                    return told


def _is_open(result: ApprovalResult) -> bool:
    return result.status is ApprovalStatus.PENDING


def _until_deadline(result: ApprovalResult) -> float:
    if result.expires_at is None:
        return _POLL_S
    return max(_AFTER_DEADLINE_S, (result.expires_at - utc_now()).total_seconds() + _AFTER_DEADLINE_S)
