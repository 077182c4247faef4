"""Behind PgBouncer in transaction mode, where each transaction may meet another server connection."""

from __future__ import annotations

import asyncio
import os
import pwd
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import AsyncExitStack, suppress
from pathlib import Path
from typing import Any

import asyncpg
import pytest

from agent_gateway_store import GatewayStore, WriteOutcome
from agent_gateway_store.errors import StoreUnavailableError
from builders import make_event, make_request
from proofs.harness import Load, Verdict, eventually, execute, migrated, spool_is_empty
from servers import PostgresServer, free_port
from tampering import OFF

pytestmark = pytest.mark.system

STORED, DUPLICATE, SPOOLED, LOST = WriteOutcome

SETTINGS = """
[databases]
* = host=127.0.0.1 port={database_port} user=postgres
[pgbouncer]
listen_addr = 127.0.0.1
listen_port = {port}
unix_socket_dir =
auth_type = any
pool_mode = transaction
default_pool_size = {connections}
max_client_conn = 200
server_login_retry = 1
"""


class PgBouncer:
    """A PgBouncer of our own with a few server connections for everybody.

    Attributes:
        port: Where it listens.
        connections: How many connections to the server it has at most.
    """

    def __init__(self, database: PostgresServer, *, connections: int = 3) -> None:
        self.port, self.connections = free_port(), connections
        self._folder = Path(tempfile.mkdtemp(prefix="ags-bouncer-", dir="/tmp"))
        self._folder.chmod(0o755)
        self._settings = self._folder / "pgbouncer.ini"
        self._settings.write_text(SETTINGS.format(database_port=database.port, port=self.port, connections=connections))
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"postgresql://postgres@127.0.0.1:{self.port}/postgres?pgbouncer=true&sslmode=disable"

    def start(self) -> None:
        """Start it and wait until it listens."""
        command = shutil.which("pgbouncer") or "/usr/sbin/pgbouncer"
        options: dict[str, Any] = {}
        if os.geteuid() == 0:
            nobody = pwd.getpwnam("nobody")
            options = {"user": nobody.pw_uid, "group": nobody.pw_gid, "extra_groups": []}
        with (self._folder / "log").open("ab") as log:
            self._process = subprocess.Popen([command, str(self._settings)], stdout=log, stderr=log, **options)
        end = time.monotonic() + 10
        while True:
            with suppress(OSError), socket.create_connection(("127.0.0.1", self.port), timeout=1):
                return
            assert time.monotonic() < end, (self._folder / "log").read_text()
            time.sleep(0.02)

    def kill(self) -> None:
        """Kill it; connections through it are gone."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    def remove(self) -> None:
        """Kill it and remove its files."""
        self.kill()
        shutil.rmtree(self._folder)


@pytest.fixture(scope="module")
def server() -> Iterator[PostgresServer]:
    """A durable server of this file's own."""
    with PostgresServer(durable=True) as started:
        migrated(started.url)
        yield started


@pytest.fixture
def bouncer(server: PostgresServer) -> Iterator[PgBouncer]:
    """A PgBouncer before it, over an empty database."""
    asyncio.run(execute(server.url, OFF, "DELETE FROM audit_events"))
    made = PgBouncer(server)
    try:
        made.start()
        yield made
    finally:
        made.remove()


async def test_no_statement_stays_prepared_on_the_server(bouncer: PgBouncer) -> None:
    """It would stay for as long as the server's connection lives; and a name that asyncpg counted up in one process
    would meet that of the next one.
    """
    async with GatewayStore(bouncer.url, redis_url="") as store:
        await store.audit.write(make_event())
        for use in (store.keys.list, store.approvals.list_requests, store.audit.list_recent, store.evidence.verify):
            await use()
            assert await prepared(bouncer) == []
        assert len([event async for event in store.audit.stream()]) == 1
        assert await prepared(bouncer) == []


