"""The store under anyio's pytest plugin."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterable
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from agent_gateway_store import GatewayStore, StoreSettings


@pytest.fixture(name="_gateway_store_of_anyio")
async def _opened(
    anyio_backend: object,
    gateway_store_settings: StoreSettings,
    gateway_store_plugins: Iterable[object],
    _gateway_store_alone: None,
) -> AsyncIterator[GatewayStore]:
    from agent_gateway_store import GatewayStore

    async with GatewayStore(settings=gateway_store_settings, plugins=gateway_store_plugins) as store:
        yield store
