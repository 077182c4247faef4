"""OpenTelemetry of this process, once a store with OTEL_ENABLED was opened (extra `otel`): its spans and metrics.

Attributes never hold an argument of a call, a key, a token or the text of an error.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Coroutine, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from functools import partial, wraps
from typing import TYPE_CHECKING, Any, NamedTuple, ParamSpec, Protocol, TypeAlias, TypeVar
from weakref import WeakSet

from agent_gateway_store.errors import needs_extra

if TYPE_CHECKING:
    from opentelemetry.metrics import CallbackOptions, Observation
    from opentelemetry.trace import Span, Tracer

P = ParamSpec("P")
R = TypeVar("R")

SCOPE = "agent_gateway_store"
TOOL_NAME = "gen_ai.tool.name"
# Chosen: attributes are for people and indexes; names of tools are shorter by far.
_MAX_TEXT = 200

Reading: TypeAlias = tuple[str, float, dict[str, str]]
"""The name of a metric, as in METRICS, its value now, and its attributes."""


class Metric(NamedTuple):
    """How a metric is made: `kind` is histogram, counter (both recorded), observed_counter or gauge (both read)."""

    kind: str
    unit: str
    description: str


# The names come after `agent_gateway_store.`; units by UCUM.
METRICS = {
    "audit.events": Metric("observed_counter", "{event}", "Audit events by outcome"),
    "audit.queue_depth": Metric("gauge", "{event}", "Events that wait for a commit"),
    "audit.queue_age": Metric("gauge", "s", "How long the oldest of them has waited"),
    "audit.spool_depth": Metric("gauge", "{event}", "Events in the spool by state: waiting, quarantined"),
    "audit.spool_age": Metric("gauge", "s", "How long the oldest event has waited in the spool"),
    "audit.commit_duration": Metric("histogram", "s", "Duration of one commit of events"),
    "audit.batch_size": Metric("histogram", "{event}", "Events of one commit"),
    "database.pool_wait": Metric("histogram", "s", "Wait for a connection, by pool: driver, engine"),
    "approvals.open": Metric("gauge", "{approval}", "Approvals that are not finished, by status"),
    "approvals.oldest_pending_age": Metric("gauge", "s", "How long the oldest pending approval has waited"),
    "approvals.decision_time": Metric("histogram", "s", "From asking to the decision, by status"),
    "outbox.due": Metric("gauge", "{notice}", "Notices whose time to be sent has come, by notifier"),
    "outbox.dead": Metric("gauge", "{notice}", "Notices that were given up, by notifier"),
    "outbox.oldest_due_age": Metric("gauge", "s", "How long the oldest due notice has been due, by notifier"),
    "sinks.lag": Metric("gauge", "s", "Age of the oldest event that a sink has not taken, by sink and org"),
    "sinks.dead": Metric("gauge", "{event}", "Events that a sink has refused for good, by sink and org"),
    "delivery.duration": Metric("histogram", "s", "Duration of one attempt to deliver, by notifier and status"),
    "keys.verifications": Metric("counter", "{verification}", "Verified API keys by result: ok, or the error"),
    "redis.breaker_open": Metric("gauge", "{breaker}", "1 while Redis is not used after a fault, else 0"),
    "evidence.seal_lag": Metric("gauge", "s", "Age of the oldest event that is not sealed"),
    "retention.lag": Metric("gauge", "s", "How much older the oldest event is than AUDIT_RETENTION_FLOOR_DAYS"),
}


class Source(Protocol):
    """What metrics are read from for as long as it exists."""

    def readings(self) -> Iterable[Reading]:
        """Return what there is to read now; called from any thread."""
        ...


class _Telemetry:
    def __init__(self) -> None:
        from opentelemetry import metrics, trace

        self.tracer: Tracer = trace.get_tracer(SCOPE)
        self.record: dict[str, Callable[[float, Mapping[str, str]], None]] = {}
        meter = metrics.get_meter(SCOPE)
        for short, (kind, unit, description) in METRICS.items():
            name, texts = f"{SCOPE}.{short}", {"unit": unit, "description": description}
            if kind == "histogram":
                # What the conventions advise for durations in seconds.
                bounds = _SECONDS if unit == "s" else _SIZES
                histogram = meter.create_histogram(name, explicit_bucket_boundaries_advisory=bounds, **texts)
                self.record[short] = histogram.record
            elif kind == "counter":
                self.record[short] = meter.create_counter(name, **texts).add
            elif kind == "gauge":
                meter.create_observable_gauge(name, [partial(_observe, short, max)], **texts)
            else:
                meter.create_observable_counter(name, [partial(_observe, short, sum)], **texts)


# https://opentelemetry.io/docs/specs/semconv/db/database-metrics/: those of `db.client.operation.duration`.
_SECONDS = [0.001, 0.005, 0.01, 0.05, 0.1, 0.5, 1, 5, 10, 60, 600, 3600]
# A batch has 1,000 rows, and those of `write_many` twice as many.
_SIZES = [1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000]

_active: _Telemetry | None = None
_OFF: AbstractContextManager[None] = nullcontext()
# Weak, because OpenTelemetry keeps its callbacks for ever, and a store can be opened many times.
_sources: WeakSet[Source] = WeakSet()


def enable(source: Source) -> None:
    """Switch spans and metrics on for this process, and read `source` from now on.

    Raises:
        MissingExtraError: The OpenTelemetry API is not installed.
    """
    global _active
    with needs_extra("OTEL_ENABLED", extra="otel"):
        # Once: the SDK warns of a second instrument of the same name.
        _active = _active or _Telemetry()
    _sources.add(source)


def disable() -> None:
    """Switch both off again, and read nothing more: for tests, which have a provider each."""
    global _active
    _active = None
    _sources.clear()


def _observe(short: str, together: Callable[[list[float]], float], _options: CallbackOptions) -> Iterator[Observation]:
    from opentelemetry.metrics import Observation

    found: dict[tuple[tuple[str, str], ...], list[float]] = {}
    for source in list(_sources):
        for name, value, attributes in source.readings():
            if name == short:
                found.setdefault(tuple(attributes.items()), []).append(value)
    # Several stores of one process: events add up, and of ages and of what they share the worst counts.
    for attributes_of, values in found.items():
        yield Observation(together(values), dict(attributes_of))


def record(name: str, value: float, **attributes: str) -> None:
    """Record one measurement of a counter or histogram of METRICS."""
    if _active is not None:
        _active.record[name](value, attributes)


def timed(name: str, **attributes: str) -> AbstractContextManager[None]:
    """Record how long the body takes, also if it raises."""
    return _OFF if _active is None else _timed(name, attributes)


@contextmanager
def _timed(name: str, attributes: dict[str, str]) -> Iterator[None]:
    began_at = time.monotonic()
    try:
        yield
    finally:
        record(name, time.monotonic() - began_at, **attributes)


def _callers_span() -> Any:
    # Without the API there is no span: a process that has not loaded it does not pay for the import.
    if (trace := sys.modules.get("opentelemetry.trace")) is None:
        return None
    context = trace.get_current_span().get_span_context()
    return context if context.is_valid else None


def current_trace_id() -> str | None:
    """Return the id of the caller's trace (32 hex digits), or None. Needs no setting."""
    context = _callers_span()
    return None if context is None else f"{context.trace_id:032x}"


