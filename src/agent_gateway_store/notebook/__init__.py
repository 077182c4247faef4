"""For notebooks: `plot` draws what the store answers, `inbox` shows an approver what waits. Extra: `notebook`."""

from agent_gateway_store.notebook import plot
from agent_gateway_store.notebook.inbox import inbox

__all__ = ["inbox", "plot"]
