"""Planted secrets are looked for everywhere, and found only where the design allows them."""

from __future__ import annotations

import asyncio
import logging
import pickle
import sqlite3
import traceback
from collections.abc import Awaitable
from contextlib import closing
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import fakeredis
import pytest

from agent_gateway_store import GatewayStore, StoreSettings, SyncGatewayStore, ToolCall, clock, errors
from agent_gateway_store.archive import Archive
from agent_gateway_store.audit.record import encode_event, to_values
from agent_gateway_store.audit.spool import Spool
from agent_gateway_store.keys.format import new_key
from agent_gateway_store.retention import erase
from agent_gateway_store.storage.cache import create_redis
from agent_gateway_store.testing import RecordingNotifier
from builders import make_event, make_request

pytestmark = pytest.mark.unit

RAW_ARGUMENT, OUTPUT = "raw-argument-9f2c", "output-77d0"
PASSWORDS = {"plain-pass-71": "pass-71", "p@ss:w/rd?71#x": "ss:w|rd?71|71#x", "%70ercent-71": "ercent-71"}
"""Passwords, also such as should have been escaped, and pieces by which each is recognised."""
CALL = ToolCall(server="files", tool="delete_file", arguments={"path": RAW_ARGUMENT})
SHOWN = ToolCall(server="files", tool="delete_file", arguments={"path": "[redacted]"})


@dataclass
class Trail:
    """What a run has left behind.

    Attributes:
        secrets: What must not be found.
        texts: Where it is looked for, by name.
        redis: Everything Redis held, key and value.
    """

    secrets: list[str] = field(default_factory=list)
    texts: dict[str, str] = field(default_factory=dict)
    redis: dict[str, str] = field(default_factory=dict)
    token: str = ""

    def found(self) -> list[tuple[str, str]]:
        return [(name, secret) for name, text in self.texts.items() for secret in self.secrets if secret in text]


async def refused(answer: Awaitable[Any]) -> str:
    """Return all that an error shows, with its causes and the values of a full traceback."""
    with pytest.raises(errors.GatewayStoreError) as caught:
        await answer
    return "".join(traceback.format_exception(caught.value)) + repr(caught.value) + str(vars(caught.value))


async def run(store: GatewayStore, trail: Trail) -> None:
    """Do the main job once, with every mistake that can be made on the way."""
    issued = await store.keys.issue("dev-agent", role="developer")
    key = issued.plaintext.get_secret_value()
    wrong_key = new_key(issued.api_key.key_id)
    rotated = await store.keys.rotate("dev-agent")
    caller = await store.keys.verify(key)
    request = make_request(request_id="r-1", tool_call=SHOWN)
    own_token = str(request.token)
    token = await store.approvals.issue_token(request, call=CALL)
    again = await store.approvals.issue_token(request.model_copy(update={"token": "own-token-55a1"}), call=CALL)
    raw_hash = store.hash_args({"path": RAW_ARGUMENT})
    errors_seen = [
        await refused(store.keys.issue("dev-agent", role="developer")),
        await refused(store.keys.verify(wrong_key)),
        await refused(store.keys.verify(key[:-1])),
        await refused(store.approvals.check_token(token)),
        await refused(store.approvals.approve(again, "dev-agent")),
        await refused(store.approvals.consume_token(again, caller_id="dev-agent", tool_call=CALL)),
        await refused(store.for_org("acme").approvals.check_token(again)),
    ]
    approved = await store.approvals.approve(again, "approver-1", "ok")
    other = CALL.model_copy(update={"arguments": {"path": f"{RAW_ARGUMENT}-other"}})
    errors_seen += [
        await refused(store.approvals.approve(again, "approver-2")),
        await refused(store.approvals.consume_token(again, caller_id="dev-agent", tool_call=other)),
    ]
    used = await store.approvals.consume_token(again, caller_id="dev-agent", tool_call=CALL)
    output = make_request(scope="OUTPUT_RELEASE", output_payload={"rows": OUTPUT})
    await store.approvals.issue_token(output, call=CALL)
    errors_seen.append(await refused(store.approvals.consume_token(again, caller_id="dev-agent", tool_call=CALL)))
    errors_seen.append(await refused(store.approvals.issue_token(request, call=CALL)))
    event = make_event(
        request_id="r-1", raw_args_hash=raw_hash, sanitized_args={"path": "[redacted]"}, decision="APPROVAL_REQUIRED"
    )
    await store.audit.write(event)

    trail.token = again
    trail.secrets += [key, wrong_key, rotated.plaintext.get_secret_value(), own_token, token, again, RAW_ARGUMENT]
    pages = [await store.keys.list(), await store.approvals.list_requests(), await store.audit.list_recent()]
    values = [issued, rotated, caller, request, approved, used, event, *pages, *pages[0], *pages[1], *pages[2]]
    values += [store, store.database, store.database.engine, store.settings, store.keys, store.approvals]
    trail.texts["repr"] = "\n".join(f"{value!r} {value!s}" for value in values)
    trail.texts["pages"] = "".join(f"{page.to_dicts()}{page._repr_html_()}" for page in pages)
    trail.texts["errors"] = "".join(errors_seen)
    trail.texts["pickle"] = str(pickle.dumps([*pages[0], *pages[1], *pages[2]]))
    async with store.database.engine.connect() as connection:
        names = (await connection.exec_driver_sql("SELECT name FROM sqlite_master WHERE type = 'table'")).scalars()
        for name in list(names):
            rows = (await connection.exec_driver_sql(f"SELECT * FROM {name}")).all()
            trail.texts[f"table {name}"] = str([tuple(row) for row in rows])


