"""Whoever owns the database changes the log past its triggers: each change is seen and named, and nothing else is."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Callable
from datetime import timedelta
from hashlib import sha256
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
from sqlalchemy import Table, delete, insert, select, update
from sqlalchemy.ext.asyncio import AsyncConnection

from agent_gateway_store import AuditEvent, Decision, GatewayStore, StoreSettings
from agent_gateway_store.audit.document import COLUMNS, hash_of_stored
from agent_gateway_store.audit.doors import DOOR_FIELDS
from agent_gateway_store.audit.record import encode_event, to_values
from agent_gateway_store.audit.selects import select_events
from agent_gateway_store.models.audit import ExecutionStatus, OutputDecision, RedactionFlag
from agent_gateway_store.models.evidence import Checkpoint, FindingKind, identity_table, leaf_hash
from agent_gateway_store.models.tables import metadata
from agent_gateway_store.storage.append_only import open_door
from builders import make_event
from proofs.hostile import Hostile
from tampering import put_back, sealed_rows, triggers_off

pytestmark = pytest.mark.system

SIZE = 300
EVENTS, LEAVES, TILES, CHECKPOINTS = (
    metadata.tables[f"audit_{name}"] for name in ("events", "leaves", "tiles", "checkpoints")
)
SETTINGS = StoreSettings(audit_seal_seconds=0)
Change = Callable[["Log", AsyncConnection], Any]


def door_event(tool: str, **said: Any) -> AuditEvent:
    """What a door says that it did."""
    return make_event(tool_name=tool, sanitized_args=said, **DOOR_FIELDS)


class Log:
    """A sealed log, a copy of its tables, and a change of it.

    Attributes:
        expected: The kinds of findings that the change must give, and no other.
        position: The position that must be among them; None: any.
    """

    def __init__(self, store: GatewayStore, kept: list[Checkpoint], seed: int) -> None:
        self.store, self.kept, self.chance = store, kept, random.Random(seed)
        self.copies: dict[Table, list[dict[str, Any]]] = {}
        self.expected: set[FindingKind] = set()
        self.position: int | None = None

    def leaf(self) -> dict[str, Any]:
        """One of them, from here on the position that must be named."""
        self.position = self.chance.randrange(SIZE)
        return next(leaf for leaf in self.copies[LEAVES] if leaf["position"] == self.position)

    def event(self) -> dict[str, Any]:
        event_id = self.leaf()["event_id"]
        return next(event for event in self.copies[EVENTS] if event["id"] == event_id)


def other_value(log: Log, name: str, value: Any) -> Any:
    """Another value that the column takes."""
    enums = {"decision": Decision, "execution_status": ExecutionStatus, "output_decision": OutputDecision}
    if name in enums:
        return log.chance.choice([each for each in enums[name] if each != value])
    if name == "timestamp":
        return value + timedelta(microseconds=log.chance.choice((1, 10**6, 10**10)))
    if name == "redaction_flags":
        return [*value, RedactionFlag(field="x", reason="Y")]
    if name == "risk_labels":
        return [*value, "X"]
    if name in ("sanitized_args", "extra"):
        return {**value, "x": log.chance.random()}
    if name == "approval_id":
        return uuid4()
    if name in ("latency_ms", "risk_score"):
        return value + 1
    if name in ("raw_args_hash", "content_hash"):
        return sha256(value.encode()).hexdigest()
    return "x" if value is None else log.chance.choice([f"{value}x", value.swapcase() + " "])


async def a_column(log: Log, connection: AsyncConnection) -> None:
    event, name = log.event(), log.chance.choice(COLUMNS)
    changed = {name: other_value(log, name, event[name])}
    await connection.execute(update(EVENTS).where(EVENTS.c.id == event["id"]).values(changed))
    log.expected = {FindingKind.ALTERED}


async def an_event_gone(log: Log, connection: AsyncConnection) -> None:
    await connection.execute(delete(EVENTS).where(EVENTS.c.id == log.event()["id"]))
    log.expected = {FindingKind.MISSING}


async def an_event_under_another_id(log: Log, connection: AsyncConnection) -> None:
    await connection.execute(update(EVENTS).where(EVENTS.c.id == log.event()["id"]).values(id=10**6))
    log.expected = {FindingKind.MISSING}


async def an_event_and_its_leaf_renumbered(log: Log, connection: AsyncConnection) -> None:
    """Sealed still, and found by no reader that goes on from an id."""
    event_id, other = log.event()["id"], log.chance.choice((0, -1, -(2**63)))
    await connection.execute(update(EVENTS).where(EVENTS.c.id == event_id).values(id=other))
    await connection.execute(update(LEAVES).where(LEAVES.c.event_id == event_id).values(event_id=other))
    log.expected = {FindingKind.ALTERED}


async def two_events_swapped(log: Log, connection: AsyncConnection) -> None:
    one, other = log.leaf(), log.leaf()
    first, second = one["position"], other["position"]
    for position, event_id in ((first, -1), (second, one["event_id"]), (first, other["event_id"])):
        await connection.execute(update(LEAVES).where(LEAVES.c.position == position).values(event_id=event_id))
    log.expected = {FindingKind.MOVED} if one != other else set()


async def two_leaves_swapped(log: Log, connection: AsyncConnection) -> None:
    one, other = log.chance.sample(log.copies[LEAVES], 2)
    first, second = one["event_id"], other["event_id"]
    for event_id, position in ((first, -1), (second, one["position"]), (first, other["position"])):
        await connection.execute(update(LEAVES).where(LEAVES.c.event_id == event_id).values(position=position))
    log.expected = {FindingKind.BAD_TREE, FindingKind.FORKED}


async def a_leaf_gone(log: Log, connection: AsyncConnection) -> None:
    await connection.execute(delete(LEAVES).where(LEAVES.c.position == log.leaf()["position"]))
    log.expected = {FindingKind.MISSING, FindingKind.BAD_TREE, FindingKind.FORKED, FindingKind.TRUNCATED}


async def a_leaf_added(log: Log, connection: AsyncConnection) -> None:
    made = {**log.leaf(), "position": log.chance.choice((SIZE, -1, SIZE + 7)), "event_id": 10**6}
    await connection.execute(insert(LEAVES), [made])
    log.expected, log.position = {FindingKind.BAD_TREE}, None


async def a_salt(log: Log, connection: AsyncConnection) -> None:
    salt = log.chance.choice((b"", b"x" * 16, None))
    await connection.execute(update(LEAVES).where(LEAVES.c.position == log.leaf()["position"]).values(salt=salt))
    log.expected = {FindingKind.ALTERED}


async def a_leaf_hash(log: Log, connection: AsyncConnection) -> None:
    forged = log.chance.choice((bytes(32), b"", sha256(b"x").digest()))
    await connection.execute(update(LEAVES).where(LEAVES.c.position == log.leaf()["position"]).values(leaf_hash=forged))
    log.expected = {FindingKind.ALTERED, FindingKind.BAD_TREE, FindingKind.FORKED}


async def an_event_with_its_leaf(log: Log, connection: AsyncConnection) -> None:
    """Everything about it fits; the tree above does not."""
    event = log.event()
    leaf = next(each for each in log.copies[LEAVES] if each["position"] == log.position)
    forged_event = {name: event[name] for name in COLUMNS} | {"tool_name": "harmless", "content_hash": None}
    values = to_values(encode_event(AuditEvent(**forged_event)))
    await connection.execute(update(EVENTS).where(EVENTS.c.id == event["id"]).values(values))
    forged = leaf_hash(leaf["salt"], values["content_hash"])
    await connection.execute(update(LEAVES).where(LEAVES.c.position == log.position).values(leaf_hash=forged))
    log.expected, log.position = {FindingKind.BAD_TREE, FindingKind.FORKED}, None


async def the_end_cut(log: Log, connection: AsyncConnection) -> None:
    """Leaves, or events and leaves, or everything behind an older checkpoint."""
    first = log.leaf()["position"]
    how = log.chance.randrange(3)
    gone = [leaf["event_id"] for leaf in log.copies[LEAVES] if leaf["position"] >= first]
    if how:
        await connection.execute(delete(EVENTS).where(EVENTS.c.id.in_(gone)))
    await connection.execute(delete(LEAVES).where(LEAVES.c.position >= first))
    if how == 2:
        await connection.execute(delete(CHECKPOINTS).where(CHECKPOINTS.c.size > first))
    log.expected, log.position = {FindingKind.TRUNCATED, FindingKind.BAD_TREE}, None


async def dressed_up(log: Log, connection: AsyncConnection) -> None:
    """A door that was not opened: its event is not sealed, is about another row, or is of another server."""
    event, tool = log.event(), log.chance.choice(("audit.prune", "audit.erase"))
    said: dict[str, Any] = {"positions": [[log.position, log.position]], "position": log.position}
    if tool == "audit.prune":
        await connection.execute(delete(EVENTS).where(EVENTS.c.id == event["id"]))
    else:
        blank = {"deterministic_rationale": "", "content_hash": None}
        await connection.execute(update(EVENTS).where(EVENTS.c.id == event["id"]).values(blank))
        await connection.execute(update(LEAVES).where(LEAVES.c.position == log.position).values(salt=None))
        said["row_sha256"] = (await stored(connection, event["id"]))[0]
    await connection.execute(insert(EVENTS), [to_values(encode_event(door_event(tool, **said)))])
    log.expected = {FindingKind.MISSING if tool == "audit.prune" else FindingKind.ALTERED}


async def a_tile(log: Log, connection: AsyncConnection) -> None:
    (tile,) = log.copies[TILES]
    hashes = bytearray(tile["hashes"])
    match log.chance.randrange(3):
        case 0:
            hashes[log.chance.randrange(len(hashes))] ^= 1
        case 1:
            hashes += bytes(log.chance.choice((1, 32)))
        case _:
            hashes = hashes[: log.chance.randrange(len(hashes))]
    await connection.execute(update(TILES).values(hashes=bytes(hashes)))
    log.expected, log.position = {FindingKind.BAD_TREE}, None


async def a_tile_gone_or_added(log: Log, connection: AsyncConnection) -> None:
    if log.chance.random() < 0.5:
        await connection.execute(delete(TILES))
    else:
        place = log.chance.choice(((1, 1), (2, 0), (0, 0), (1, -1)))
        await connection.execute(insert(TILES), [{"level": place[0], "index": place[1], "hashes": bytes(32)}])
    log.expected, log.position = {FindingKind.BAD_TREE}, None


async def a_checkpoint(log: Log, connection: AsyncConnection) -> None:
    which = log.chance.choice(log.copies[CHECKPOINTS])
    name = log.chance.choice(("root_hash", "origin", "note", "size"))
    value = {"root_hash": "0" * 64, "origin": "x", "note": "x", "size": which["size"] + 1}[name]
    await connection.execute(update(CHECKPOINTS).where(CHECKPOINTS.c.size == which["size"]).values({name: value}))
    log.expected, log.position = {FindingKind.BAD_SIGNATURE, FindingKind.FORKED, FindingKind.TRUNCATED}, None


async def a_checkpoint_gone(log: Log, connection: AsyncConnection) -> None:
    newest = CHECKPOINTS.c.size == SIZE
    await connection.execute(delete(CHECKPOINTS).where(newest) if log.chance.randrange(2) else delete(CHECKPOINTS))
    log.expected, log.position = {FindingKind.BAD_TREE, FindingKind.TRUNCATED, FindingKind.FORKED}, None


CHANGES: list[Change] = [
    *[a_column] * 4, an_event_gone, an_event_under_another_id, an_event_and_its_leaf_renumbered,
    two_events_swapped, two_leaves_swapped, a_leaf_gone,
    a_leaf_added, a_salt, a_leaf_hash, an_event_with_its_leaf, the_end_cut, dressed_up, a_tile, a_tile_gone_or_added,
    a_checkpoint, a_checkpoint_gone,
]  # fmt: skip


async def stored(connection: AsyncConnection, event_id: int) -> tuple[str, tuple[Any, ...]]:
    """The hash of a row as it stands, computed from its columns."""
    statement = select_events(connection.dialect.name, ()).where(EVENTS.c.id == event_id)
    compiled = statement.compile(dialect=connection.dialect, compile_kwargs={"literal_binds": True})
    row = tuple((await connection.exec_driver_sql(str(compiled))).one())
    return hash_of_stored(row[1:]), row


@pytest.fixture
async def log(database_url: str) -> AsyncIterator[Log]:
    async with GatewayStore(database_url, redis_url="", settings=SETTINGS) as store:
        kept = []
        for size in (100, SIZE):
            before = 0 if size == 100 else 100
            await store.audit.write_many([make_event(risk_labels=["A"], extra={"n": n}) for n in range(before, size)])
            kept += [await store.evidence.seal()]
        made = Log(store, [each for each in kept if each], 20261129)
        made.copies = await sealed_rows(store.database.engine)
        yield made


@pytest.mark.parametrize("rounds", [2 * len(CHANGES), pytest.param(10_000, marks=pytest.mark.slow)])
async def test_each_change_is_seen_and_named(log: Log, rounds: int) -> None:
    """With the checkpoints that were kept; taken back, the log verifies."""
    engine = log.store.database.engine
    for number in range(rounds):
        change = CHANGES[number % len(CHANGES)]
        log.expected, log.position = set(), None
        async with engine.begin() as connection, triggers_off(connection):
            await change(log, connection)
        found = await log.store.evidence.verify(against=log.kept)
        kinds = {each.kind for each in found.findings}
        told = (number, change.__name__, found.findings[:3])
        assert found.ok is not bool(log.expected), told
        assert bool(kinds) is bool(log.expected), told
        assert kinds <= log.expected, told
        if log.position is not None and log.expected:
            assert log.position in {each.position for each in found.findings}, told
        async with engine.begin() as connection, triggers_off(connection):
            await put_back(connection, log.copies)
    found = await log.store.evidence.verify(against=log.kept)
    assert (found.ok, found.checked, found.anchored) == (True, SIZE, SIZE)


async def test_an_event_below_every_id_is_sealed_and_named(log: Log, database_url: str) -> None:
    """By whoever wrote it past the store: `seal` passes over no event, and followers never see this one."""
    event = to_values(encode_event(make_event(request_id="forged")))
    async with log.store.database.engine.begin() as connection, triggers_off(connection):
        await connection.execute(insert(EVENTS), [event | {"id": -5}])
    found = await log.store.evidence.verify(against=log.kept)
    assert (found.unsealed, [(each.event_id, each.request_id) for each in found.findings]) == (1, [(-5, "forged")])

    async with GatewayStore(database_url, redis_url="", settings=SETTINGS) as store:
        sealed = await store.evidence.seal()
        found = await store.evidence.verify(against=log.kept)
    assert sealed is not None
    assert sealed.size == SIZE + 1
    assert (found.unsealed, found.checked) == (0, SIZE + 1)
    assert [(each.kind, each.position) for each in found.findings] == [(FindingKind.ALTERED, SIZE)]


async def test_history_that_never_was_is_named(log: Log) -> None:
    """`db restored` makes events that are there history; above all of them it hides new ones from followers."""
    newest = max(event["id"] for event in log.copies[EVENTS])
    for history_id in (None, 0, newest, newest + 1):
        async with log.store.database.engine.begin() as connection:
            await connection.execute(update(identity_table).values(history_id=history_id))
        found = await log.store.evidence.verify(against=log.kept)
        expected = [FindingKind.ALTERED] if history_id == newest + 1 else []
        assert [each.kind for each in found.findings] == expected, history_id


async def prune(store: GatewayStore, first: int, last: int) -> None:
    """Remove events as the door does: their leaves stay, and a sealed event says which they were."""
    gone = select(LEAVES.c.event_id).where(LEAVES.c.position.between(first, last))
    async with store.database.engine.begin() as connection, open_door(connection):
        await connection.execute(delete(EVENTS).where(EVENTS.c.id.in_(gone)))
    await store.audit.write(door_event("audit.prune", positions=[[first, last]]))


async def oldest(store: GatewayStore, count: int) -> list[int]:
    """Return the positions of the oldest events that are not a door's, which are never pruned."""
    joined = LEAVES.join(EVENTS, EVENTS.c.id == LEAVES.c.event_id)
    found = (
        select(LEAVES.c.position).select_from(joined).where(EVENTS.c.tool_name.not_in(("audit.prune", "audit.erase")))
    )
    async with store.database.read() as connection:
        return list((await connection.execute(found.order_by(LEAVES.c.position).limit(count))).scalars())