def current_span() -> Any:
    """Return what a later span can be linked to: the caller's span, or None."""
    return None if _active is None else _callers_span()


def needs_parent() -> bool:
    """True if a span that is opened now would have no caller; False also where none is opened."""
    return _active is not None and _callers_span() is None


def remote_parent(headers: Mapping[str, str]) -> Any:
    """Return the `parent` of a span from the headers of a request; None where the host has opened a span for it."""
    if not needs_parent():
        return None
    from opentelemetry.propagate import extract

    return extract(headers)


def span(
    name: str, *, is_root: bool = False, link: Any = None, parent: Any = None, **attributes: str | None
) -> AbstractContextManager[Span | None]:
    """Run the body in a span; None is yielded where OTEL_ENABLED is off.

    Args:
        name: What is done.
        is_root: True where there is no caller: what is current belongs to whoever started the task.
        link: What `current_span` returned where the work was caused.
        parent: A remote context, where there is no current span.
        attributes: With `__` for a dot in their names; None leaves one out.
    """
    return _OFF if _active is None else _span(_active.tracer, name, is_root, link, parent, attributes)


@contextmanager
def _span(
    tracer: Tracer, name: str, is_root: bool, link: Any, parent: Any, attributes: Mapping[str, str | None]
) -> Iterator[Span]:
    from opentelemetry.context import Context
    from opentelemetry.trace import Link, StatusCode

    with tracer.start_as_current_span(
        name,
        context=Context() if is_root else parent,
        links=[Link(link)] if link is not None else None,
        attributes={key.replace("__", "."): _plain(value) for key, value in attributes.items() if value is not None},
        # The text of an exception may quote what a plugin or a tool was given.
        record_exception=False,
        set_status_on_exception=False,
    ) as current:
        try:
            yield current
        except BaseException as exc:
            current.set_attribute("error.type", type(exc).__qualname__)
            current.set_status(StatusCode.ERROR)
            raise


