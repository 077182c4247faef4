"""The store under pytest-asyncio: one fixture for each loop scope, since a store belongs to the loop that opened it."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterable
from typing import TYPE_CHECKING, Any

import pytest_asyncio

if TYPE_CHECKING:
    from agent_gateway_store import GatewayStore, StoreSettings


def _in_loop_of(scope: Any) -> Any:
    @pytest_asyncio.fixture(loop_scope=scope, name=f"_gateway_store_of_{scope}")
    async def opened(
        gateway_store_settings: StoreSettings, gateway_store_plugins: Iterable[object], _gateway_store_alone: None
    ) -> AsyncIterator[GatewayStore]:
        from agent_gateway_store import GatewayStore

        async with GatewayStore(settings=gateway_store_settings, plugins=gateway_store_plugins) as store:
            yield store

    return opened


_function = _in_loop_of("function")
_class = _in_loop_of("class")
_module = _in_loop_of("module")
_package = _in_loop_of("package")
_session = _in_loop_of("session")