async def erase(store: GatewayStore, position: int) -> None:
    """Blank an event as the door does, and say what its row is like now."""
    async with store.database.engine.begin() as connection, open_door(connection):
        found = await connection.execute(select(LEAVES.c.event_id).where(LEAVES.c.position == position))
        event_id = found.scalar_one()
        blank: dict[str, Any] = {
            "sanitized_args": {},
            "risk_labels": [],
            "deterministic_rationale": "",
            "content_hash": None,
        }
        await connection.execute(update(EVENTS).where(EVENTS.c.id == event_id).values(blank))
        await connection.execute(update(LEAVES).where(LEAVES.c.position == position).values(salt=None))
        digest, _ = await stored(connection, event_id)
    await store.audit.write(door_event("audit.erase", position=position, row_sha256=digest))


async def test_what_the_doors_did_is_no_finding(log: Log) -> None:
    """As sealed events say; beyond their word it is."""
    store = log.store
    await prune(store, 0, 49)
    await prune(store, 40, 60)
    await erase(store, 70)
    await store.evidence.seal()
    found = await store.evidence.verify(against=log.kept)
    assert (found.ok, found.pruned, found.erased, found.checked) == (True, 61, 1, SIZE - 62 + 3)

    async with store.database.engine.begin() as connection, triggers_off(connection):
        await connection.execute(update(EVENTS).where(EVENTS.c.deterministic_rationale == "").values(tool_name="x"))
    found = await store.evidence.verify(against=log.kept)
    assert [(each.kind, each.position) for each in found.findings] == [(FindingKind.ALTERED, 70)]


