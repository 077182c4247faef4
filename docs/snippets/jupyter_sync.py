"""How-to: the blocking twin, where an event loop already runs."""

import asyncio


async def cell() -> None:
    """A notebook's loop runs while the cell does."""
    # --8<-- [start:sync]
    from agent_gateway_store import SyncGatewayStore

    with SyncGatewayStore() as store:
        page = store.audit.list_recent(limit=20)
        denied = store.audit.list_by_decision("DENY")
        mine = store.for_org("acme").audit.list_recent()
    # --8<-- [end:sync]
    assert page == denied == mine == []


asyncio.run(cell())
