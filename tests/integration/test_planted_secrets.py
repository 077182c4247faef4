"""Secrets planted in a whole run on PostgreSQL and Redis are looked for everywhere a run leaves something."""

from __future__ import annotations

import asyncio
import logging
import pickle
import traceback
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any
from uuid import uuid4

import asyncpg
import pytest
import redis.asyncio
from sqlalchemy.exc import DBAPIError

from agent_gateway_store import GatewayStore, Page, StoreSettings, ToolCall, clock, errors
from agent_gateway_store.keys.format import new_key
from agent_gateway_store.testing import RecordingNotifier
from builders import make_event, make_request
from proofs.harness import execute

PLANTED = "planted-argument"
CALL = ToolCall(
    server="files",
    tool="delete_file",
    arguments={
        "path": f"{PLANTED}-1",
        "deep": [{"a": {"b": [f"x {PLANTED}-2 y", 1.5]}}],
        f"{PLANTED}-3": None,
        "nul": f"\x00{PLANTED}-4",
    },
)
SHOWN = ToolCall(server="files", tool="delete_file", arguments={"path": "[redacted]"})
LOGGERS = ("agent_gateway_store", "sqlalchemy", "sqlalchemy.engine", "sqlalchemy.pool", "redis", "asyncpg", "asyncio")


@dataclass
class Trail:
    """What a run has left behind.

    Attributes:
        secrets: What must not be found.
        texts: Where it is looked for, by name.
        redis: Everything that Redis held at any time, by key.
        tokens: The tokens, also those that were replaced.
    """

    secrets: list[str] = field(default_factory=lambda: [PLANTED])
    texts: dict[str, str] = field(default_factory=dict)
    redis: dict[str, str] = field(default_factory=dict)
    tokens: list[str] = field(default_factory=list)

    def found(self, *secrets: str) -> set[tuple[str, str]]:
        """Return which secret stands where, outside Redis."""
        wanted = secrets or (*self.secrets, *self.tokens)
        return {(name, secret) for name, text in self.texts.items() for secret in wanted if secret in text}


