"""Plugins that enrich or redact events before they are stored (`gateway_store_before_audit_write`)."""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import Callable, Coroutine, Sequence
from functools import cached_property, partial
from typing import Any, TypeAlias, TypeVar

from agent_gateway_store._text import describe, escape
from agent_gateway_store.audit.record import COLUMNS, EncodedRow, encode_event, to_values, without_payload
from agent_gateway_store.hooks.executor import PluginExecutor, PluginFailure, awaited
from agent_gateway_store.hooks.manager import Plugins
from agent_gateway_store.models.audit import AuditEvent, RedactionFlag

__all__ = ["BEFORE", "CHANGEABLE", "Preparing"]

BEFORE = "gateway_store_before_audit_write"

CHANGEABLE = (
    *("sanitized_args", "risk_labels", "risk_score", "matched_policy_rule", "policy_version"),
    *("output_policy_rationale", "llm_explanation", "deterministic_rationale"),
    *("trace_id", "session_id", "parent_request_id"),
)
"""What a plugin may change; it may also add to `redaction_flags`. The rest is what the gateway saw, and stands."""

_Caller: TypeAlias = Callable[..., list[object]]
_T = TypeVar("_T")
_BATCH_ROWS = 50
_STANDING = tuple(
    (name, index) for index, name in enumerate(COLUMNS) if name not in (*CHANGEABLE, "redaction_flags", "content_hash")
)

_logger = logging.getLogger("agent_gateway_store.hooks")


class Preparing:
    """Takes records through the plugins that want to see them. No record is lost here, whatever a plugin does.

    Args:
        plugins: Gives the plugins, at the first event.
        executor: Where they run.
    """

    def __init__(self, plugins: Callable[[], Plugins], executor: PluginExecutor) -> None:
        self.withheld = 0
        self._plugins = plugins
        self._executor = executor
        self._under_way: set[asyncio.Task[Any]] = set()

    @cached_property
    def _lines(self) -> list[_Line]:
        return [_Line(name, caller, self._executor) for name, caller in self._plugins().callers(BEFORE).items()]

    @property
    def is_wanted(self) -> bool:
        """True if some plugin wants to see events. Costs next to nothing."""
        return bool(self._lines)

    async def prepare(self, records: Sequence[EncodedRow]) -> list[EncodedRow]:
        """Return the records as they are to be stored. Raises nothing but a cancellation.

        Each plugin sees what the one before it made. What one could not look at goes on without its texts and
        arguments, so that nothing that was to be redacted gets through.
        """
        prepared, failed = list(records), set[int]()
        for line in self._lines:
            for index, made in enumerate(await line.through(prepared)):
                if made is None:
                    failed.add(index)
                    made = without_payload(prepared[index])
                prepared[index] = made
        self.withheld += len(failed)
        return prepared

    def give_up(self, record: EncodedRow) -> EncodedRow:
        """Return the record as it is kept when nobody can wait for the plugins any more."""
        self.withheld += 1
        return without_payload(record)

    async def detached(self, work: Coroutine[Any, Any, _T]) -> _T:
        """Run `work` to its end even if the caller is cancelled; `settle` waits for it."""
        task = asyncio.get_running_loop().create_task(work)
        self._under_way.add(task)
        task.add_done_callback(self._under_way.discard)
        return await asyncio.shield(task)

    async def settle(self) -> None:
        """Wait for everything that was begun so far."""
        if self._under_way:
            await asyncio.wait(set(self._under_way))


class _Line:
    """The way through one plugin: what arrives while it is busy goes together in its next call."""

    def __init__(self, name: str, caller: _Caller, executor: PluginExecutor) -> None:
        self._name = name
        self._caller = caller
        self._executor = executor
        self._queue: deque[tuple[EncodedRow, asyncio.Future[EncodedRow | None]]] = deque()
        self._drainer: asyncio.Task[None] | None = None
        self._resting_until = 0.0

    async def through(self, records: Sequence[EncodedRow]) -> list[EncodedRow | None]:
        """Return what the plugin made of each record, None where it failed."""
        loop = asyncio.get_running_loop()
        waiting = [(record, loop.create_future()) for record in records]
        self._queue.extend(waiting)
        if self._drainer is None:
            self._start()
        return list(await asyncio.gather(*(future for _, future in waiting)))

    def _start(self) -> None:
        self._drainer = asyncio.get_running_loop().create_task(self._drain())
        self._drainer.add_done_callback(self._stop)

    def _stop(self, drainer: asyncio.Task[None]) -> None:
        self._drainer = None
        if drainer.cancelled():
            # Somebody cancels every task there is; one that has not begun runs no `finally` of its own.
            while self._queue:
                _settle(self._queue.popleft()[1], None)
        elif self._queue:
            self._start()  # what came after its last step

    async def _drain(self) -> None:
        while self._queue:
            batch = [self._queue.popleft() for _ in range(min(_BATCH_ROWS, len(self._queue)))]
            made: list[EncodedRow | None] = [None] * len(batch)
            try:
                made = await self._ask([record for record, _ in batch])
            finally:
                for (_, future), each in zip(batch, made, strict=True):
                    _settle(future, each)

    async def _ask(self, records: list[EncodedRow]) -> list[EncodedRow | None]:
        nothing: list[EncodedRow | None] = [None] * len(records)
        if time.monotonic() < self._resting_until:
            return nothing
        started = time.monotonic()
        changed = await self._executor.run("before", self._name, partial(_change, self._caller, records))
        if isinstance(changed, PluginFailure):
            if time.monotonic() - started >= self._executor.timeout_s:
                self._resting_until = time.monotonic() + self._executor.timeout_s
            _warn(self._name, changed.text, len(records))
            return nothing
        for made in changed:
            if isinstance(made, str):
                _warn(self._name, made, 1)
        return [None if isinstance(made, str) else made for made in changed]


def _settle(future: asyncio.Future[EncodedRow | None], made: EncodedRow | None) -> None:
    if not future.done():
        future.set_result(made)


def _warn(name: str, error: str, count: int) -> None:
    _logger.warning("Plugin %s failed before the write of %d audit events: %s", escape(name), count, error)


async def _change(caller: _Caller, records: list[EncodedRow]) -> list[EncodedRow | str]:
    """Run in the plugin's thread: return what it made of each record, or what went wrong with that one."""
    return list(await asyncio.gather(*(_change_one(caller, record) for record in records)))


async def _change_one(caller: _Caller, record: EncodedRow) -> EncodedRow | str:
    try:
        for made in await awaited(caller(event=_event_of(record))):
            if made is not None:
                return _accepted(record, made)
    except Exception as exc:
        return describe(exc)
    return record


def _event_of(record: EncodedRow) -> AuditEvent:
    return AuditEvent.model_validate(to_values(record) | {"content_hash": None})


def _accepted(record: EncodedRow, made: object) -> EncodedRow:
    if not isinstance(made, AuditEvent):
        raise TypeError(f"{BEFORE} returned {type(made).__name__}, not an AuditEvent or None")
    # Validated again: `model_copy(update=...)` takes anything.
    event = AuditEvent.model_validate(made)
    new = encode_event(event)
    if touched := [name for name, index in _STANDING if new[index] != record[index]]:
        raise ValueError(f"{BEFORE} changed {', '.join(touched)}, which no plugin may change")
    before: list[RedactionFlag] = to_values(record)["redaction_flags"]
    if not all(flag in event.redaction_flags for flag in before):
        raise ValueError(f"{BEFORE} removed a redaction flag")
    return new
