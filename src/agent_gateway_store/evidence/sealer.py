"""Seals events: gives each that is committed the next position in the log, however long transactions stay open."""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any, NamedTuple

from sqlalchemy import BigInteger, Boolean, Integer, Text, insert
from sqlalchemy.ext.asyncio import AsyncConnection

from agent_gateway_store.clock import utc_now
from agent_gateway_store.errors import LogMismatchError, UnreadableRowError
from agent_gateway_store.evidence.notes import SigningKey, checkpoint_note
from agent_gateway_store.evidence.tiles import grown, put_tiles, read_tiles
from agent_gateway_store.evidence.tree import HASH_BYTES, TileHashes, root_from, tiles_for_root
from agent_gateway_store.models.columns import UtcDateTime
from agent_gateway_store.models.evidence import AuditLeaf, Checkpoint, leaf_hash
from agent_gateway_store.storage.database import AnyConnection, Database, dialect_of
from agent_gateway_store.storage.errors import retry_conflicts, sqlstate_of
from agent_gateway_store.storage.identity import known
from agent_gateway_store.storage.statements import Statement, text_statement, typed_text
from agent_gateway_store.telemetry import span

_leaves = AuditLeaf.__table__

SALT_BYTES = 16
"""128 random bits: nobody guesses an event from its leaf."""

# Events of one transaction: on PostgreSQL some 100 ms; on SQLite, where others wait for it, some 20 ms.
_BATCH = {"postgresql": 10_000, "sqlite": 1_000}
# Chosen: events that are hashed in half a millisecond.
_SLICE = 256
# Events that are compared with leaves in one statement: some 50 ms.
_SPAN = 50_000
# Any number that is not used otherwise: the bytes of "agwseal".
LOCK_KEY = int.from_bytes(b"agwseal", "big")
# PostgreSQL: read-only transaction, insufficient privilege. SQLite says "readonly database".
_MAY_NOT_WRITE = ("25006", "42501")
_logger = logging.getLogger("agent_gateway_store.evidence")
_checkpoint_logger = logging.getLogger("agent_gateway_store.checkpoints")

_TYPES: dict[str, Any] = {
    **dict.fromkeys(("p_after", "p_until", "p_since", "p_end", "p_transaction", "p_size"), BigInteger()),
    **dict.fromkeys(("p_limit", "p_span"), Integer()),
    **dict.fromkeys(("p_root_hash", "p_origin", "p_note"), Text()),
    "p_created_at": UtcDateTime(),
}


def _statement(sql: str, **columns: Any) -> Statement:
    return text_statement(sql, _TYPES, **columns)


