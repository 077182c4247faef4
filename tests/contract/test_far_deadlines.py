"""Deadlines as far ahead as a database can hold, and further."""

from __future__ import annotations

from datetime import timedelta

import pytest
from contract_helpers import make_request
from pydantic import ValidationError

from agent_gateway_store import GatewayStore, StoreSettings

MILLION_DAYS = timedelta(days=1_000_000)


async def test_a_key_lives_through_the_longest_overlap_and_no_longer_one_is_taken(store: GatewayStore) -> None:
    """What a database could not hold is refused before anything is written: the old key is accepted as before."""
    old = await store.keys.issue("dev-agent", role="developer")
    for overlap in (MILLION_DAYS + timedelta(days=1), timedelta.max):
        with pytest.raises(ValueError, match="a million days at most"):
            await store.keys.rotate("dev-agent", overlap=overlap)
    new = await store.keys.rotate("dev-agent", overlap=MILLION_DAYS)

    assert [(await store.keys.verify(key.plaintext)).caller_id for key in (old, new)] == ["dev-agent"] * 2


async def test_an_approval_waits_as_long_as_the_longest_setting_and_no_longer_one_is_taken(
    database_url: str, redis_setting: str
) -> None:
    """The end of the wait is a time that both databases and Python can hold."""
    longest_s = MILLION_DAYS.total_seconds()
    with pytest.raises(ValidationError, match="approval_token_ttl_seconds"):
        StoreSettings(approval_token_ttl_seconds=longest_s + 1)
    settings = StoreSettings(approval_token_ttl_seconds=longest_s)
    async with GatewayStore(database_url, redis_url=redis_setting, settings=settings) as store:
        token = await store.approvals.issue_token(make_request())
        [listed] = await store.approvals.list_requests()

        assert (await store.approvals.check_token(token)).expires_at == listed.expires_at
        assert listed.expires_at is not None
        assert listed.expires_at - listed.created_at > MILLION_DAYS - timedelta(seconds=1)
