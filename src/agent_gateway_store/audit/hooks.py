"""The plugins of the audit log: before an event is stored they may change it, after its commit they are notified.

The hooks are `gateway_store_before_audit_write` and `gateway_store_audit_written`.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Sequence
from functools import cached_property, partial
from typing import Any, TypeAlias

from agent_gateway_store._concurrency import BackgroundTasks, BatchQueue
from agent_gateway_store._text import describe, escape
from agent_gateway_store.audit.document import COLUMNS
from agent_gateway_store.audit.record import EncodedRow, encode_event, to_values, without_payload
from agent_gateway_store.hooks.dispatch import PluginHooks
from agent_gateway_store.hooks.executor import PluginExecutor, PluginFailure, awaited
from agent_gateway_store.models.audit import AuditEvent, RedactionFlag

BEFORE = "gateway_store_before_audit_write"
WRITTEN = "gateway_store_audit_written"

CHANGEABLE = (
    *("sanitized_args", "extra", "risk_labels", "risk_score", "matched_policy_rule", "policy_version"),
    *("output_policy_rationale", "llm_explanation", "deterministic_rationale"),
    *("trace_id", "session_id", "parent_request_id"),
)
"""What a plugin may change; it may also add to `redaction_flags`. All other fields stay as the gateway set them."""

# Chosen: committed events that wait for one plugin, as many as the writer queues; further ones are dropped.
MAX_QUEUED_EVENTS = 10_000

_Caller: TypeAlias = Callable[..., list[object]]
# Chosen, of one call before the write: its events share one timeout, and writers wait for it.
_BEFORE_EVENTS = 50
# Chosen, of one call after the commit, for which nobody waits.
_AFTER_EVENTS = 500
_UNCHANGEABLE = tuple(
    (name, index) for index, name in enumerate(COLUMNS) if name not in (*CHANGEABLE, "redaction_flags", "content_hash")
)

_logger = logging.getLogger("agent_gateway_store.hooks")


class BeforeWriteHooks(PluginHooks):
    """Hands rows to the plugins that may change them. No row is lost here, whatever a plugin does.

    Attributes:
        withheld: How many rows were kept without their texts and arguments.
        tasks: The writes that use the plugins, which go on if their caller is cancelled.
    """

    withheld = 0

    @cached_property
    def tasks(self) -> BackgroundTasks:
        return BackgroundTasks()

    @cached_property
    def _hooks(self) -> list[_BeforeHook]:
        return [_BeforeHook(name, caller, self._executor) for name, caller in self._plugins().callers(BEFORE).items()]

    @cached_property
    def is_wanted(self) -> bool:
        """True if a plugin has the hook."""
        return bool(self._hooks)

    async def prepare(self, rows: Sequence[EncodedRow]) -> list[EncodedRow]:
        """Return the rows as they will be stored. Raises nothing but a cancellation.

        Each plugin receives the result of the one before it. If one fails, the row is kept without its texts and
        arguments, so that nothing is stored that it should have redacted.
        """
        prepared, failed = list(rows), set[int]()
        for hook in self._hooks:
            for index, made in enumerate(await hook.run(prepared)):
                if made is None:
                    failed.add(index)
                    made = without_payload(prepared[index])
                prepared[index] = made
        self.withheld += len(failed)
        return prepared

    def withhold(self, row: EncodedRow) -> EncodedRow:
        """Return the row as it is stored when its plugins cannot be waited for any more."""
        self.withheld += 1
        return without_payload(row)


class _BeforeHook:
    """One plugin; rows that arrive while it is busy share its next call."""

    def __init__(self, name: str, caller: _Caller, executor: PluginExecutor) -> None:
        self._name = name
        self._caller = caller
        self._executor = executor
        self._resting_until = 0.0
        self._queue: BatchQueue[EncodedRow, EncodedRow | None] = BatchQueue(
            self._call, max_items=_BEFORE_EVENTS, abandon=lambda _row: None
        )

    async def run(self, rows: Sequence[EncodedRow]) -> list[EncodedRow | None]:
        """Return the result of the plugin for each row, None where it failed."""
        return list(await asyncio.gather(*map(self._queue.add, rows)))

    async def _call(self, rows: Sequence[EncodedRow]) -> list[EncodedRow | None]:
        nothing: list[EncodedRow | None] = [None] * len(rows)
        started = time.monotonic()
        if started < self._resting_until:
            return nothing
        changed = await self._executor.run("before", self._name, partial(_change, self._caller, rows))
        if isinstance(changed, PluginFailure):
            # A plugin that hangs costs writers a wait now and then, and not one for each batch.
            if time.monotonic() - started >= self._executor.timeout_s:
                self._resting_until = time.monotonic() + self._executor.timeout_s
            _warn(self._name, changed.text, len(rows))
            return nothing
        for made in changed:
            if isinstance(made, str):
                _warn(self._name, made, 1)
        return [None if isinstance(made, str) else made for made in changed]


def _warn(name: str, error: str, count: int) -> None:
    _logger.warning("Plugin %s failed before the write of %d audit events: %s", escape(name), count, error)


async def _change(caller: _Caller, rows: Sequence[EncodedRow]) -> list[EncodedRow | str]:
    """Runs in the plugin's thread. Return the plugin's result for each row, or the text of its error."""
    return list(await asyncio.gather(*(_change_one(caller, row) for row in rows)))


async def _change_one(caller: _Caller, row: EncodedRow) -> EncodedRow | str:
    try:
        event = AuditEvent.model_validate(to_values(row) | {"content_hash": None})
        for made in await awaited(caller(event=event)):
            if made is not None:
                return _accepted(row, made)
    except Exception as exc:
        return describe(exc)
    return row


def _accepted(row: EncodedRow, made: object) -> EncodedRow:
    if not isinstance(made, AuditEvent):
        raise TypeError(f"{BEFORE} returned {type(made).__name__}, not an AuditEvent or None")
    # Validated again, because `model_copy(update=...)` takes anything.
    event = AuditEvent.model_validate(made)
    new = encode_event(event)
    if touched := [name for name, index in _UNCHANGEABLE if new[index] != row[index]]:
        raise ValueError(f"{BEFORE} changed {', '.join(touched)}, which no plugin may change")
    before: list[RedactionFlag] = to_values(row)["redaction_flags"]
    if not all(flag in event.redaction_flags for flag in before):
        raise ValueError(f"{BEFORE} removed a redaction flag")
    return new


class AfterWriteHooks(PluginHooks):
    """Notifies plugins of committed rows, in the background. No write waits for it, and memory is bounded.

    Attributes:
        unnotified: How many notifications of rows were dropped or failed, once for each plugin.
    """

    unnotified = 0

    @cached_property
    def _queues(self) -> dict[str, BatchQueue[EncodedRow, None]]:
        return {
            name: BatchQueue(
                partial(self._call, name, caller),
                max_items=_AFTER_EVENTS,
                max_queued=MAX_QUEUED_EVENTS,
                abandon=self._abandon,
            )
            for name, caller in self._plugins().callers(WRITTEN).items()
        }

    @property
    def is_wanted(self) -> bool:
        """True if a plugin has the hook."""
        return bool(self._queues)

    def notify(self, rows: Sequence[EncodedRow]) -> None:
        """Queue committed rows for every plugin; rows that find the queue of a slow one full are dropped."""
        for name, queue in self._queues.items():
            for place, row in enumerate(rows):
                if queue.is_full:
                    if not self.unnotified:
                        _logger.warning("Plugin %s is too slow to be notified of every audit event.", escape(name))
                    self.unnotified += len(rows) - place
                    break
                queue.add(row)

    async def close(self) -> None:
        """Wait for the queues for as long as one call may take; rows that are left count as `unnotified`."""
        left = await asyncio.gather(*(queue.close(self._executor.timeout_s) for queue in self._queues.values()))
        if any(left):
            _logger.warning("Plugins were not notified of %d audit events: the store was closed.", sum(left))

    def _abandon(self, _row: EncodedRow) -> None:
        self.unnotified += 1

    async def _call(self, name: str, caller: _Caller, rows: Sequence[EncodedRow]) -> list[None]:
        failure = await self._executor.run("written", name, partial(_hand_over, caller, rows))
        if failure is not None:
            self.unnotified += len(rows)
            text = "Plugin %s failed when it was notified of %d audit events: %s"
            _logger.warning(text, escape(name), len(rows), failure.text)
        return [None] * len(rows)


async def _hand_over(caller: _Caller, rows: Sequence[EncodedRow]) -> None:
    # In the plugin's thread, so that making the events does not hold up the event loop.
    results: list[Any] = caller(events=[AuditEvent.model_validate(to_values(row)) for row in rows])
    await awaited(results)
