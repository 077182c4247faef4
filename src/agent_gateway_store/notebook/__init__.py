"""For notebooks: `plot` draws what the store answers, `inbox` is the desk of an approver. Extra: `notebook`."""

from agent_gateway_store.notebook import plot
from agent_gateway_store.notebook.desk import inbox

__all__ = ["inbox", "plot"]
