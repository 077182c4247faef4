"""Plots in a live notebook without a network: Altair's scripts come from the kernel, as the docs say."""

from __future__ import annotations

from pathlib import Path

import pytest
from playwright.sync_api import expect

from browser import browser, picture
from commands import gateway_store
from jupyter import lab, run_all, write_notebook

pytestmark = pytest.mark.system


def test_plots_are_live_offline(tmp_path: Path) -> None:
    """Two charts with their bars, drawn by Vega in the browser, and nothing is asked of the network."""
    assert gateway_store("demo", "--events", "2000").code == 0
    write_notebook(
        tmp_path / "plots.ipynb",
        "import altair\n"
        'altair.renderers.enable("jupyter", offline=True)\n'
        "from agent_gateway_store import SyncGatewayStore\n"
        "from agent_gateway_store.notebook import plot\n"
        'store = SyncGatewayStore("sqlite:///gateway-demo.db").open()\n'
        'plot.timeline(store, since="14d")',
        "plot.calls(store)",
    )

    with lab(tmp_path) as address, browser(local=True, width=1300) as (context, seen):
        tab = context.new_page()
        run_all(tab, address, "plots.ipynb")
        charts = tab.locator(".jp-OutputArea svg.marks")
        expect(charts).to_have_count(2, timeout=60_000)
        for chart in charts.all():
            assert chart.locator(".mark-rect path").count() > 5
        picture(tab, "live-plots")

        assert seen.tried == []
