"""Plugins that enrich or redact events before they are stored (`gateway_store_before_audit_write`)."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Coroutine, Sequence
from functools import cached_property, partial
from typing import Any, TypeAlias, TypeVar

from agent_gateway_store.audit.row import COLUMNS, Record, event_record, values_of, withheld
from agent_gateway_store.hooks import Plugins
from agent_gateway_store.hooks.lanes import Lanes, gathered
from agent_gateway_store.hooks.text import describe, one_line
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
_SLICE_ROWS = 50
_STANDING = tuple(
    (name, index) for index, name in enumerate(COLUMNS) if name not in (*CHANGEABLE, "redaction_flags", "content_hash")
)

_logger = logging.getLogger("agent_gateway_store.hooks")


class Preparing:
    """Takes records through the plugins that want to see them. No record is lost here, whatever a plugin does.

    Args:
        plugins: Gives the plugins, at the first event.
        lanes: Where they run.
    """

    def __init__(self, plugins: Callable[[], Plugins], lanes: Lanes) -> None:
        self.withheld = 0
        self._plugins = plugins
        self._lanes = lanes
        self._resting_until: dict[str, float] = {}
        self._under_way: set[asyncio.Task[Any]] = set()

    @cached_property
    def _callers(self) -> dict[str, _Caller]:
        return self._plugins().callers(BEFORE)

    @property
    def is_wanted(self) -> bool:
        """True if some plugin wants to see events. Costs next to nothing."""
        return bool(self._callers)

    async def prepare(self, records: Sequence[Record]) -> list[Record]:
        """Return the records as they are to be stored. Raises nothing but a cancellation.

        Each plugin sees what the one before it made. What one could not look at goes on without its texts and
        arguments, so that nothing that was to be redacted gets through.
        """
        prepared: list[Record] = []
        for start in range(0, len(records), _SLICE_ROWS):
            some = list(records[start : start + _SLICE_ROWS])
            for name, caller in self._callers.items():
                some = await self._through(name, caller, some)
            prepared += some
        return prepared

    async def detached(self, work: Coroutine[Any, Any, _T]) -> _T:
        """Run `work` to its end even if the caller is cancelled; `settle` waits for it."""
        task = asyncio.get_running_loop().create_task(work)
        self._under_way.add(task)
        task.add_done_callback(self._under_way.discard)
        return await asyncio.shield(task)

    async def settle(self) -> None:
        """Wait until nothing that was begun is under way."""
        while self._under_way:
            await asyncio.wait(self._under_way)

    async def _through(self, name: str, caller: _Caller, records: list[Record]) -> list[Record]:
        if time.monotonic() < self._resting_until.get(name, 0):
            return [self._withhold(record) for record in records]
        started = time.monotonic()
        answer = await self._lanes.ask("before", name, partial(_change, caller, records))
        if answer.value is None:
            if time.monotonic() - started >= self._lanes.timeout_s:
                self._resting_until[name] = time.monotonic() + self._lanes.timeout_s
            _warn(name, answer.error, len(records))
            return [self._withhold(record) for record in records]
        changed = []
        for record, made in zip(records, answer.value, strict=True):
            if isinstance(made, str):
                _warn(name, made, 1)
                changed.append(self._withhold(record))
            else:
                changed.append(made)
        return changed

    def _withhold(self, record: Record) -> Record:
        self.withheld += 1
        return withheld(record)


def _warn(name: str, error: str | None, count: int) -> None:
    _logger.warning("Plugin %s failed before the write of %d audit events: %s", one_line(name), count, error)


async def _change(caller: _Caller, records: list[Record]) -> list[Record | str]:
    """Run in the plugin's thread: return what it made of each record, or what went wrong with that one."""
    return list(await asyncio.gather(*(_change_one(caller, record) for record in records)))


async def _change_one(caller: _Caller, record: Record) -> Record | str:
    try:
        for made in await gathered(caller(event=_event_of(record))):
            if made is not None:
                return _accepted(record, made)
    except Exception as exc:
        return describe(exc)
    return record


def _event_of(record: Record) -> AuditEvent:
    return AuditEvent.model_validate(values_of(record) | {"content_hash": None})


def _accepted(record: Record, made: object) -> Record:
    if not isinstance(made, AuditEvent):
        raise TypeError(f"{BEFORE} returned {type(made).__name__}, not an AuditEvent or None")
    # Validated again: `model_copy(update=...)` takes anything.
    event = AuditEvent.model_validate(made)
    new = event_record(event)
    if touched := [name for name, index in _STANDING if new[index] != record[index]]:
        raise ValueError(f"{BEFORE} changed {', '.join(touched)}, which no plugin may change")
    before: list[RedactionFlag] = values_of(record)["redaction_flags"]
    if not all(flag in event.redaction_flags for flag in before):
        raise ValueError(f"{BEFORE} removed a redaction flag")
    return new
