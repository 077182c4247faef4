"""Values that some database, driver or JSON writer refuses or changes, and hypothesis strategies over them."""

from __future__ import annotations

import dataclasses
import enum
from datetime import timedelta, timezone
from typing import Any

from hypothesis import strategies as st
from pydantic import BaseModel, ConfigDict

from agent_gateway_store import Decision, ExecutionStatus, OutputDecision, RedactionFlag

__all__ = ["Broken", "Level", "Model", "Point", "Unreadable", "nested", "odd_event_fields", "odd_text"]


class Level(enum.Enum):
    """Members whose values a database respells, takes as they are, or cannot hold."""

    BIG = 1e20
    ZERO = -0.0
    NAME = "name"
    PAIR = (1, "\0")


@dataclasses.dataclass
class Point:
    """A dataclass with a field that is never set."""

    x: int
    y: int = dataclasses.field(init=False)


class Model(BaseModel):
    """A model that takes more fields than it names."""

    model_config = ConfigDict(extra="allow")
    x: int


class Broken:
    """An object that cannot be shown."""

    def __repr__(self) -> str:
        raise RuntimeError("no repr")


class Unreadable(dict[str, Any]):
    """A mapping that cannot be walked."""

    def items(self) -> Any:
        raise RuntimeError("no items")


def nested(levels: int, bottom: Any) -> Any:
    """Put `bottom` into that many objects and lists, one inside the other."""
    for level in range(levels):
        bottom = [bottom] if level % 2 else {"a": bottom}
    return bottom


odd_text = (
    st.text(max_size=12)
    | st.text(st.characters(), max_size=6)
    | st.text(st.sampled_from("\0\ud800\udc00a~$\\"), max_size=6)
)
_optional = st.none() | odd_text
_leaf = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.floats(1e14, 1e17)
    | st.builds(lambda base, step: base + step, st.sampled_from([2**53, -(2**53), 2**63]), st.integers(-2, 2))
    | odd_text
    | st.binary(max_size=4)
    | st.decimals()
    | st.dates()
    | st.uuids()
)
_arguments = st.dictionaries(
    odd_text | st.integers() | st.none(),
    st.recursive(
        _leaf,
        lambda inner: st.lists(inner, max_size=4) | st.dictionaries(odd_text, inner, max_size=4),
        max_leaves=8,
    ),
    max_size=5,
)
_flags = st.builds(RedactionFlag, field=odd_text, reason=odd_text, original_hash=_optional)
_zones = st.none() | st.builds(lambda minutes: timezone(timedelta(minutes=minutes)), st.integers(-1439, 1439))
odd_event_fields = st.fixed_dictionaries(
    {
        "org_id": odd_text,
        "sanitized_args": _arguments,
        "timestamp": st.datetimes(timezones=_zones),
        "risk_score": st.floats(),
        "latency_ms": st.integers(0, 2**64),
        "decision": st.sampled_from(Decision),
    },
    optional={
        **dict.fromkeys(("trace_id", "session_id", "parent_request_id", "key_id", "policy_version"), _optional),
        **dict.fromkeys(("approver_id", "output_hash", "output_policy_rationale", "llm_explanation"), _optional),
        **dict.fromkeys(("caller_id", "caller_role", "environment", "mcp_server", "tool_name"), odd_text),
        **dict.fromkeys(("matched_policy_rule", "deterministic_rationale"), odd_text),
        "execution_status": st.none() | st.sampled_from(ExecutionStatus),
        "output_decision": st.sampled_from(OutputDecision),
        "risk_labels": st.lists(odd_text, max_size=4),
        "redaction_flags": st.lists(_flags, max_size=3),
        "approval_id": st.none() | st.uuids(),
        "extra": _arguments,
    },
)