def traced(
    name: str, tool: Callable[..., str] | None = None, *, counts: str | None = None
) -> Callable[[Callable[P, Coroutine[Any, Any, R]]], Callable[P, Coroutine[Any, Any, R]]]:
    """Return a decorator that runs a method in a span `name`, below the caller's.

    The span says the outcome, and the id of the approval, where the method returns them.

    Args:
        name: What the method does.
        tool: Returns the name of the tool, given the arguments of the method.
        counts: The counter of METRICS that counts the calls by `result`: ok, or the class of the error.
    """

    def decorate(method: Callable[P, Coroutine[Any, Any, R]]) -> Callable[P, Coroutine[Any, Any, R]]:
        @wraps(method)
        async def run(*args: P.args, **kwargs: P.kwargs) -> R:
            if _active is None:
                return await method(*args, **kwargs)
            result = "ok"
            try:
                with span(name) as current:
                    assert current is not None  # noqa: S101
                    if tool is not None:
                        with suppress(AttributeError, TypeError):
                            # Arguments that the method does not take are refused by itself.
                            current.set_attribute(TOOL_NAME, _plain(tool(*args, **kwargs)))
                    answer = await method(*args, **kwargs)
                    for key, value in _facts(answer):
                        current.set_attribute(f"{SCOPE}.{key}", value)
                return answer
            except BaseException as exc:
                result = type(exc).__qualname__
                raise
            finally:
                if counts is not None:
                    record(counts, 1, result=result)

        return run

    return decorate


def note(current: Span | None, *, status: str, error: str | None) -> None:
    """Say in a span of `span` how it ended where nothing was raised."""
    if current is not None:
        from opentelemetry.trace import StatusCode

        current.set_attribute(f"{SCOPE}.status", status)
        if error is not None:
            current.set_attribute("error.type", error)
            current.set_status(StatusCode.ERROR)


def _facts(answer: Any) -> Iterator[tuple[str, str]]:
    if isinstance(answer, str):
        yield "outcome", str(answer)
    for name in ("status", "approval_id"):
        if (value := getattr(answer, name, None)) is not None:
            yield name, str(value)


def _plain(value: object) -> str:
    # A lone surrogate would have the exporter drop everything that it sends with it.
    return str(value)[:_MAX_TEXT].encode("utf-8", "replace").decode()
