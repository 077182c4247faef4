"""DATABASE_READ_URL: what may be a moment old is read on a streaming replica, and a store on a standby only reads."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
from console_helpers import Visitor, key_of, signed_in

from agent_gateway_store import (
    CallerIdentity,
    Decision,
    GatewayStore,
    StoreSettings,
    TrustLevel,
)
from agent_gateway_store.console import create_console
from agent_gateway_store.errors import AuditUnavailableError, InvalidUrlError, StoreUnavailableError
from agent_gateway_store.integrations.guard import CallGuard, Verdict
from builders import make_event, make_request
from commands import gateway_store
from proofs.harness import eventually, execute, migrated
from servers import PostgresServer

pytestmark = pytest.mark.system

FREEZE, GO_ON = "SELECT pg_wal_replay_pause()", "SELECT pg_wal_replay_resume()"


def url_of(*cluster: PostgresServer) -> str:
    return f"postgresql://postgres@{','.join(f'127.0.0.1:{each.port}' for each in cluster)}/postgres?sslmode=disable"


def opened(url: str, read_url: str | None = None, **settings: Any) -> GatewayStore:
    chosen = StoreSettings(database_read_url=read_url, notification_worker=False, **settings)
    return GatewayStore(url, redis_url="", settings=chosen)


@pytest.fixture(scope="module")
def pair() -> Iterator[tuple[PostgresServer, PostgresServer]]:
    with PostgresServer() as primary:
        migrated(primary.url)
        with PostgresServer(standby_of=primary) as standby:
            yield primary, standby


async def test_lists_come_from_the_replica_and_decisions_from_the_primary(
    pair: tuple[PostgresServer, PostgresServer], tmp_path: Path
) -> None:
    """The replica stands still: lists miss what is new, and everything that decides or must be new has it."""
    primary, standby = pair
    async with opened(primary.url, url_of(standby)) as store:
        audit, approvals = store.audit, store.approvals
        event = make_event()
        begin = (await audit.changes(caller_id=event.caller_id)).next_cursor
        await audit.write(event)
        await store.evidence.seal()

        async def has_arrived() -> bool:
            return bool(await audit.search(request_id=event.request_id))

        await eventually(has_arrived)
        await execute(standby.url, FREEZE)
        new = make_event()
        token = await approvals.issue_token(make_request(request_id="call"))
        await audit.write(new)
        kept = await store.evidence.seal()

        async def lists() -> tuple[int, ...]:
            streamed = len([each async for each in audit.stream(request_id=new.request_id)])
            asked = len([each async for each in approvals.stream(request_id="call")])
            stats, counted = await audit.stats(request_id=new.request_id), await approvals.stats(request_id="call")
            exported = await audit.export(tmp_path / "a.jsonl", request_id=new.request_id, overwrite=True)
            table = await audit.to_arrow(request_id=new.request_id)
            listed = len([each for each in await audit.list_recent() if each.request_id == new.request_id])
            called = len(await approvals.search(request_id="call"))
            sums = sum(row["calls"] for row in stats), sum(row["approvals"] for row in counted)
            found = len(await audit.search(request_id=new.request_id))
            return (streamed, asked, *sums, exported.rows, table.num_rows, listed, called, found)

        assert set(await lists()) == {0}
        assert (await store.database.replica.replica_age_s() or 0) > 0
        person = Visitor(create_console(store))
        await person.sign_in(await key_of(store, org_id="default"))
        for path in ("/approvals?status=ALL", "/approvals?status=DENIED", "/audit", "/charts"):
            assert "Read from a replica, at most" in (await person.get(path)).text
        assert await audit.get_by_request_id(new.request_id) is not None
        assert [each.request_id for each in await audit.changes(begin, caller_id=event.caller_id)] == [
            event.request_id,
            new.request_id,
        ]
        assert (await approvals.approve(token, "approver-1")).status == "APPROVED"
        assert kept is not None
        # A checkpoint that the replica has not received is no finding.
        assert (await store.evidence.verify(against=[kept])).anchored == kept.size
        await execute(standby.url, GO_ON)

        async def is_as_old() -> bool:
            return await store.database.replica.replica_age_s() == 0 and bool(
                await audit.search(request_id=new.request_id)
            )

        await eventually(is_as_old)
        assert (await store.evidence.verify(against=[kept])).ok
        assert [len(await approvals.search(request_id="call")), sum((await lists())[:1])] == [1, 1]


async def test_a_replica_that_is_away_is_named_and_its_primary_stands_in_where_both_are_named() -> None:
    with PostgresServer() as primary:
        migrated(primary.url)
        with PostgresServer(standby_of=primary) as standby:
            away, both = url_of(standby), url_of(standby, primary)
        async with opened(primary.url, away) as store:
            assert await store.audit.write(make_event()) == "STORED"
            with pytest.raises(StoreUnavailableError, match="DATABASE_READ_URL"):
                await store.audit.list_recent()
            with pytest.raises(StoreUnavailableError, match="DATABASE_READ_URL"):
                await store.audit.stats()
        async with opened(primary.url, both) as store:
            assert len(await store.audit.list_recent()) == 1
            assert await store.database.replica.replica_age_s() is None
            assert not await store.database.is_replica_apart()


async def test_what_a_person_decides_by_is_read_from_the_primary() -> None:
    with PostgresServer() as primary:
        migrated(primary.url)
        with PostgresServer(standby_of=primary) as standby:
            async with opened(primary.url, url_of(standby)) as store:
                person = Visitor(create_console(store))
                await person.sign_in(await key_of(store, org_id="default"))
                caller = CallerIdentity(
                    caller_id="dev-agent", role="developer", trust_level=TrustLevel.LOW, environment="test"
                )

                def refuse_all(*_: object) -> Verdict:
                    return Verdict(decision=Decision.DENY, rule="r", reason="It must find what was asked.")

                await execute(standby.url, FREEZE)
                earlier, asked = make_request(request_id="earlier"), make_request(request_id="now")
                await store.approvals.issue_token(earlier)
                await store.approvals.deny(approval_id=earlier.approval_id, approver_id="bob", note="not this one")
                await store.approvals.issue_token(asked)
                event = make_event(
                    request_id="now",
                    caller_id=asked.caller_id,
                    mcp_server="files",
                    tool_name="delete_file",
                    session_id="session-1",
                    matched_policy_rule="ASK-FIRST",
                )
                await store.audit.write(event)
                stored = await store.audit.get_by_request_id("now")
                assert stored is not None
                shown = {
                    "/approvals": str(asked.approval_id),
                    f"/approvals/{asked.approval_id}": "ASK-FIRST",
                    f"/audit/{stored.id}": str(asked.approval_id),
                }

                async def check() -> None:
                    for path, text in shown.items():
                        page = await person.get(path)
                        assert (page.status_code, text in page.text) == (200, True), path
                        assert "Read from a replica" not in page.text
                    page = await person.get(f"/approvals/{asked.approval_id}")
                    assert "not this one" in page.text
                    assert "No other call." not in page.text
                    waits = [each.approval_id for each in await store.approvals.list_requests("PENDING")]
                    assert waits == [asked.approval_id]
                    found = await CallGuard(store, refuse_all).ask(asked.tool_call, caller, request_id="now")
                    assert found is not None
                    assert found.approval_id == asked.approval_id

                await check()
                standby.stop()
                await check()
                assert (await person.get("/audit")).status_code == 503
                assert (await person.decide(asked.approval_id, "deny")).status_code == 303


async def test_a_replica_that_was_promoted_is_named(caplog: pytest.LogCaptureFixture) -> None:
    """It has the identity and answers, and what is new is not there; the log, `doctor` and the console say so."""
    with PostgresServer() as primary:
        migrated(primary.url)
        await execute(primary.url, "CREATE ROLE reader LOGIN; GRANT SELECT ON ALL TABLES IN SCHEMA public TO reader")
        with PostgresServer(standby_of=primary) as standby:

            async def shown(reads: PostgresServer) -> list[bool]:
                caplog.clear()
                url = url_of(reads).replace("postgres@", "reader@")
                async with opened(primary.url, url) as store:
                    person = await signed_in(store, create_console(store), uuid4().hex, org_id="default")
                    pages = [(await person.get(path)).text for path in ("/audit", "/approvals?status=ALL", "/charts")]
                settings = {"DATABASE_URL": primary.url, "DATABASE_READ_URL": url, "REDIS_URL": ""}
                outcome = await asyncio.to_thread(partial(gateway_store, "doctor", "--json", **settings))
                said = [each.message for each in caplog.records if each.levelname == "ERROR"], outcome.json["problems"]
                found = ["not a replica any more" in page for page in pages]
                return [*found, *("leads to a server of its own" in str(each) for each in said)]

            assert not any(await shown(standby))
            await execute(standby.url, "SELECT pg_promote()")
            assert all(await shown(standby))
            assert not any(await shown(primary))


async def test_another_database_is_no_replica(tmp_path: Path) -> None:
    for name in ("one", "two"):
        async with opened(f"sqlite:///{tmp_path}/{name}.db"):
            pass
    store = opened(f"sqlite:///{tmp_path}/one.db", f"sqlite:///{tmp_path}/two.db")
    with pytest.raises(InvalidUrlError, match="another database"):
        await store.open()
    with pytest.raises(ValueError, match="of the same kind"):
        opened(f"sqlite:///{tmp_path}/one.db", "postgresql://localhost/name")


@pytest.mark.parametrize("mode", ["spool", "strict"])
async def test_a_store_on_a_standby_reads_and_refuses_writes(mode: str) -> None:
    """In one sentence, and nothing waits in the spool; once it is promoted the same store writes."""
    with PostgresServer() as primary:
        migrated(primary.url)
        with PostgresServer(standby_of=primary) as standby:
            async with opened(url_of(standby), audit_mode=mode) as store:
                assert not await store.audit.list_recent()
                for _ in range(2):
                    with pytest.raises(AuditUnavailableError, match="takes no writes"):
                        await store.audit.write(make_event())
                with pytest.raises(AuditUnavailableError, match="takes no writes"):
                    await store.audit.write_many([make_event()])
                with pytest.raises(StoreUnavailableError, match="read-only"):
                    await store.approvals.issue_token(make_request(request_id="call"))
                assert await store.audit.flush() == 0
                await execute(standby.url, "SELECT pg_promote()")

                async def writes() -> bool:
                    try:
                        return await store.audit.write(make_event()) == "STORED"
                    except AuditUnavailableError:
                        return False

                await eventually(writes)
                assert len(await store.audit.list_recent()) == 1
