"""How-to: API keys."""

import asyncio
from datetime import UTC, datetime, timedelta

from agent_gateway_store import CallerIdentity, GatewayStore, TrustLevel, errors


# --8<-- [start:verify]
async def who_calls(store: GatewayStore, presented: str) -> CallerIdentity | None:
    try:
        return await store.keys.verify(presented)
    except errors.InvalidApiKeyError:
        return None  # answer 401; the error tells nobody why


# --8<-- [end:verify]


async def main() -> None:
    async with GatewayStore() as store:
        # --8<-- [start:issue]
        issued = await store.keys.issue(
            "dev-agent",
            role="developer",
            trust_level=TrustLevel.MEDIUM,
            environment="dev",
            expires_at=datetime.now(UTC) + timedelta(days=90),
        )
        key = issued.plaintext.get_secret_value()
        # --8<-- [end:issue]
        caller = await who_calls(store, key)
        assert caller is not None
        assert caller.key_id == issued.api_key.key_id
        assert await who_calls(store, "agw_nonsense") is None
        assert key not in repr(issued)

        # --8<-- [start:rotate]
        rotated = await store.keys.rotate("dev-agent", overlap=timedelta(hours=1))
        print(rotated.previous_valid_until)
        # --8<-- [end:rotate]
        assert await who_calls(store, key) == caller
        assert await who_calls(store, rotated.plaintext.get_secret_value()) == caller

        # --8<-- [start:revoke]
        await store.keys.revoke("dev-agent")
        # --8<-- [end:revoke]
        assert await who_calls(store, key) is None

        # --8<-- [start:list]
        for api_key in await store.keys.list():
            print(api_key.key_id, api_key.caller_id, api_key.is_active, api_key.last_used_at)
        # --8<-- [end:list]


asyncio.run(main())