@pytest.fixture
async def trail(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> Trail:
    """Everything a whole run leaves, with all logs at DEBUG, and then an event in a spool."""
    caplog.set_level(logging.DEBUG)
    trail, recorder = Trail(), RecordingNotifier()
    async with fakeredis.FakeAsyncRedis(decode_responses=True) as client:
        async with GatewayStore(f"sqlite:///{tmp_path}/gateway.db", redis=client, plugins=[recorder]) as store:
            await run(store, trail)
            spool = Spool(tmp_path / "other.spool", store.database.engine.url, "identity")
            await spool.add([to_values(encode_event(make_event(sanitized_args={"path": "[redacted]"})))])
            await spool.close()
        trail.redis = {name: str(await client.get(name)) for name in await client.keys()}
    trail.texts["logs"] = caplog.text
    trail.texts["notices"] = "".join(f"{notice!r}{notice.model_dump_json()}" for notice in recorder.notices)
    for path in tmp_path.iterdir():
        trail.texts[f"file {path.name}"] = path.read_bytes().decode("latin-1")
    return trail


async def test_no_secret_is_left_behind(trail: Trail) -> None:
    """Keys, tokens and raw arguments stand in no table, file, log, repr, error, page or notice."""
    assert trail.found() == []
    assert {"logs", "notices", "table api_keys", "table approval_requests", "file gateway.db"} <= trail.texts.keys()
    assert all(trail.texts[name] for name in ("logs", "notices", "table api_keys", "table approval_requests"))
    assert len(trail.secrets) == 7
    # What the tables and the spool may hold is bound to statements, which drivers like to log.
    for held in ("[redacted]", OUTPUT, "$2b$"):
        assert held not in trail.texts["logs"]
        assert held in "".join(trail.texts.values())
    assert "[redacted]" in trail.texts["file other.spool"]
    # The token names its entry in Redis and stands behind its id; no other secret is there.
    holding = [name for name, value in trail.redis.items() if trail.token in name + value]
    assert sorted(name.partition(":")[0] for name in holding) == ["approval", "approval-token"]
    assert trail.token not in trail.redis[f"approval:{trail.token}"]
    assert not [each for each in trail.secrets if each != trail.token and each in str(trail.redis)]
    # The search itself works: what may be seen is found.
    trail.secrets = ["[redacted]", "dev-agent", "r-1", "approver-1"]
    places = {name for name, _ in trail.found()}
    assert {"repr", "pages", "errors", "pickle", "notices", "logs", "table audit_events", "file gateway.db"} <= places


@pytest.mark.parametrize(("password", "pieces"), PASSWORDS.items())
async def test_password_of_the_database_is_not_shown(
    password: str, pieces: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    for url in (f"postgresql://user:{password}@127.0.0.1:1/none", f"oracle://user:{password}@127.0.0.1:1/none"):
        settings = StoreSettings(database_url=url, redis_url="")
        shown = [repr(settings), str(settings)]
        try:
            store = GatewayStore(settings=settings)
        except errors.InvalidUrlError as error:
            shown.append("".join(traceback.format_exception(error)))
        else:
            shown += [repr(store), repr(store.database), repr(store.database.engine), await refused(store.open())]
            shown.append(repr(SyncGatewayStore(settings=settings)))

        assert [text for text in [*shown, caplog.text] for piece in pieces.split("|") if piece in text] == []


@pytest.mark.parametrize(("password", "pieces"), PASSWORDS.items())
async def test_password_of_redis_is_not_shown(
    password: str, pieces: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    for url in (
        f"redis://user:{password}@127.0.0.1:1/0",
        f"rediss://:{password}@127.0.0.1:x/0",
        f"http://:{password}@h",
    ):
        settings = StoreSettings(database_url=f"sqlite:///{tmp_path}/gateway.db", redis_url=url)
        shown = [repr(settings), str(settings)]
        try:
            client = create_redis(url)
        except errors.InvalidUrlError as error:
            shown.append("".join(traceback.format_exception(error)))
        else:
            shown.append(repr(client))
            async with GatewayStore(settings=settings) as store:
                await store.approvals.issue_token(make_request())

        assert [text for text in [*shown, caplog.text] for piece in pieces.split("|") if piece in text] == []


async def test_an_erasure_beside_a_reader_of_the_old_state_is_repeated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SQLite keeps the old pages for the reader; writers go on. Nothing is left in the archive by then."""
    monkeypatch.setattr(erase, "_WAL_TRIES", 3)
    file, archive = tmp_path / "gateway.db", tmp_path / "archive"
    old = clock.utc_now() - timedelta(days=400)
    async with GatewayStore(f"sqlite:///{file}", redis_url="") as store:
        await store.audit.write(make_event(request_id="r-1", timestamp=old))
        # The second under a used id stands under one that holds a hash, and is erased under a third.
        await store.audit.write(make_event(request_id="r-1", timestamp=old, risk_labels=[RAW_ARGUMENT]))
        await store.audit.write(make_event(request_id="newest"))
        await store.evidence.seal()
        [derived] = [each.request_id async for each in store.audit.stream() if each.risk_labels]
        await store.retention.prune(timedelta(days=200), by="ops", archive=archive)
        with closing(sqlite3.connect(file, isolation_level=None)) as reader:
            reader.execute("BEGIN")
            reader.execute("SELECT * FROM audit_events").fetchall()
            erasing = asyncio.create_task(store.retention.erase(derived, reason="GDPR", by="dpo", archive=archive))
            while not erasing.done():
                assert await store.audit.write(make_event()) == "STORED"
                await asyncio.sleep(0.01)
            with pytest.raises(errors.StoreUnavailableError, match="end that, and erase 'r-1~erased-1' again"):
                await erasing
        assert [each.risk_labels for each in Archive(archive).events()] == [[], []]
        assert (await store.retention.erase("r-1~erased-1", reason="GDPR", by="dpo", archive=archive)).archived
