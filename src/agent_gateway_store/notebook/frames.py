"""What a plot is drawn from, as a pandas DataFrame: a result, a frame, or the answer of a blocking store."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

from agent_gateway_store.errors import MissingExtraError
from agent_gateway_store.results import Page

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["OTHERS", "counted", "frame_of", "labels_exploded", "need", "pandas", "top"]

OTHERS = "others"


def pandas() -> Any:
    """Return the module `pandas`.

    Raises:
        MissingExtraError: It is not installed.
    """
    try:
        import pandas
    except ImportError as exc:
        raise MissingExtraError("plot", extra="notebook") from exc
    return pandas


def frame_of(source: Any, ask: Callable[[Any], Any], *, instead: str) -> pd.DataFrame:
    """Return what is to be drawn.

    Args:
        source: A `Page` or `Stats`, a pandas or Polars DataFrame, an Arrow table, a list of records, or a
            `SyncGatewayStore`, which is asked.
        ask: Asks a store.
        instead: What to write with an asynchronous store, for the error.

    Raises:
        MissingExtraError: pandas or pyarrow is not installed.
        TypeError: It is none of these; an asynchronous store, or a coroutine that was not awaited.
    """
    pd = pandas()
    if inspect.isawaitable(source):
        if inspect.iscoroutine(source):
            source.close()
        raise TypeError(f"This was not awaited; write: {instead}")
    if hasattr(source, "audit") and hasattr(source, "approvals"):
        if inspect.iscoroutinefunction(source.audit.list_recent):
            raise TypeError(f"A plot cannot wait for an asynchronous store; write: {instead}")
        source = ask(source)
    if isinstance(source, pd.DataFrame):
        return source
    if hasattr(source, "to_pandas"):
        return source.to_pandas()
    if isinstance(source, Iterable) and not isinstance(source, str | bytes):
        return Page(source).to_pandas()
    raise TypeError(f"A plot cannot be drawn from {type(source).__name__}; write: {instead}")


def need(frame: pd.DataFrame, *columns: str) -> None:
    """Check that the columns are there.

    Raises:
        ValueError: One is missing; it names which, and what there is.
    """
    missing = [name for name in columns if name not in frame.columns]
    if missing:
        raise ValueError(f"This plot needs {', '.join(missing)}; the result has {', '.join(map(str, frame.columns))}.")


def counted(frame: pd.DataFrame, *columns: str) -> pd.DataFrame:
    """Return how many calls there are for each combination of the columns, in a column `calls`."""
    if "calls" in frame.columns:
        return frame.groupby(list(columns), observed=True, dropna=True)["calls"].sum().reset_index()
    return frame.groupby(list(columns), observed=True, dropna=True).size().rename("calls").reset_index()


def top(frame: pd.DataFrame, column: str, most: int) -> list[str]:
    """Return the values of `column` with the most calls, the largest first; ties by name."""
    sums = frame.groupby(column, observed=True)["calls"].sum().reset_index()
    return [str(name) for name in sums.sort_values(["calls", column], ascending=[False, True])[column][:most]]


def labels_exploded(frame: pd.DataFrame) -> pd.DataFrame:
    """Return the frame with a row for each risk label, in `risk_label`; events without one fall out."""
    if "risk_label" in frame.columns:
        return frame.dropna(subset=["risk_label"])
    need(frame, "risk_labels")
    lists = frame["risk_labels"].map(_labels)
    exploded = frame.assign(risk_label=lists).explode("risk_label")
    return exploded.dropna(subset=["risk_label"])


def _labels(value: Any) -> list[str]:
    if isinstance(value, str):
        value = json.loads(value)
    return [str(each) for each in value] if isinstance(value, Iterable) else []
