"""What the plots have in common: fields with names of our own, text that no renderer takes for markup, one look."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

from agent_gateway_store import _text
from agent_gateway_store.errors import MissingExtraError
from agent_gateway_store.results.tones import HEX

if TYPE_CHECKING:
    from typing import TypeAlias

    import altair as alt

    Chart: TypeAlias = alt.Chart | alt.LayerChart

__all__ = ["DECISION_COLOURS", "WIDTH", "altair", "colours", "finish", "nothing", "safe", "safe_column", "span"]

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
