"""Charts, drawn to SVG by the server with the plots of the notebooks; tables of the same numbers beside them."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from importlib.util import find_spec
from typing import Any

from anyio import to_thread
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from agent_gateway_store.console import pages
from agent_gateway_store.store import GatewayStore

# Chosen: two weeks show a week and the one before; calls of one tool beyond the 20 busiest are not drawn.
_SINCE, _BUCKET = "14d", "6h"
_MOST_WAITS = 2_000
# The columns of a table and what they are called.
_CALLS = {"calls": "calls", "latency_p50_ms": "median ms", "latency_p95_ms": "p95 ms"}
_APPROVALS = {
    "approvals": "asked",
    "pending": "pending",
    "denied": "denied",
    "expired": "expired",
    "wait_p50_s": "median wait, s",
    "wait_p90_s": "p90 wait, s",
}

Ask = Callable[[GatewayStore], Awaitable[Any]]
CHARTS: dict[str, tuple[str, Ask]] = {
    "timeline": (
        "Calls by decision over time",
        lambda store: store.audit.stats(by="decision", bucket=_BUCKET, since=_SINCE),
    ),
    "calls": (
        "Calls by tool and caller",
        lambda store: store.audit.stats(by=["tool_name", "caller_id"], since=_SINCE),
    ),
    "latency": ("How long calls take, by tool", lambda store: store.audit.stats(by="tool_name", since=_SINCE)),
    "waiting": (
        "How long approvals wait for a decision",
        lambda store: store.approvals.search(since=_SINCE, limit=_MOST_WAITS),
    ),
}


def can_draw() -> bool:
    """Return True if the libraries of the extra `notebook` are installed."""
    return all(find_spec(name) for name in ("altair", "pandas", "pyarrow", "vl_convert"))


async def charts(request: Request) -> Response:
    """`GET /charts`: the pictures, and the numbers behind them for those who do not see pictures."""
    session = await pages.session_of(request)
    store = session.store
    return pages.page(
        request,
        "charts.html",
        charts=[(name, title) for name, (title, _) in CHARTS.items()] if can_draw() else [],
        tables=[
            ("Decisions", "decision", _CALLS, await store.audit.stats(by="decision", since=_SINCE)),
            ("Tools", "tool_name", _CALLS, (await store.audit.stats(by="tool_name", since=_SINCE))[:20]),
            ("Approvals", "tool_name", _APPROVALS, (await store.approvals.stats(by="tool_name", since=_SINCE))[:20]),
        ],
        replica_note=await pages.replica_note(session),
    )


async def chart(request: Request) -> Response:
    """`GET /charts/{name}.svg`."""
    session = await pages.session_of(request)
    name = request.path_params["name"]
    if name not in CHARTS or not can_draw():
        raise HTTPException(404, "There is no such chart.")
    key = (session.org_id, name)
    drawn = pages.console_of(request).charts
    svg = drawn.get(key)
    if svg is None:
        data = await CHARTS[name][1](session.store)
        # Drawing is work for the processor; on the event loop it would hold up every other page.
        svg = drawn[key] = await to_thread.run_sync(_draw, name, data)
    return Response(svg, media_type="image/svg+xml")


def _draw(name: str, data: Any) -> bytes:
    import vl_convert

    from agent_gateway_store.notebook import plot

    drawn = getattr(plot, name)(data)
    svg: str = vl_convert.vegalite_to_svg(drawn.to_json())
    return svg.encode()