async def write_reused(store: GatewayStore, chance: random.Random) -> None:
    count = chance.randrange(20, 200)
    await store.audit.write_many([make_event(request_id=f"r-{chance.randrange(99)}") for _ in range(count)])


@pytest.mark.parametrize("logs", [2, pytest.param(500, marks=pytest.mark.slow)])
async def test_an_untouched_log_gives_no_alarm(
    database_url: str, empty_database: Callable[[], None], tmp_path: Path, logs: int
) -> None:
    """Of any size: hostile events, reused ids, events from a file, writers beside the sealer, what the doors did."""
    chance, hostile = random.Random(logs), Hostile(logs)
    for number in range(logs):
        empty_database()
        async with GatewayStore(database_url, redis_url="", settings=SETTINGS) as store:
            for _ in range(1 + number % 4):
                await asyncio.gather(
                    write_reused(store, chance),
                    *(store.audit.write(hostile.event()) for _ in range(20)),
                    store.evidence.seal(),
                )
                await store.audit.export(tmp_path / "events.jsonl", overwrite=True)
                await store.audit.import_file(tmp_path / "events.jsonl")
                await store.evidence.seal()
                if number % 2:
                    *pruned, erased = await oldest(store, 5)
                    for position in pruned:
                        await prune(store, position, position)
                    await erase(store, erased)
            last = await store.evidence.seal()
            assert last is not None
            found = await store.evidence.verify(against=[last], keys=[])
            assert (found.ok, found.unsealed, found.anchored) == (True, 0, last.size), found.findings[:3]