_TRY_LOCK = _statement(f"SELECT pg_try_advisory_xact_lock({LOCK_KEY}) AS locked", locked=Boolean())
_WAIT_LOCK = _statement(f"SELECT pg_advisory_xact_lock({LOCK_KEY})::text AS locked", locked=Text())
# What began before `oldest` has ended. An id that a crash took back is given again, but none up to that of an event
# which could be seen: so a look ends at the newest of those. `started` tells one server from the next.
SNAPSHOT = _statement(
    """
    SELECT pg_postmaster_start_time()::text AS started, ended,
        (SELECT coalesce(max(transaction_id), 0) + 1 FROM audit_events WHERE transaction_id < oldest) AS since
    FROM (
        SELECT pg_snapshot_xmin(now)::text::bigint AS oldest, pg_snapshot_xmax(now)::text::bigint AS ended
        FROM (SELECT pg_current_snapshot() AS now) AS asked
    ) AS snapshot
    """,
    started=Text(),
    ended=BigInteger(),
    since=BigInteger(),
)
_CHECKPOINT = {"size": BigInteger(), "root_hash": Text(), "origin": Text(), "note": Text(), "created_at": UtcDateTime()}
_LAST_SQL = f"SELECT {', '.join(_CHECKPOINT)} FROM audit_checkpoints ORDER BY size DESC LIMIT 1"  # noqa: S608
_LAST = _statement(_LAST_SQL, **_CHECKPOINT)
_STATE = _statement(
    f"""
    SELECT (SELECT coalesce(max(position), -1) FROM audit_leaves) AS last_position,
        (SELECT identity FROM database_identity) AS identity, last.*
    FROM (SELECT 1) AS once LEFT JOIN ({_LAST_SQL}) AS last ON true
    """,  # noqa: S608  names of our own
    last_position=BigInteger(),
    identity=Text(),
    **_CHECKPOINT,
)
SPAN_END = _statement(
    """
    SELECT max(id) AS until, count(*) AS events
    FROM (SELECT id FROM audit_events WHERE id > :p_after ORDER BY id LIMIT :p_span) AS span
    """,
    until=BigInteger(),
    events=BigInteger(),
)
# The bounds of the events once more for the leaves: no planner would draw that conclusion.
_COMPARE_SQL = """
    SELECT event.id, event.content_hash FROM audit_events AS event
    WHERE event.id > :p_after AND event.id <= :p_until AND NOT EXISTS (
        SELECT 1 FROM audit_leaves AS leaf
        WHERE leaf.event_id = event.id AND leaf.event_id > :p_after AND leaf.event_id <= :p_until
    )
    ORDER BY event.id LIMIT :p_limit
"""
# Arrays, as an object for each row makes Python look for garbage everywhere: that took a quarter of the time.
_ARRAYS = "SELECT coalesce(array_agg(id), '{}') AS ids, coalesce(array_agg(content_hash), '{}') AS hashes"
COMPARE = Statement(
    lambda dialect: typed_text(
        f"{_ARRAYS} FROM ({_COMPARE_SQL}) AS found" if dialect == "postgresql" else _COMPARE_SQL, _TYPES
    )
)
# Events of a dump may hold transaction ids that this server has not given out yet: those are beyond `p_end`.
RECENT = _statement(
    f"""
    {_ARRAYS}, max(transaction_id) AS newest FROM (
        SELECT event.id, event.content_hash, event.transaction_id FROM audit_events AS event
        WHERE event.transaction_id >= :p_since AND event.transaction_id < :p_end
            AND (event.transaction_id, event.id) > (:p_transaction, :p_after)
            AND NOT EXISTS (SELECT 1 FROM audit_leaves AS leaf WHERE leaf.event_id = event.id)
        ORDER BY event.transaction_id, event.id LIMIT :p_limit
    ) AS found
    """  # noqa: S608  names of our own
)
_INSERT_CHECKPOINT = _statement(
    """
    INSERT INTO audit_checkpoints (size, root_hash, origin, note, created_at)
    VALUES (:p_size, :p_root_hash, :p_origin, :p_note, :p_created_at)
    RETURNING size
    """,
    size=BigInteger(),
)


class _Look(NamedTuple):
    """How far a sealer has looked for events without a leaf."""

    # Up to which id it has compared events with leaves; at first before every id that a row can hold.
    after: int = -(2**63)
    # Whether that has come to the end; on PostgreSQL it then goes by transactions.
    is_compared: bool = False
    # Transactions with a lower id are sealed, or gone; as long as the server of this start runs.
    since: int = 0
    started: str = ""


class _Scan(NamedTuple):
    """A look at the events of recent transactions, which takes several batches: what was found last, and its bounds."""

    since: int
    end: int
    transaction: int = 0
    id: int = 0


class _Found(NamedTuple):
    """Events without a leaf, their ids and hashes, and how far that leads."""

    ids: Sequence[int]
    hashes: Sequence[str]
    look: _Look
    scan: _Scan | None = None
    is_last: bool = False


async def last_checkpoint(connection: AnyConnection) -> Checkpoint | None:
    """Return the checkpoint of the largest size, or None. Raises LogMismatchError if it cannot be read."""
    with readable_log():
        row = await _LAST.first(connection, {})
        return None if row is None else Checkpoint(**row)


@contextmanager
def readable_log() -> Iterator[None]:
    """Raise LogMismatchError for what the tables of the log can be made to hold and no sealer writes."""
    try:
        yield
    except (ValueError, TypeError, OverflowError, UnreadableRowError) as exc:
        raise LogMismatchError("The log holds what cannot be read: run `gateway-store evidence verify`.") from exc