async def prepared(bouncer: PgBouncer) -> list[str]:
    """The texts of the statements that every connection to the server holds."""
    async with AsyncExitStack() as stack:
        url = bouncer.url.partition("?")[0]
        found = []
        for _ in range(bouncer.connections):
            connection = await asyncpg.connect(url, ssl=False, statement_cache_size=0)
            stack.push_async_callback(connection.close)
            # An open transaction keeps its connection to the server, so that the next one gets another one.
            await stack.enter_async_context(connection.transaction())
            found += [
                row["statement"] for row in await connection.fetch("SELECT statement FROM pg_prepared_statements")
            ]
        return found


async def test_its_restart_is_an_outage_like_any_other(bouncer: PgBouncer) -> None:
    """Killed twice under 32 writers: 0 events lost, 0 doubled, 0 exceptions, and back without a restart of ours."""
    async with GatewayStore(bouncer.url, redis_url="") as store:
        load = Load(store)
        source = (make_event() for _ in range(10_000))
        running = asyncio.create_task(load.run(source, writers=32))
        for number in (2_000, 5_000):
            await load.until(number)
            bouncer.kill()
            await asyncio.sleep(0.1)
            await asyncio.to_thread(bouncer.start)

            async def is_stored() -> bool:
                return await load.write(make_event()) is STORED

            assert await eventually(is_stored) < 3
        await running
        await eventually(lambda: spool_is_empty(store))
        verdict = await load.judge()
        print(f"2 kills of PgBouncer: {load}: {verdict}")

    assert verdict == Verdict()
    assert load.outcomes().keys() <= {STORED, SPOOLED, DUPLICATE}
    assert load.slowest_s < 6.5


async def test_an_outage_of_the_server_behind_it_is_an_outage_like_any_other(
    server: PostgresServer, bouncer: PgBouncer
) -> None:
    """PgBouncer lets us in, and then has no server: each call says that the database is away, and waits go on."""
    async with GatewayStore(bouncer.url, redis_url="") as store:
        issued = await store.keys.issue("caller", role="developer", environment="dev")
        await store.keys.verify(issued.plaintext)
        token = await store.approvals.issue_token(make_request())
        waiting = asyncio.create_task(store.approvals.wait_for_decision(token, timeout_s=60))
        await asyncio.sleep(0.1)
        server.kill()
        calls = (store.keys.list(), store.keys.revoke("caller"), store.approvals.approve(token, "a"), store.ping())
        results = await asyncio.gather(*calls, return_exceptions=True)
        server.start()

        async def is_approved() -> bool:
            with suppress(StoreUnavailableError):
                return (await store.approvals.approve(token, "alice")).status == "APPROVED"
            return False

        await eventually(is_approved, timeout_s=20)
        assert [type(result) for result in results] == [StoreUnavailableError] * len(results)
        assert (await waiting).status == "APPROVED"


async def test_a_promoted_standby_is_found_behind_its_own_pgbouncer() -> None:
    """Both are named; the one of the dead server still lets us in, and the other one still reports a standby."""
    with PostgresServer(durable=True) as primary:
        migrated(primary.url)
        with PostgresServer(standby_of=primary) as standby:
            bouncers = [PgBouncer(primary), PgBouncer(standby)]
            try:
                for each in bouncers:
                    each.start()
                hosts = [f"127.0.0.1:{each.port}" for each in bouncers]
                urls = [bouncers[0].url.replace(hosts[0], ",".join(order)) for order in (hosts, hosts[::-1])]
                async with GatewayStore(urls[0], redis_url="") as running:
                    assert await running.audit.write(make_event()) is STORED
                    # So that the standby's PgBouncer has met it as one.
                    async with GatewayStore(urls[1], redis_url="") as store:
                        assert await store.audit.write(make_event()) is STORED
                    primary.kill()
                    await execute(standby.url, "SELECT pg_promote()")

                    for url in urls:
                        async with GatewayStore(url, redis_url="") as store:
                            assert await store.audit.write(make_event()) is STORED

                    async def is_back() -> bool:
                        return await running.audit.write(make_event()) is STORED

                    await eventually(is_back, 30)
            finally:
                for each in bouncers:
                    each.remove()