class Run:
    """A whole life of keys, approvals and events, with every mistake that can be made on the way."""

    def __init__(self, store: GatewayStore, client: redis.asyncio.Redis, trail: Trail, url: str) -> None:
        self.store, self.client, self.trail, self.url = store, client, trail, url
        self.shown: list[str] = []
        self.pages: list[str] = []
        self.refusals: list[str] = []

    async def _keep(self, answer: Awaitable[Any]) -> Any:
        value = await answer
        self.shown.append(f"{value!r} {value!s}")
        if isinstance(value, Page):
            self.pages.append(f"{value.to_dicts()}{value._repr_html_()}{pickle.dumps(list(value))!r}")
        await self._look_into_redis()
        return value

    async def _refused(self, answer: Awaitable[Any]) -> None:
        """Keep all that an error shows: text, attributes, and the whole chain of its causes."""
        try:
            await answer
        except errors.GatewayStoreError as exc:
            chain: list[BaseException | None] = [exc]
            while chain[-1] is not None:
                chain.append(chain[-1].__cause__ or chain[-1].__context__)
            parts = [f"{each!r} {each!s} {each.args!r} {vars(each)!r}" for each in chain if each is not None]
            parts += [str(each.statement) for each in chain if isinstance(each, DBAPIError)]
            self.refusals.append("".join(traceback.format_exception(exc)) + "".join(parts))
        else:
            raise AssertionError("was not refused")

    async def _look_into_redis(self) -> None:
        for key in await self.client.keys("*"):
            name = key.decode()
            self.trail.redis[name] = self.trail.redis.get(name, "") + str(await self.client.get(key))

    async def keys(self) -> None:
        keys = self.store.keys
        issued = await self._keep(keys.issue("dev-agent", role="developer"))
        rotated = await self._keep(keys.rotate("dev-agent", overlap=timedelta(hours=1)))
        good = [issued.plaintext.get_secret_value(), rotated.plaintext.get_secret_value()]
        wrong = [new_key(issued.api_key.key_id), good[0][:-1] + "-", good[1].lower(), f"agw_{uuid4().hex}"]
        self.trail.secrets += [*good, *wrong]
        for key in good:
            await self._keep(keys.verify(key))
        for key in wrong:
            await self._refused(keys.verify(key))
        await self._refused(keys.issue("dev-agent", role="developer"))
        await self._refused(self.store.for_org("acme").keys.verify(good[0]))
        await self._keep(keys.list())
        await self._keep(keys.revoke("dev-agent"))
        await self._refused(keys.verify(good[0]))

    async def approvals(self) -> None:
        approvals, tokens = self.store.approvals, self.trail.tokens
        request = make_request(tool_call=SHOWN)
        tokens += [str(request.token), await approvals.issue_token(request, call=CALL)]
        await self._look_into_redis()
        again = request.model_copy(update={"token": f"own-token-{uuid4().hex}", "approval_id": uuid4()})
        tokens.append(token := await approvals.issue_token(again, call=CALL))
        for work in (
            approvals.check_token(tokens[0]),
            approvals.approve(token, "dev-agent"),
            approvals.consume_token(token, caller_id="dev-agent", tool_call=CALL),
            approvals.record_outcome(token, "SUCCESS"),
            self.store.for_org("acme").approvals.check_token(token),
            approvals.issue_token(make_request(tool_call=SHOWN, token=token), call=CALL),
        ):
            await self._refused(work)
        waiting = asyncio.create_task(approvals.wait_for_decision(token, timeout_s=10))
        await asyncio.sleep(0.1)
        await self._keep(approvals.approve(token, "approver-1", "ok"))
        await self._keep(waiting)
        other = CALL.model_copy(update={"arguments": {"path": f"{PLANTED}-5"}})
        for work in (
            approvals.deny(token, "approver-2"),
            approvals.consume_token(token, caller_id="dev-agent", tool_call=other),
            approvals.consume_token(token, caller_id="mallory", tool_call=CALL),
        ):
            await self._refused(work)
        await self._keep(approvals.consume_token(token, caller_id="dev-agent", tool_call=CALL))
        await self._refused(approvals.consume_token(token, caller_id="dev-agent", tool_call=CALL))
        await self._keep(approvals.record_outcome(token, "SUCCESS"))
        tokens.append(late := await approvals.issue_token(make_request(tool_call=SHOWN), call=CALL))
        clock.move(timedelta(hours=2))
        await self._refused(approvals.approve(late, "approver-1"))
        await self._keep(approvals.check_token(late))
        await self._keep(approvals.expire_stale())
        clock.reset()
        await self._keep(approvals.list_requests())

    async def events(self) -> None:
        raw = self.store.hash_args(CALL.arguments)
        await self._keep(self.store.audit.write(make_event(raw_args_hash=raw, sanitized_args={"path": "[redacted]"})))
        await self._keep(self.store.audit.list_recent())

    async def faults(self) -> None:
        """The same calls while the database refuses the statements, and while it does not know the table."""
        approvals, tokens = self.store.approvals, self.trail.tokens
        tokens.append(token := await approvals.issue_token(make_request(tool_call=SHOWN), call=CALL))
        await approvals.approve(token, "approver-1")
        key = (await self.store.keys.issue("other-agent", role="r")).plaintext.get_secret_value()
        self.trail.secrets.append(key)
        refusing = "CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN RAISE EXCEPTION 'no'; END $$"
        trigger = "CREATE TRIGGER refuse BEFORE INSERT OR UPDATE ON approval_requests EXECUTE FUNCTION refuse()"
        away = [f"ALTER TABLE {table} RENAME TO away_{table}" for table in ("approval_requests", "api_keys")]
        back = [f"ALTER TABLE away_{table} RENAME TO {table}" for table in ("approval_requests", "api_keys")]
        for before, after in (([refusing, trigger], ["DROP FUNCTION refuse CASCADE"]), (away, back)):
            await execute(self.url, *before)
            works = [
                approvals.consume_token(token, caller_id="dev-agent", tool_call=CALL),
                approvals.issue_token(make_request(tool_call=SHOWN, token=f"own-token-{uuid4().hex}"), call=CALL),
                approvals.cancel(token, "approver-1"),
            ]
            works += [approvals.check_token(token, fresh=True), self.store.keys.verify(key)] if before is away else []
            for work in works:
                await self._refused(work)
            await execute(self.url, *after)
        await self._keep(approvals.consume_token(token, caller_id="dev-agent", tool_call=CALL))

    async def look(self, recorder: RecordingNotifier, caplog: pytest.LogCaptureFixture) -> None:
        """Gather what is left of the run."""
        store, texts = self.store, self.trail.texts
        await self._look_into_redis()
        for each in (store, store.database, store.database.engine, store.settings, store.keys, store.approvals):
            self.shown.append(f"{each!r} {each!s}")
        texts["reprs"], texts["errors"] = "\n".join(self.shown), "\n".join(self.refusals)
        texts["pages"] = "\n".join(self.pages)
        connection = await asyncpg.connect(self.url.replace("+asyncpg", ""), ssl=False)
        try:
            tables = await connection.fetch("SELECT tablename FROM pg_tables WHERE schemaname = 'public'")
            for (table,) in tables:
                found = await connection.fetch(f"SELECT t::text, row_to_json(t)::text FROM {table} t")
                texts[f"table {table}"] = "\n".join(str(tuple(row)) for row in found)
        finally:
            await connection.close()
        await recorder.wait_for(4, timeout_s=5)
        texts["notices"] = "\n".join(f"{notice!r}{notice.model_dump_json()}" for notice in recorder.notices)
        records = [
            f"{record.name} {record.getMessage()} {record.args!r} {record.exc_text}" for record in caplog.records
        ]
        texts["logs"] = caplog.text + "\n".join(records)