class Sealer:
    """Seals what is committed, one batch in one transaction after the other.

    At most one sealer works at a time in all processes; killed anywhere it leaves no gap, because the positions of a
    batch are committed together, and no fork, because a position and an event are each taken once. Events of
    transactions that were open when it looked are found later by the ids of those transactions; where these cannot be
    trusted, at its start and after a restart of the server, every event is compared with the leaves.

    Args:
        database: Where the log is.
        origin: AUDIT_LOG_ORIGIN, to which the database's identity is added.
        signer: Signs the checkpoints; None: they are not signed.
        publish: Receives each new checkpoint once it is committed.
    """

    def __init__(
        self,
        database: Database,
        *,
        origin: str,
        signer: SigningKey | None,
        publish: Callable[[Checkpoint], None] = lambda _checkpoint: None,
    ) -> None:
        self._database, self._origin, self._signer, self._publish = database, origin, signer, publish
        self._look = _Look()
        self.open()

    def open(self) -> None:
        """Serve the event loop in which the store opens: a lock belongs to one."""
        self._one_at_a_time = asyncio.Lock()

    async def seal(self, *, wait: bool = True, anew: bool = False) -> Checkpoint | None:
        """Do what `EvidenceManager.seal` says.

        Args:
            wait: False returns None at once where another sealer is at work.
            anew: Compare every event with the leaves, as at the first time.
        """
        async with self._one_at_a_time:
            if anew:
                self._look = _Look()
            scan: _Scan | None = None
            loop = asyncio.get_running_loop()
            while True:
                started = loop.time()
                sealed = await self._batch(scan, wait=wait)
                if sealed is None:
                    return None
                found, checkpoint = sealed
                self._look, scan = found.look, found.scan
                if found.ids and checkpoint is not None:
                    _checkpoint_logger.info("%s", checkpoint.note.rstrip("\n"))
                    self._publish(checkpoint)
                if found.is_last:
                    return checkpoint
                if self._database.dialect == "sqlite":
                    # Writers ask for its one lock now and then, and would hardly ever find it free.
                    await asyncio.sleep(loop.time() - started)

    @retry_conflicts
    async def _batch(self, scan: _Scan | None, *, wait: bool) -> tuple[_Found, Checkpoint | None] | None:
        """Seal some events, and write the checkpoint over them in the same transaction."""
        async with self._database.connection("transaction") as connection:
            if dialect_of(connection) == "postgresql":
                lock = await (_WAIT_LOCK if wait else _TRY_LOCK).one(connection, {})
                if lock["locked"] is False:
                    return None
            with readable_log():
                state = await _STATE.one(connection, {})
                last = Checkpoint(**{name: state[name] for name in _CHECKPOINT}) if state["size"] is not None else None
                size = last.size if last else 0
                edge = await read_tiles(connection, tiles_for_root(size))
            is_whole = state["last_position"] == size - 1
            if not is_whole or (last is not None and _root(edge, size).hex() != last.root_hash):
                raise _mismatch(f"does not agree with its last checkpoint, over {size:,} events")
            found = await self._unsealed(connection, scan)
            if not found.ids:
                return found, last
            end = size + len(found.ids)
            salts, leaves, tiles = await _hashed(edge, size, found.hashes)
            root = _root(edge.with_tiles(tiles), end)
            await _insert(connection, zip(range(size, end), found.ids, salts, leaves, strict=True))
            await put_tiles(connection, tiles)
            return found, await self._checkpoint(connection, end, root, known(state["identity"]))

    async def _unsealed(self, connection: AnyConnection, scan: _Scan | None) -> _Found:
        """Return events without a leaf, and how far that leads."""
        look, limit = self._look, _BATCH[dialect_of(connection)]
        if dialect_of(connection) == "sqlite":
            # Ids are in the order of commits there.
            found = await _compared(connection, look, limit)
            return found._replace(is_last=found.look.is_compared)
        if scan is None:
            # Before the events are looked for: what this snapshot does not know is looked for the next time.
            now = await SNAPSHOT.one(connection, {})
            if now["started"] != look.started:
                look = _Look(since=now["since"], started=now["started"])
            if not look.is_compared:
                return await _compared(connection, look, limit)
            scan = _Scan(now["since"], now["ended"])
        values = {"p_since": look.since, "p_end": scan.end, "p_transaction": scan.transaction, "p_after": scan.id}
        ((ids, hashes, newest),) = await RECENT.tuples(connection, values | {"p_limit": limit})
        if len(ids) < limit:
            return _Found(ids, hashes, look._replace(since=max(look.since, scan.since)), is_last=True)
        return _Found(ids, hashes, look, scan._replace(id=ids[-1], transaction=newest))

    async def _checkpoint(self, connection: AnyConnection, size: int, root: bytes, identity: str) -> Checkpoint:
        origin = f"{self._origin}/{identity}"
        note = checkpoint_note(origin, size, root, self._signer)
        made = Checkpoint(origin=origin, size=size, root_hash=root.hex(), note=note, created_at=utc_now())
        await _INSERT_CHECKPOINT.rows(connection, {f"p_{name}": value for name, value in made.model_dump().items()})
        return made


