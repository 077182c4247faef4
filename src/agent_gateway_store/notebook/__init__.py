"""For notebooks: `plot` draws what the store holds, `inbox` shows approvers what waits. Extra: `notebook`."""

from agent_gateway_store.notebook import plot
from agent_gateway_store.notebook.inbox import inbox

__all__ = ["inbox", "plot"]
