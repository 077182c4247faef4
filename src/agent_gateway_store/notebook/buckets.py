"""Put numbers and times into bins before a chart is made: it gets a few hundred rows, however many there were."""

from __future__ import annotations

from datetime import timedelta
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from agent_gateway_store.notebook.frames import pandas

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["log_bins", "stacked", "step_for"]

_STEPS = [
    *(timedelta(seconds=s) for s in (1, 5, 15, 60, 300, 900)),
    *(timedelta(hours=h) for h in (1, 3, 6)),
    *(timedelta(days=d) for d in (1, 7, 28, 364)),
]
_MOST = 120


def step_for(span: timedelta, least: timedelta | None) -> timedelta:
    """Return the length of a time bucket of which about 120 fill the span.

    Args:
        least: Length of the buckets that there are already; the answer is a multiple of it.
    """
    for step in _STEPS:
        if step * _MOST >= span and (least is None or (step >= least and step % least == timedelta())):
            return step
    return least or _STEPS[-1]


def log_bins(values: pd.Series, *, least: float, bins: int = 36) -> list[dict[str, Any]]:
    """Return `start`, `end` and `count` of bins of equal width on a logarithmic axis.

    Args:
        least: What is smaller counts as this.
    """
    import numpy

    raised = values.clip(lower=least)
    low, high = float(raised.min()), float(raised.max())
    if high <= low:
        low, high = low / 1.3, high * 1.3
    edges = numpy.geomspace(low, high, bins + 1)
    found = pandas().cut(raised, edges, labels=False, include_lowest=True).value_counts()
    return [
        {"start": float(start), "end": float(end), "count": int(found.get(number, 0))}
        for number, (start, end) in enumerate(pairwise(edges))
    ]


def stacked(data: pd.DataFrame, place: str, layer: str, height: str, order: list[str]) -> pd.DataFrame:
    """Return the rows with `bottom` and `top`: at each place the layers lie on each other, in their order.

    Vega-Lite does not stack bars that have two ends.
    """
    ranks = {name: number for number, name in enumerate(order)}
    ranked = data.assign(rank=data[layer].map(lambda name: ranks.get(name, len(ranks))))
    lying = ranked.sort_values([place, "rank", layer], kind="stable")
    tops = lying.groupby(place, observed=True)[height].cumsum()
    return lying.assign(top=tops, bottom=tops - lying[height]).drop(columns="rank")
