"""PostgreSQL fails over: nothing acknowledged is lost or doubled, waiters end right, standbys pass for no primary."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import pytest

import servers
from agent_gateway_store import ApprovalRequest, ApprovalResult, AuditEvent, GatewayStore, StoreSettings, ToolCall
from agent_gateway_store.errors import ApprovalError, StoreUnavailableError
from agent_gateway_store.storage import database as database_module
from builders import make_event
from proofs.harness import Load, Verdict, eventually, execute, migrated, spool_is_empty
from servers import PostgresServer

pytestmark = pytest.mark.system

SETTINGS = "SELECT pg_reload_conf()"


def url_of(*cluster: PostgresServer, **parameters: str) -> str:
    hosts = ",".join(f"127.0.0.1:{server.port}" for server in cluster)
    query = "&".join(f"{name}={value}" for name, value in {"sslmode": "disable", **parameters}.items())
    return f"postgresql://postgres@{hosts}/postgres?{query}"


def opened(url: str) -> GatewayStore:
    return GatewayStore(url, redis_url="", settings=StoreSettings(notification_worker=False))


def make_request(name: str) -> ApprovalRequest:
    call = ToolCall(server="files", tool="delete_file", arguments={"path": name})
    return ApprovalRequest(request_id=name, caller_id="dev-agent", tool_call=call, risk_explanation="deletes")


async def commit_on_both(primary: PostgresServer) -> None:
    """From now on a commit is acknowledged once the standby has it on disk, too."""
    await execute(primary.url, "ALTER SYSTEM SET synchronous_standby_names = '*'", SETTINGS)
    async with servers.connected(primary.url) as connection:

        async def is_so() -> bool:
            return bool(await connection.fetchval("SELECT count(*) FROM pg_stat_replication WHERE sync_state = 'sync'"))

        await eventually(is_so, 30)


async def read_only(server: PostgresServer, value: str) -> None:
    """Have every connection refuse writes, those that are open among them, or take them again."""
    await execute(
        server.url,
        "SET default_transaction_read_only = off",
        f"ALTER SYSTEM SET default_transaction_read_only = {value}",
        SETTINGS,
    )


@pytest.fixture
def primary() -> Iterator[PostgresServer]:
    with PostgresServer(durable=True) as server:
        migrated(server.url)
        yield server


@dataclass
class Waiters:
    """Tasks that ask for approvals and wait for them, and one that approves all.

    Attributes:
        waiting: How many wait at this moment.
        ended: What each wait returned.
        used: How often each call was released.
        unknown: Calls whose use was cut off.
    """

    store: GatewayStore
    waiting: int = 0
    asked: int = 0
    ended: list[ApprovalResult] = field(default_factory=list)
    used: Counter[str] = field(default_factory=Counter)
    unknown: set[str] = field(default_factory=set)
    is_over: bool = False

    async def follow_tokens(self) -> None:
        """Ask, wait, use, again and again; asking and using may meet the outage, waiting may not."""
        while not self.is_over:
            request = make_request(self._name())
            with suppress(StoreUnavailableError):
                token = await self.store.approvals.issue_token(request)
                self.waiting += 1
                try:
                    result = await self.store.approvals.wait_for_decision(token, timeout_s=60)
                except StoreUnavailableError as exc:
                    raise AssertionError("a waiter gave up") from exc
                finally:
                    self.waiting -= 1
                self.ended.append(result)
                try:
                    await self.store.approvals.consume_token(token, caller_id="dev-agent", tool_call=request.tool_call)
                    self.used[request.request_id] += 1
                except StoreUnavailableError:
                    self.unknown.add(request.request_id)

    async def acquire(self) -> None:
        while not self.is_over:
            request = make_request(self._name())
            result = await self.store.approvals.acquire(request, wait_s=60)
            self.ended.append(result)
            assert result.status == "USED"
            self.used[request.request_id] += 1

    async def approve(self, store: GatewayStore) -> None:
        while True:
            with suppress(StoreUnavailableError, ApprovalError):
                for request in await store.approvals.list_requests("PENDING"):
                    await store.approvals.approve(approval_id=request.approval_id, approver_id="approver-1")
            await asyncio.sleep(0.05)

    def _name(self) -> str:
        self.asked += 1
        return f"call-{self.asked}"


@pytest.mark.parametrize(
    ("found", "rounds"),
    [
        ("by name", 1),
        pytest.param("by name", 5, marks=pytest.mark.slow),
        pytest.param("by a proxy", 2, marks=pytest.mark.slow),
    ],
)
async def test_a_standby_takes_over_from_a_primary_that_was_killed(
    primary: PostgresServer, found: str, rounds: int
) -> None:
    """64 writers, 20 waiters, an approver, a follower and a sealer, none of which restarts; the commits wait for the
    standby. The URL names both servers, or a proxy that leads to the one that takes writes."""
    async with AsyncExitStack() as stack:
        standby = stack.enter_context(PostgresServer(durable=True, standby_of=primary))
        await commit_on_both(primary)
        port, lead_to = await stack.enter_async_context(switch(primary.port))
        url = url_of(primary, standby)
        if found == "by a proxy":
            url = url_of(primary).replace(str(primary.port), str(port))
        async with opened(url) as store, opened(url) as other, asyncio.TaskGroup() as group:
            load, waiters, started = Load(store), Waiters(store), time.monotonic()
            writing = group.create_task(load.run(events_until(lambda: waiters.is_over)))
            tasks = [group.create_task(waiters.follow_tokens()) for _ in range(15)]
            tasks += [group.create_task(waiters.acquire()) for _ in range(5)]
            seen = Counter[str]()
            beside = [group.create_task(work) for work in (waiters.approve(other), follow(other, seen), seal(other))]
            for number in range(rounds):
                if number:
                    primary, standby = standby, await asyncio.to_thread(rebuilt, stack, primary, standby)
                    await commit_on_both(primary)
                await load.until(len(load.acknowledged) + 300)
                await ended(waiters, 20)
                await asyncio.to_thread(primary.kill)
                await execute(standby.url, "SELECT pg_promote()")
                lead_to(standby.port)
                await eventually(lambda: spool_is_empty(store), 60)
                await ended(waiters, 20)
            waiters.is_over = True
            await asyncio.wait([writing, *tasks])
            await eventually(lambda: spool_is_empty(store), 60)
            verdict = await load.judge()
            await eventually(lambda: has_seen(seen, load), 60)
            for task in beside:
                task.cancel()
            await store.evidence.seal()
            verified = await store.evidence.verify()
            rows = {row.request_id: row.status for row in [each async for each in store.approvals.stream()]}
            print(f"{rounds} failovers in {time.monotonic() - started:.0f} s: {load}; {len(waiters.ended)} waits")

    assert verdict == Verdict()
    assert set(seen.values()) == {1}
    assert (verified.ok, verified.unsealed, verified.checked) == (True, 0, len(load.acknowledged))
    assert {result.status for result in waiters.ended} <= {"APPROVED", "USED"}
    assert set(waiters.used.values()) == {1}
    assert all(rows[name] == "USED" for name in waiters.used)
    assert not waiters.unknown & waiters.used.keys()


async def follow(store: GatewayStore, seen: Counter[str]) -> None:
    async for event in store.audit.follow(start="beginning", poll_s=0.05):
        seen[event.request_id] += 1


async def has_seen(seen: Counter[str], load: Load) -> bool:
    return load.acknowledged.keys() <= seen.keys()


async def seal(store: GatewayStore) -> None:
    while True:
        with suppress(StoreUnavailableError):
            await store.evidence.seal()
        await asyncio.sleep(0.05)


def events_until(is_over: Any) -> Iterator[AuditEvent]:
    while not is_over():
        yield make_event()


async def ended(waiters: Waiters, more: int) -> None:
    until = len(waiters.ended) + more

    async def are_there() -> bool:
        return len(waiters.ended) >= until

    await eventually(are_there, 60)


def rebuilt(stack: AsyncExitStack, dead: PostgresServer, primary: PostgresServer) -> PostgresServer:
    """Return a new standby at the address of a server that was killed."""
    port = dead.port
    dead.stop()
    standby = PostgresServer(durable=True, standby_of=primary)
    standby.port = port
    return stack.enter_context(standby)


async def test_a_standby_that_comes_first_is_passed_by(primary: PostgresServer) -> None:
    """Several hosts are searched for the one that takes writes, without a word in the URL."""
    with PostgresServer(standby_of=primary) as standby:
        async with opened(url_of(standby, primary)) as store:
            await store.ping()
            assert await store.audit.write(make_event()) == "STORED"
        async with opened(url_of(standby, primary, target_session_attrs="standby")) as store:
            with pytest.raises(StoreUnavailableError, match="takes no writes"):
                await store.ping()
        with pytest.raises(StoreUnavailableError, match="no server in DATABASE_URL is what target_session_attrs"):
            async with opened(url_of(standby, standby)):
                pass


async def test_a_server_that_hangs_keeps_no_other_from_being_tried(primary: PostgresServer) -> None:
    """It has its share of the time to connect; afterwards the one that answers comes first."""
    with PostgresServer() as hung:
        hung.pause()
        started = time.monotonic()
        async with opened(url_of(hung, primary, connect_timeout="6")) as store:
            opening_s = time.monotonic() - started
            await asyncio.gather(*(store.audit.list_recent() for _ in range(5)))
            took_s = time.monotonic() - started - opening_s
            hung.resume()

    assert 3 <= opening_s < 6
    assert took_s < 3


async def test_what_turns_out_to_take_no_writes_is_replaced(primary: PostgresServer) -> None:
    """Connections stay open to a primary that became a standby; behind the same address another one takes over."""
    with PostgresServer(durable=True, standby_of=primary) as standby:
        await commit_on_both(primary)
        async with switch(primary.port) as (port, lead_to):
            url = url_of(primary).replace(str(primary.port), str(port))
            async with opened(url) as store:
                token = await store.approvals.issue_token(make_request("before"))
                (await store.keys.list(), await store.ping())
                await read_only(primary, "on")
                await eventually(lambda: refuses(store))
                with pytest.raises(StoreUnavailableError, match="read-only"):
                    await store.approvals.approve(token, "approver-1")
                with pytest.raises(StoreUnavailableError, match="takes no writes"):
                    await store.ping()
                assert await store.audit.write(make_event()) == "SPOOLED"
                await execute(standby.url, "SELECT pg_promote()")
                lead_to(standby.port)
                await eventually(lambda: spool_is_empty(store))
                await store.ping()
                assert (await store.approvals.approve(token, "approver-1")).status == "APPROVED"
                assert len(await store.audit.list_recent()) == 1


async def test_reads_leave_a_server_that_became_a_standby(primary: PostgresServer) -> None:
    """A connection that only reads meets no error there, and would go on to read what is old."""
    with PostgresServer(durable=True, standby_of=primary) as standby:
        await commit_on_both(primary)
        async with switch(primary.port) as (port, lead_to), opened(standby.url) as other:
            url = url_of(primary).replace(str(primary.port), str(port))
            async with opened(url) as store:
                token = await store.approvals.issue_token(make_request("call"))
                await read_only(primary, "on")
                await execute(standby.url, "SELECT pg_promote()")
                lead_to(standby.port)
                await other.approvals.approve(token, "approver-1")

                async def is_new() -> bool:
                    events, seen = await store.audit.list_recent(), await store.approvals.check_token(token, fresh=True)
                    return (len(events), seen.status) == (1, "APPROVED")

                await other.audit.write(make_event())
                await eventually(is_new)


async def test_a_commit_that_hangs_ends_within_its_bound(
    primary: PostgresServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where the standby is away that each commit waits for. What was committed all the same is found again."""
    monkeypatch.setattr(database_module, "_COMMAND_TIMEOUT_S", 1)
    async with opened(primary.url) as store:
        await execute(primary.url, "ALTER SYSTEM SET synchronous_standby_names = '*'", SETTINGS)
        await eventually(lambda: refuses(store))
        started = time.monotonic()
        with pytest.raises(StoreUnavailableError):
            await store.approvals.issue_token(make_request("meanwhile"))
        took_s = time.monotonic() - started
        await execute(primary.url, "ALTER SYSTEM RESET synchronous_standby_names", SETTINGS)
        request = make_request("meanwhile")
        token = await store.approvals.issue_token(request)
        await store.approvals.approve(token, "approver-1")
        await store.approvals.consume_token(token, caller_id="dev-agent", tool_call=request.tool_call)

        assert [each.status for each in await store.approvals.list_requests()] == ["USED"]
    assert took_s < 5


