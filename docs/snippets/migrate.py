"""How-to: migrate."""

import asyncio

# --8<-- [start:imports]
from agent_gateway_store import GatewayStore, errors
from agent_gateway_store.storage import migrate

# --8<-- [end:imports]


async def main() -> None:
    # --8<-- [start:behind]
    try:
        async with GatewayStore(auto_migrate=False):
            pass
    except errors.SchemaOutOfDateError as error:
        print(error)
        print(error.current, error.expected)
    # --8<-- [end:behind]
    else:
        raise AssertionError

    # --8<-- [start:migrate]
    store = GatewayStore()
    await store.migrate()
    async with store:
        print(await migrate.current(store.database.engine), migrate.head())
    # --8<-- [end:migrate]

    # --8<-- [start:auto]
    async with GatewayStore(auto_migrate=True) as store:
        differences = await migrate.differences(store.database.engine)
    print(differences)  # []: the database equals the models
    # --8<-- [end:auto]
    assert differences == []


asyncio.run(main())
