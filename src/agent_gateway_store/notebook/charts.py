"""What the plots have in common: what they are drawn from, text that no renderer takes for markup, one look."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, cast

from agent_gateway_store import _text
from agent_gateway_store.errors import MissingExtraError
from agent_gateway_store.results import Page
from agent_gateway_store.results.cells import HEX

if TYPE_CHECKING:
    from typing import TypeAlias

    import altair as alt
    import pandas as pd

    Chart: TypeAlias = alt.Chart | alt.LayerChart

__all__ = [
    "DECISION_COLOURS",
    "WIDTH",
    "altair",
    "colours",
    "finish",
    "frame_of",
    "need",
    "nothing",
    "pandas",
    "safe",
    "safe_column",
    "span",
    "stacked",
]

WIDTH = 640
_LABEL_CHARS = 60
DECISION_COLOURS = {
    "ALLOW": HEX["good"],
    "SANITIZE_AND_ALLOW": HEX["info"],
    "APPROVAL_REQUIRED": HEX["wait"],
    "DENY": HEX["bad"],
}
_INK, _DIM, _GRID = "#24292f", "#59636e", "#e3e7eb"


def altair() -> Any:
    """Return the module `altair`.

    Raises:
        MissingExtraError: It is not installed.
    """
    try:
        import altair
    except ImportError as exc:
        raise MissingExtraError("plot", extra="notebook") from exc
    return altair


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


def stacked(data: pd.DataFrame, place: str, layer: str, height: str, order: list[str]) -> pd.DataFrame:
    """Return the rows with `bottom` and `top`: at each place the layers lie on each other, in their order.

    Vega-Lite does not stack bars that have two ends.
    """
    ranks = {name: number for number, name in enumerate(order)}
    ranked = data.assign(rank=data[layer].map(lambda name: ranks.get(name, len(ranks))))
    lying = ranked.sort_values([place, "rank", layer], kind="stable")
    tops = lying.groupby(place, observed=True)[height].cumsum()
    return lying.assign(top=tops, bottom=tops - lying[height]).drop(columns="rank")


def safe(value: Any, *, most: int = _LABEL_CHARS) -> str:
    r"""Return text that may stand in a chart.

    Altair writes its HTML with the data inside a script element, unescaped: `</script>` in the name of a tool would
    end it. So the less-than sign is shown as `\x3c`; hidden characters are shown, long text is cut.
    """
    text = _text.escape(str(value)).replace("<", "\\x3c")
    return text if len(text) <= most else f"{text[: most - 1]}…"


def safe_column(values: Any) -> list[str]:
    """Return a column's values as such texts."""
    return [safe(value) for value in values]


def nothing(title: str | None, default: str, what: str) -> Chart:
    """Return a chart that says that there is nothing to draw."""
    alt = altair()
    chart = (
        alt.Chart(alt.Data(values=[{"said": f"No {what} in this result."}]))
        .mark_text(size=14, color=_DIM)
        .encode(text="said:N")
    )
    return finish(chart.properties(width=WIDTH, height=80), title or default, "")


def finish(chart: Any, title: str, subtitle: str) -> Chart:
    """Return the chart with its title and the look of all of them."""
    alt = altair()
    lines = alt.TitleParams(
        text=safe(title, most=120),
        subtitle=[safe(subtitle, most=160)] if subtitle else [],
        anchor="start",
        fontSize=15,
        subtitleFontSize=12,
        color=_INK,
        subtitleColor=_DIM,
        offset=12,
    )
    axis = {"gridColor": _GRID, "domainColor": _GRID, "tickColor": _GRID, "labelColor": _INK, "titleColor": _DIM}
    drawn = (
        chart.properties(title=lines, background="white", padding=12)
        .configure_view(stroke=None)
        .configure_axis(**axis, labelFontSize=11, titleFontSize=11, titleFontWeight="normal", labelLimit=220)
        .configure_legend(orient="top", title=None, labelFontSize=11, labelColor=_INK, symbolType="square", offset=4)
    )
    return cast("Chart", drawn)


def colours(field: str, data: Any, palette: dict[str, str]) -> Any:
    """Return the colour of a field: by the palette, in its order; a value that is not in it is grey."""
    alt = altair()
    domain = [word for word in palette if word in set(data[field])]
    extra = sorted(set(data[field]) - set(domain))
    shades = [*(palette[word] for word in domain), *(HEX["off"] for _ in extra)]
    return alt.Color(f"{field}:N", scale=alt.Scale(domain=[*domain, *extra], range=shades))


def span(seconds: float) -> str:
    """Return a length of time as text, in the largest unit that fits."""
    for unit, name in ((86_400, "d"), (3_600, "h"), (60, "min")):
        if seconds >= unit:
            return f"{seconds / unit:.3g} {name}"
    return f"{seconds:.3g} s"