@asynccontextmanager
async def heard(database_url: str, redis_url: str) -> AsyncIterator[list[str]]:
    """Keep what goes over the channels on which processes tell each other of changes."""
    messages: list[str] = []
    connection = await asyncpg.connect(database_url.replace("+asyncpg", ""), ssl=False)
    await connection.add_listener("agent_gateway_store_changed", lambda *args: messages.append(str(args[-1])))
    async with redis.asyncio.from_url(redis_url) as client, client.pubsub() as pubsub:
        await pubsub.psubscribe("*")

        async def read() -> None:
            async for message in pubsub.listen():
                messages.append(str(message))

        reading = asyncio.create_task(read())
        try:
            yield messages
            await asyncio.sleep(0.1)
        finally:
            reading.cancel()
            await asyncio.wait([reading])
            await connection.close()


@pytest.fixture
async def trail(
    migrated_postgres_database: Callable[[], str],
    fresh_redis_url: str,
    caplog: pytest.LogCaptureFixture,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Trail:
    """Everything a whole run leaves, with all logs at DEBUG, also those of the drivers."""
    for name in LOGGERS:
        caplog.set_level(logging.DEBUG, logger=name)
    caplog.set_level(logging.DEBUG)
    url, trail, recorder = migrated_postgres_database(), Trail(), RecordingNotifier("recorder")
    caplog.clear()
    settings = StoreSettings(hash_key="planted-hash-key")
    async with (
        heard(url, fresh_redis_url) as messages,
        redis.asyncio.from_url(fresh_redis_url) as client,
        GatewayStore(url, redis_url=fresh_redis_url, settings=settings, plugins=[recorder]) as store,
    ):
        run = Run(store, client, trail, url)
        await run.keys()
        await run.approvals()
        await run.events()
        await run.faults()
        await run.look(recorder, caplog)
    trail.secrets.append("planted-hash-key")
    trail.texts["signals"] = "\n".join(messages)
    for path in tmp_path.rglob("*"):
        if path.is_file():
            trail.texts[f"file {path.name}"] = path.read_bytes().decode("latin-1")
    return trail


async def test_no_secret_is_found_where_it_must_not_be(trail: Trail) -> None:
    """Keys, tokens, raw arguments and the hash key stand in no table, log record, repr, error, notice or signal."""
    assert trail.found() == set()
    assert (len(trail.secrets), len(trail.tokens)) == (9, 5)
    # In Redis a token is the name of its entry and the value behind its id; nothing else is there at any time.
    for token in trail.tokens:
        holding = {name for name, value in trail.redis.items() if token in name + value}
        assert {name.partition(":")[0] for name in holding} <= {"approval", "approval-token"}
        assert token not in trail.redis.get(f"approval:{token}", "")
    for name, value in trail.redis.items():
        assert not [secret for secret in trail.secrets if secret in name + value]
    assert any(token in str(trail.redis) for token in trail.tokens)
    # The places are not empty: what may be shown is found in each of them.
    seen = {name for name, _ in trail.found("[redacted]", "dev-agent", "approver-1", "approval_requests", "approval")}
    tables = {"table approval_requests", "table api_keys", "table notification_deliveries"}
    assert {"reprs", "pages", "errors", "notices", "logs", *tables} <= seen
    assert trail.texts["signals"]
    assert "sqlalchemy.engine" in trail.texts["logs"]
