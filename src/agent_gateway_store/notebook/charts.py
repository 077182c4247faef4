"""What all plots share: their data, text that no renderer takes for markup, and one look."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, cast

from agent_gateway_store import _text
from agent_gateway_store.errors import needs_extra
from agent_gateway_store.results import Page
from agent_gateway_store.results.cells import HEX

if TYPE_CHECKING:
    from typing import TypeAlias

    import altair as alt
    import pandas as pd

    Chart: TypeAlias = alt.Chart | alt.LayerChart

# Pixels. With axis and legend it fits beside the file browser of JupyterLab on a screen of 1280.
WIDTH = 640
# Characters of a name, more than any has: tooltips show it whole, and two that begin alike stay two.
_NAME_CHARS = 500
# Pixels at which Vega cuts the labels of an axis and of a legend.
_AXIS_PX, LEGEND_PX = 220, 140
DECISION_COLOURS = {
    "ALLOW": HEX["good"],
    "SANITIZE_AND_ALLOW": HEX["info"],
    "APPROVAL_REQUIRED": HEX["wait"],
    "DENY": HEX["bad"],
}
# The ink, the muted text and the lines of `view.css`, on the white that every chart has as its background.
INK, _DIM, _GRID = "#24292f", "#59636e", "#e3e7eb"


def libraries() -> tuple[Any, Any]:
    """Return the modules `altair` and `pandas`, or raise MissingExtraError."""
    with needs_extra("plot", extra="notebook"):
        import altair
        import pandas
    return altair, pandas


def stats_of(source: Any, instead: str, **options: Any) -> pd.DataFrame:
    """Return what is to be drawn of audit events: `frame_of` with `store.audit.stats`, which takes the options."""
    return frame_of(source, lambda store: store.audit.stats(**options), instead=instead)


def frame_of(source: Any, ask: Callable[[Any], Any], *, instead: str) -> pd.DataFrame:
    """Return what is to be drawn: any form of a result, or what `ask` reads from a `SyncGatewayStore`.

    Raises MissingExtraError, and TypeError for anything else, which says what to write `instead`.
    """
    _, pd = libraries()
    if inspect.isawaitable(source):
        # Closed, since Python would add its own warning about a coroutine that was never awaited.
        if inspect.iscoroutine(source):
            source.close()
        raise TypeError(f"This was not awaited; write: {instead}")
    # A store is known by its services: an import of its class would load the database drivers for every plot.
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
    """Raise ValueError if a column is missing."""
    missing = [name for name in columns if name not in frame.columns]
    if missing:
        raise ValueError(f"This plot needs {', '.join(missing)}; the result has {', '.join(map(str, frame.columns))}.")


def stacked_bars(
    data: pd.DataFrame, layer: str, palette: dict[str, str], *, y: str, gap: int, **encoding: Any
) -> Chart:
    """Return bars from `start` to `end`, whose layers lie on each other in the order of the palette.

    The last column of `data` has the heights, whose title is `y`; `gap` is that between two bars, in pixels.
    """
    alt, _ = libraries()
    height = data.columns[-1]
    ranks = {name: number for number, name in enumerate(palette)}
    ranked = data.assign(rank=data[layer].map(lambda name: ranks.get(name, len(ranks))))
    lying = ranked.sort_values(["start", "rank", layer], kind="stable").drop(columns="rank")
    # Vega-Lite does not stack bars that have two ends, so each gets its own `bottom` and `top`.
    tops = lying.groupby("start", observed=True)[height].cumsum()
    return cast(
        "Chart",
        alt.Chart(lying.assign(top=tops, bottom=tops - lying[height]))
        .mark_bar(binSpacing=gap)
        .encode(
            y=alt.Y("bottom:Q", title=y, axis=alt.Axis(tickMinStep=1, format=",d")),
            y2="top:Q",
            color=colours(layer, data, palette),
            **encoding,
        )
        .properties(width=WIDTH, height=220),
    )


def safe(value: Any, *, most: int = _NAME_CHARS) -> str:
    r"""Return text that is safe in a chart: hidden characters and `<` (as `\x3c`) are escaped, long text is cut."""
    # Altair puts the data into a script element of its HTML, unescaped: `</script>` in the name of a tool would end it.
    text = _text.escape(str(value)).replace("<", "\\x3c")
    return text if len(text) <= most else f"{text[: most - 1]}…"


def safe_column(values: Any) -> list[str]:
    """Return a column's values as such texts."""
    return [safe(value) for value in values]


def nothing(title: str | None, default: str, what: str) -> Chart:
    """Return a chart that says that there is nothing to draw."""
    alt, _ = libraries()
    values = alt.Data(values=[{"said": f"No {what} in this result."}])
    chart = alt.Chart(values).mark_text(size=14, color=_DIM).encode(text="said:N")
    return finish(chart.properties(width=WIDTH, height=80), title or default, "")


def finish(chart: Any, title: str, subtitle: str) -> Chart:
    """Return the chart with its title and the look that all plots share."""
    alt, _ = libraries()
    # Altair's default loads its scripts from a public server. A renderer that was chosen before is kept.
    if alt.renderers.active == "default":
        alt.renderers.enable("svg")
    lines = alt.TitleParams(
        text=safe(title, most=120),
        subtitle=[safe(subtitle, most=160)] if subtitle else [],
        anchor="start",
        fontSize=15,
        subtitleFontSize=12,
        color=INK,
        subtitleColor=_DIM,
        offset=12,
    )
    look = {"gridColor": _GRID, "domainColor": _GRID, "tickColor": _GRID, "labelColor": INK, "titleColor": _DIM}
    drawn = (
        chart.properties(title=lines, background="white", padding=12)
        .configure_view(stroke=None, fill="white")
        .configure_axis(**look, labelFontSize=11, titleFontSize=11, titleFontWeight="normal", labelLimit=_AXIS_PX)
        .configure_legend(orient="top", title=None, labelFontSize=11, labelColor=INK, symbolType="square", offset=4)
    )
    return cast("Chart", drawn)


def colours(field: str, data: Any, palette: dict[str, str]) -> Any:
    """Return the colour of a field: by the palette, in its order; a value that is not in it is grey."""
    alt, _ = libraries()
    domain = [word for word in palette if word in set(data[field])]
    extra = sorted(set(data[field]) - set(domain))
    shades = [*(palette[word] for word in domain), *(HEX["off"] for _ in extra)]
    return alt.Color(f"{field}:N", scale=alt.Scale(domain=[*domain, *extra], range=shades))


def span(seconds: float) -> str:
    """Return a duration as text, in the largest unit that fits."""
    for unit, name in ((86_400, "d"), (3_600, "h"), (60, "min")):
        if seconds >= unit:
            return f"{seconds / unit:.3g} {name}"
    return f"{seconds:.3g} s"
