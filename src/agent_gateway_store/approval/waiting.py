"""Wait for decisions: any number of tasks, which the signal of a decision tells how it went, or else one read for all
who wait for the same approval."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

from agent_gateway_store.approval.told import Look, believed
from agent_gateway_store.clock import utc_now
from agent_gateway_store.models.approval import ApprovalResult
from agent_gateway_store.models.values import ApprovalStatus
from agent_gateway_store.storage.signals import Signals, Topic

__all__ = ["Waiting"]

_POLL_S = 0.25
_AFTER_DEADLINE_S = 0.01


class Waiting:
    """The waiting tasks of one manager.

    Args:
        signals: Tells of decisions made elsewhere; None: they are found by polling.
        trust_s: How old news may be that can still change, in seconds.
    """

    def __init__(self, signals: Signals | None, *, trust_s: float) -> None:
        self._signals = signals
        self._trust_s = trust_s
        self._reads: dict[tuple[str, int], asyncio.Task[Look]] = {}

    async def until_decided(self, token: str, look: Callable[[], Awaitable[Look]], *, timeout_s: float) -> ApprovalResult:
        """Return what `look` or a signal says once that is not PENDING, or at the timeout (seconds)."""
        end = asyncio.get_running_loop().time() + timeout_s
        result = (await look()).result
        if not _is_open(result) or timeout_s <= 0:
            return result
        if self._signals is None:
            return await self._until(token, look, Topic(), end)
        with self._signals.listening(str(result.approval_id)) as topic:
            return await self._until(token, look, topic, end)

    async def _until(
        self, token: str, look: Callable[[], Awaitable[Look]], topic: Topic, end: float
    ) -> ApprovalResult:
        loop = asyncio.get_running_loop()
        while True:
            # Before the look, so that a decision between the two is noticed.
            seen = topic.generation
            last = await self._shared(token, seen, look)
            left = end - loop.time()
            if not _is_open(last.result) or left <= 0:
                return last.result
            poll_s = _POLL_S if self._signals is None else self._signals.poll_s
            await topic.wait(seen, min(left, poll_s, _until_deadline(last.result)))
            if topic.generation != seen and topic.news:
                told = believed(topic.news, token, last, trust_s=self._trust_s)
                if told is not None:
                    return told

    async def _shared(self, token: str, generation: int, read: Callable[[], Awaitable[Look]]) -> Look:
        """Join the read that is under way since the same signal, or begin one."""
        key = (token, generation)
        task = self._reads.get(key)
        if task is None:
            task = self._reads[key] = asyncio.ensure_future(read())
            task.add_done_callback(lambda _: self._reads.pop(key, None))
        # Shielded, because others may have joined.
        return await asyncio.shield(task)


def _is_open(result: ApprovalResult) -> bool:
    return result.status is ApprovalStatus.PENDING


def _until_deadline(result: ApprovalResult) -> float:
    if result.expires_at is None:
        return _POLL_S
    return max(_AFTER_DEADLINE_S, (result.expires_at - utc_now()).total_seconds() + _AFTER_DEADLINE_S)
