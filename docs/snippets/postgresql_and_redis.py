"""How-to: PostgreSQL and Redis. Needs DATABASE_URL and REDIS_URL."""

import asyncio
import os

# --8<-- [start:imports]
from agent_gateway_store import GatewayStore
from agent_gateway_store.storage.cache import create_redis
from agent_gateway_store.storage.database import create_engine

# --8<-- [end:imports]

database_url, redis_url = os.environ["DATABASE_URL"], os.environ["REDIS_URL"]


async def main() -> None:
    async with GatewayStore(auto_migrate=True):
        pass

    # --8<-- [start:environment]
    async with GatewayStore() as store:  # DATABASE_URL and REDIS_URL
        print(store.database.dialect)
    # --8<-- [end:environment]

    # --8<-- [start:arguments]
    async with GatewayStore(database_url, redis_url=redis_url) as store:
        print(await store.audit.list_recent(limit=5))
    # --8<-- [end:arguments]

    # --8<-- [start:no-redis]
    async with GatewayStore(redis_url="") as store:
        print(await store.approvals.list_requests())
    # --8<-- [end:no-redis]

    # --8<-- [start:pool]
    engine = create_engine(database_url, pool_size=20)  # at most 20, and 20 more at a peak
    redis = create_redis(redis_url, timeout_s=0.1)
    async with GatewayStore(engine=engine, redis=redis) as store:
        print(await store.keys.list())
    await engine.dispose()  # what you made is yours to close
    await redis.aclose()
    # --8<-- [end:pool]

    async with GatewayStore(f"{database_url}?pgbouncer=true&application_name=docs&sslmode=prefer") as store:
        assert await store.keys.list() == []


asyncio.run(main())
