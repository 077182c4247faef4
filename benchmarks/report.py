"""A figure, the limit it is measured beside, and how both are printed."""

from __future__ import annotations

import json
import os
import platform
import statistics
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from importlib.metadata import version
from typing import Any

LIBRARIES = ("agent-gateway-store", "sqlalchemy", "sqlmodel", "pydantic", "asyncpg", "aiosqlite", "redis")


@dataclass
class Figure:
    """One measured figure.

    Attributes:
        name: What was measured.
        unit: Of `ours` and `limit`.
        ours: Samples of the package, one per repetition.
        limit: Samples of what it is compared with, taken in turn with ours.
        against: What that is.
        goal: The ratio to reach.
        more_is_better: Whether the ratio must be at least the goal, or at most.
        facts: Row counts, sizes, batch sizes.
    """

    name: str
    unit: str
    against: str
    goal: float
    more_is_better: bool = True
    ours: list[float] = field(default_factory=list)
    limit: list[float] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)

    @property
    def ratio(self) -> float:
        """Median of the ratios of the repetitions."""
        return statistics.median(own / other for own, other in zip(self.ours, self.limit, strict=True))

    @property
    def is_reached(self) -> bool:
        """Whether the goal was reached."""
        return self.ratio >= self.goal if self.more_is_better else self.ratio <= self.goal

    def as_dict(self) -> dict[str, Any]:
        """Return everything as JSON values."""
        return {
            "name": self.name,
            "unit": self.unit,
            "ours": statistics.median(self.ours),
            "against": self.against,
            "limit": statistics.median(self.limit),
            "ratio": round(self.ratio, 3),
            "goal": ("at least " if self.more_is_better else "at most ") + str(self.goal),
            "reached": self.is_reached,
            "samples": {"ours": self.ours, "limit": self.limit},
            **self.facts,
        }


def machine() -> dict[str, Any]:
    """Return what the figures were measured on."""
    return {
        "machine": platform.platform(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        **{name: version(name) for name in LIBRARIES},
    }


def print_table(figures: Iterable[Figure], write: Callable[[str], object] = print) -> None:
    """Print one line a figure."""
    write(f"{'figure':44} {'ours':>12} {'limit':>12} {'ratio':>7} {'goal':>9}  ")
    for figure in figures:
        row = figure.as_dict()
        goal = ("≥ " if figure.more_is_better else "≤ ") + str(figure.goal)
        mark = "reached" if figure.is_reached else "NOT REACHED"
        write(
            f"{figure.name:44} {row['ours']:12,.4g} {row['limit']:12,.4g} {figure.ratio:7.2f} {goal:>9}  {mark}"
            f"  [{figure.unit}; against {figure.against}]"
        )


def as_json(figures: Iterable[Figure], **facts: Any) -> str:
    """Return the whole run as JSON."""
    return json.dumps({**machine(), **facts, "figures": [figure.as_dict() for figure in figures]}, indent=2)