async def refuses(store: GatewayStore) -> bool:
    """Tell whether the backend of an open connection has noticed that it takes no writes."""
    try:
        await store.approvals.issue_token(make_request("meanwhile"))
    except StoreUnavailableError:
        return True
    return False


async def test_a_wait_that_begins_in_an_outage_ends_with_the_decision(primary: PostgresServer) -> None:
    """At its timeout in an outage it ends with what it knows: with an error if it never had an answer."""
    async with opened(primary.url) as store, opened(primary.url) as other:
        token = await store.approvals.issue_token(make_request("call"))
        primary.kill()
        with pytest.raises(StoreUnavailableError):
            await store.approvals.wait_for_decision(token, timeout_s=0.5)
        with pytest.raises(StoreUnavailableError):
            await store.approvals.acquire(make_request("other"), wait_s=0.5)
        waiting = asyncio.create_task(store.approvals.wait_for_decision(token, timeout_s=60))
        acquiring = asyncio.create_task(store.approvals.acquire(make_request("other"), wait_s=60))
        await asyncio.sleep(1)
        await asyncio.to_thread(primary.start)
        approving = asyncio.create_task(Waiters(other).approve(other))
        assert (await asyncio.wait_for(waiting, 30)).status == "APPROVED"
        assert (await asyncio.wait_for(acquiring, 30)).status == "USED"
        approving.cancel()
        again = await store.approvals.issue_token(make_request("again"))
        waiting = asyncio.create_task(store.approvals.wait_for_decision(again, timeout_s=1))
        await asyncio.sleep(0.2)
        primary.kill()
        assert (await waiting).status == "PENDING"


@asynccontextmanager
async def switch(port: int) -> AsyncIterator[tuple[int, Any]]:
    """A TCP proxy before a port, and what leads new connections to another one; those that are open stay."""
    tasks: set[asyncio.Task[None]] = set()

    async def pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(OSError):
            while data := await reader.read(65536):
                writer.write(data)
                await writer.drain()
        writer.close()

    async def connect(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            theirs, ours = await asyncio.open_connection("127.0.0.1", port)
        except OSError:
            # As a proxy does while its server is dead.
            writer.close()
            return
        for pair in ((reader, ours), (theirs, writer)):
            tasks.add(asyncio.create_task(pump(*pair)))

    def lead_to(other: int) -> None:
        nonlocal port
        port = other

    async with await asyncio.start_server(connect, "127.0.0.1", 0) as server:
        yield server.sockets[0].getsockname()[1], lead_to
    await asyncio.gather(*tasks)