async def _compared(connection: AnyConnection, look: _Look, limit: int) -> _Found:
    """Compare the next events with the leaves, by their ids."""
    span = await SPAN_END.one(connection, {"p_after": look.after, "p_span": _SPAN})
    if span["until"] is None:
        return _Found((), (), look._replace(is_compared=True))
    values = {"p_after": look.after, "p_until": span["until"], "p_limit": limit}
    rows = await COMPARE.tuples(connection, values)
    is_sqlite = dialect_of(connection) == "sqlite"
    ids, hashes = ([row[0] for row in rows], [row[1] for row in rows]) if is_sqlite else rows[0]
    is_full = len(ids) == limit
    after = ids[-1] if is_full else span["until"]
    return _Found(ids, hashes, look._replace(after=after, is_compared=not is_full and span["events"] < _SPAN))


def _root(tiles: TileHashes, size: int) -> bytes:
    try:
        return root_from(tiles, size)
    except LookupError:
        raise _mismatch("lacks a hash") from None


def _mismatch(what: str) -> LogMismatchError:
    return LogMismatchError(f"The log {what}, so nothing is added to it: run `gateway-store evidence verify`.")


async def _hashed(
    edge: TileHashes, size: int, hashes: Sequence[str]
) -> tuple[list[bytes], list[bytes], dict[tuple[int, int], bytes]]:
    """Return salts, leaves and tiles of events that follow the first `size` ones; lets others go on in between."""
    random = os.urandom(SALT_BYTES * len(hashes))
    salts = [random[at : at + SALT_BYTES] for at in range(0, len(random), SALT_BYTES)]
    leaves: list[bytes] = []
    tiles: dict[tuple[int, int], bytes] = {}
    for start in range(0, len(hashes), _SLICE):
        part = slice(start, start + _SLICE)
        new = [*map(leaf_hash, salts[part], map(_content, hashes[part]))]
        tiles |= grown(edge.with_tiles(tiles), size + start, new)
        leaves += new
        # Not in a thread, which would take the interpreter from the event loop for five milliseconds at a time.
        await asyncio.sleep(0)
    return salts, leaves, tiles


def _content(text: str) -> bytes:
    try:
        content = bytes.fromhex(text)
    except (TypeError, ValueError):
        content = b""
    # Somebody wrote another row past the store. It keeps nobody else's event waiting, and `verify` names it.
    return content if len(content) == HASH_BYTES else bytes(HASH_BYTES)


async def _insert(connection: AnyConnection, leaves: Iterable[tuple[int, int, bytes, bytes]]) -> None:
    names = ("position", "event_id", "salt", "leaf_hash")
    if isinstance(connection, AsyncConnection):
        await connection.execute(insert(_leaves), [dict(zip(names, leaf, strict=True)) for leaf in leaves])
    else:
        await connection.driver.copy_records_to_table(_leaves.name, records=leaves, columns=names)


class BackgroundSealer:
    """Seals at intervals while a store is open, from its first write on; what goes wrong is logged, once for each kind.

    Args:
        sealer: Seals.
        every_s: Seconds between two looks; 0: never.
        has_written: Whether this store has written an event.
    """

    def __init__(self, sealer: Sealer, *, every_s: float, has_written: Callable[[], bool]) -> None:
        self._sealer, self._every_s, self._has_written = sealer, every_s, has_written
        self._task: asyncio.Task[None] | None = None
        self._idle: asyncio.Event

    def start(self) -> None:
        """Begin, unless the interval is 0."""
        if self._every_s > 0 and self._task is None:
            self._idle = asyncio.Event()
            self._idle.set()
            self._task = asyncio.get_running_loop().create_task(self._run())

    async def stop(self, timeout_s: float) -> None:
        """End within `timeout_s` seconds; a seal under way gets three quarters of them to finish."""
        if self._task is None:
            return
        with suppress(TimeoutError):
            async with asyncio.timeout(timeout_s * 3 / 4):
                await self._idle.wait()
        task, self._task = self._task, None
        task.cancel()
        # A statement of SQLite that waits for another process cannot be stopped.
        await asyncio.wait([task], timeout=timeout_s / 4)

    async def _run(self) -> None:
        said: object = None
        while True:
            await asyncio.sleep(self._every_s)
            if not self._has_written():
                continue
            self._idle.clear()
            try:
                with span("log.seal", is_root=True):
                    await self._sealer.seal(wait=False)
                said = None
            except Exception as exc:
                if may_not_write(exc):
                    # A role that only reads, or a standby, which may become the primary: sealing is others' work.
                    _logger.debug("This store does not seal: %s", exc)
                elif said != (said := (type(exc), str(exc))):
                    _logger.error("Sealing failed, and is tried again: %s", exc)
            finally:
                self._idle.set()


def may_not_write(exc: BaseException) -> bool:
    """True for the error of a role, or of a server, that only reads."""
    return sqlstate_of(exc) in _MAY_NOT_WRITE or "readonly database" in str(exc.__cause__)
