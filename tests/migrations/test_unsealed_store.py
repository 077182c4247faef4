"""A store from before the sealed log: what is in it is sealed in the background, while writers go on."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path

import pytest
from sqlalchemy import insert

from agent_gateway_store import AuditEvent, GatewayStore, StoreSettings
from agent_gateway_store.audit.record import encode_event, to_values
from agent_gateway_store.storage import migrate
from agent_gateway_store.storage.database import create_engine
from builders import make_event

pytestmark = [pytest.mark.integration, pytest.mark.system]
WRITERS = 64
_CHUNK = 10_000


@pytest.fixture(params=["sqlite", "postgres"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path}/gateway.db"
    made: Callable[[], str] = request.getfixturevalue("postgres_database")
    return made()


async def fill(url: str, count: int) -> None:
    """Events as the version before wrote them; then its database is upgraded."""
    engine = create_engine(url)
    await migrate.upgrade(engine, "0007_key_history")
    for first in range(0, count, _CHUNK):
        rows = [to_values(encode_event(make_event())) for _ in range(min(_CHUNK, count - first))]
        async with engine.begin() as connection:
            await connection.execute(insert(AuditEvent), rows)
    await migrate.upgrade(engine)
    await engine.dispose()


@pytest.mark.parametrize("count", [12_000, pytest.param(1_000_000, marks=pytest.mark.slow)])
async def test_an_old_store_is_sealed_while_writers_go_on(url: str, count: int) -> None:
    await fill(url, count)
    settings = StoreSettings(audit_seal_seconds=0.05)
    waits: list[float] = []
    async with GatewayStore(url, redis_url="", settings=settings) as store:

        async def write_on() -> None:
            loop = asyncio.get_running_loop()
            while not done.is_set():
                started = loop.time()
                await store.audit.write(make_event())
                waits.append(loop.time() - started)
                await asyncio.sleep(0.02)

        done = asyncio.Event()
        writers = [asyncio.create_task(write_on()) for _ in range(WRITERS)]
        while (checkpoint := await store.evidence.checkpoint()) is None or checkpoint.size < count:
            await asyncio.sleep(0.02)
        done.set()
        await asyncio.gather(*writers)
        last = await store.evidence.seal()
        found = await store.evidence.verify()
    assert last is not None
    assert (found.ok, found.unsealed) == (True, 0)
    assert found.checked == last.size == count + len(waits)
    # Between any two batches of the sealer, at most 10,000 events, writers have their turn.
    assert len(waits) >= WRITERS * (count // 1_500 if url.startswith("sqlite") else 1)
    # A transaction of the sealer takes some tenths of a second even on a busy machine.
    assert max(waits) < 5
