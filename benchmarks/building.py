"""What one `AuditEvent` costs beside the plain Pydantic model with the same fields."""

from __future__ import annotations

import timeit
from typing import Annotated, Any

from pydantic import ConfigDict, Field, create_model

from agent_gateway_store import AuditEvent
from benchmarks.events import fields
from benchmarks.report import Figure


def plain_model() -> type[Any]:
    """Return a plain Pydantic model with the fields, defaults and validators of `AuditEvent`."""
    definitions: dict[str, Any] = {}
    for name, info in AuditEvent.model_fields.items():
        kind = Annotated[(info.annotation, *info.metadata)] if info.metadata else info.annotation
        default: Any = info.default
        if info.is_required():
            default = ...
        elif info.default_factory is not None:
            default = Field(default_factory=info.default_factory)
        definitions[name] = (kind, default)
    config = ConfigDict(extra="forbid", validate_assignment=True, hide_input_in_errors=True)
    return create_model("PlainEvent", __config__=config, **definitions)


def measure(*, repeat: int) -> list[Figure]:
    """Measure both in turn, in microseconds an object."""
    figure = Figure("building one AuditEvent", "µs", "plain Pydantic model", 2, more_is_better=False)
    values, plain, count = fields(1), plain_model(), 5_000
    for _ in range(max(5, repeat)):
        figure.ours.append(timeit.timeit(lambda: AuditEvent(**values), number=count) / count * 1e6)
        figure.limit.append(timeit.timeit(lambda: plain(**values), number=count) / count * 1e6)
    return [figure]
