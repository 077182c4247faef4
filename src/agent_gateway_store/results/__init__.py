"""`Page`: what every listing returns. A list that renders in a notebook and in a terminal, and converts to a frame."""

from agent_gateway_store.results.page import Page, Stats

__all__ = ["Page", "Stats"]
