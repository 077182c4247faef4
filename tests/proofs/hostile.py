"""Events as an attacker would make them: everything that some database, driver or JSON writer refuses or changes."""

from __future__ import annotations

import enum
import math
import random
import struct
from datetime import UTC, date, datetime, timedelta, timezone
from decimal import Decimal
from pathlib import PurePosixPath
from typing import Any
from uuid import UUID

from agent_gateway_store import AuditEvent
from agent_gateway_store.models.audit import Decision, ExecutionStatus, OutputDecision, RedactionFlag
from builders import make_event

_ALPHABETS = (
    "abc",
    "\0\x01\x1b\x7f\x85\n\r\t",
    "\ud800\udbff\udc00\udfff",
    "\u202e\u2066\u200f\ufeff\ufffe\uffff",
    "\U0001f600\U0010ffff\u20ac\u00e9",
    "\"'\\/~$%;{}[]<>",
)
_TEXTS = (
    "",
    " ",
    "\0",
    "\ud800",
    "\\u0000",
    "NaN",
    "null",
    "$int:5",
    "[cut: 3 more items]",
    "[cut]",
    "'; DROP TABLE x; --",
)
_INTEGERS = (0, -1, 2**31, 2**53 - 1, 2**53, 2**53 + 1, -(2**53), 2**63 - 1, 2**63, -(2**63) - 1, 10**30, 10**5_000)
_FLOATS = (math.nan, math.inf, -math.inf, -0.0, 0.0, 5e-324, 1e15, 1e16, 1e22, 1e23, 1.7e308, 9007199254740993.0, 100.0)


class Level(enum.Enum):
    """An enum whose value JSONB would respell."""

    HIGH = 1e20


class Unspeakable:
    """An object that raises whatever it is asked."""

    def __repr__(self) -> str:
        raise RuntimeError

    __str__ = __hash__ = __repr__  # type: ignore[assignment]


class Hostile:
    """Makes events from a seed; the same seed makes the same events but for the ids of organisations.

    Args:
        seed: Where to begin.
    """

    def __init__(self, seed: int) -> None:
        self._rng = random.Random(seed)
        self._made = 0

    def event(self, **fields: Any) -> AuditEvent:
        """Build one event under a request id of its own, unless one is given."""
        rng = self._rng
        self._made += 1
        values: dict[str, Any] = {
            "request_id": f"{self._made} {self.text()}",
            "sanitized_args": {self.key(): self.json(0) for _ in range(rng.randrange(6))} | self._shape(),
            "risk_score": self.number(),
            "latency_ms": rng.choice((0, 12, 0.4, 2**31, 2**63 - 1, 2**63, 2**200)),
            "timestamp": self.instant(),
            "decision": rng.choice(list(Decision)),
            "execution_status": rng.choice([None, *ExecutionStatus]),
            "output_decision": rng.choice(list(OutputDecision)),
            "risk_labels": [self.text() for _ in range(rng.choice((0, 0, 1, 5, 40)))],
            "redaction_flags": [
                RedactionFlag(field=self.text(), reason=self.text(), original_hash=rng.choice((None, self.text())))
                for _ in range(rng.choice((0, 0, 1, 3)))
            ],
        }
        required = ("caller_id", "caller_role", "environment", "mcp_server", "tool_name", "matched_policy_rule")
        optional = ("trace_id", "session_id", "parent_request_id", "key_id", "policy_version", "approver_id")
        optional += ("output_hash", "output_policy_rationale", "llm_explanation")
        values |= {name: self.text() for name in (*required, "org_id", "deterministic_rationale") if rng.random() < 0.5}
        values |= {name: rng.choice((None, self.text())) for name in optional if rng.random() < 0.5}
        if rng.random() < 0.5:
            values["approval_id"] = UUID(int=rng.getrandbits(128))
            values["extra"] = {self.key(): self.json(0) for _ in range(rng.randrange(4))}
        if rng.random() < 0.3:
            # Only one or two fields are hostile, so that nothing else hides how those are taken.
            values = {name: values[name] for name in ("request_id", *rng.sample(sorted(values), 2))}
            values["request_id"] = str(self._made)
        return make_event(**(values | fields))

    def text(self) -> str:
        """Text of any length, mostly short."""
        rng = self._rng
        if rng.random() < 0.2:
            return rng.choice(_TEXTS)
        length = rng.choices((rng.randrange(12), rng.randrange(500, 530), 3_000, 70_000), (90, 8, 1, 1))[0]
        unit = "".join(rng.choice(rng.choice(_ALPHABETS)) for _ in range(min(length, 40)))
        return (unit * (length // 40 + 1))[:length]

    def number(self) -> float:
        """Any double, bit by bit, or one of the known nasty ones."""
        rng = self._rng
        random_bits: float = struct.unpack("<d", rng.randbytes(8))[0]
        return rng.choice((rng.random(), rng.choice(_FLOATS), random_bits))

    def instant(self) -> datetime:
        """A time in any zone, also one that UTC cannot hold."""
        rng = self._rng
        zone = rng.choice((None, UTC, timezone(timedelta(minutes=rng.randrange(-1439, 1440)))))
        moment = datetime.min + rng.random() * (datetime.max - datetime.min)
        return rng.choice((moment, datetime.min, datetime.max, datetime(2024, 5, 1))).replace(tzinfo=zone)

    def key(self) -> Any:
        """A key of a mapping, not always text."""
        rng = self._rng
        return rng.choice((self.text(), self.text(), rng.choice(_INTEGERS), None, 1.5, True, b"\0", (1, "a")))

    def json(self, depth: int) -> Any:
        """A value as it may stand in arguments, mostly JSON."""
        rng = self._rng
        if depth < 4 and rng.random() < 0.3:
            if rng.random() < 0.5:
                return [self.json(depth + 1) for _ in range(rng.randrange(5))]
            return {self.key(): self.json(depth + 1) for _ in range(rng.randrange(5))}
        return rng.choice(
            (
                self.text(),
                self.number(),
                rng.choice(_INTEGERS) + rng.randrange(3),
                rng.choice((None, True, False)),
                rng.choice((rng.randbytes(9), {1, "a"}, frozenset({(1, 2)}), Level.HIGH, Unspeakable(), object, len)),
                rng.choice((Decimal("1.10"), Decimal("NaN"), date(2024, 5, 1), UUID(int=7), PurePosixPath("/\0"))),
            )
        )

    def _shape(self) -> dict[Any, Any]:
        """Now and then something far too deep, far too large, or inside itself."""
        roll = self._rng.random()
        if roll < 0.02:
            cycle: dict[str, Any] = {}
            cycle["self"] = [cycle]
            return cycle
        if roll < 0.04:
            nested: Any = "bottom"
            for level in range(self._rng.choice((97, 98, 99, 100, 101, 250, 3_000))):
                nested = [nested] if level % 2 else {"a": nested}
            return {"deep": nested}
        if roll < 0.05:
            return {"long": list(range(70_000)), "after": 1}
        return {"text": "\u20ac" * 100_000} if roll < 0.06 else {}
