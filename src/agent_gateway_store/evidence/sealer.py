"""Seals events: gives each that is committed the next position in the log, however long transactions stay open."""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import asyncpg
from sqlalchemy import BigInteger, Boolean, Integer, Text, column, insert
from sqlalchemy.ext.asyncio import AsyncConnection

from agent_gateway_store.clock import utc_now
from agent_gateway_store.errors import GatewayStoreError, LogMismatchError
from agent_gateway_store.evidence.notes import SigningKey, checkpoint_note
from agent_gateway_store.evidence.tiles import append, read_tiles
from agent_gateway_store.evidence.tree import leaf_hash, root_from, tiles_for_root
from agent_gateway_store.models.columns import UtcDateTime
from agent_gateway_store.models.evidence import AuditCheckpoint, AuditLeaf, Checkpoint
from agent_gateway_store.storage.database import AnyConnection, Database
from agent_gateway_store.storage.errors import retry_conflicts, sqlstate_of
from agent_gateway_store.storage.identity import known
from agent_gateway_store.storage.statements import Statement, typed_text

_leaves = AuditLeaf.__table__  # type: ignore[attr-defined]
_checkpoints = AuditCheckpoint.__table__  # type: ignore[attr-defined]

SALT_BYTES = 16
"""128 random bits: nobody guesses an event from its leaf."""

# Events of one transaction: on PostgreSQL some 100 ms; on SQLite, where others wait for it, some 20 ms.
_BATCH = {"postgresql": 5_000, "sqlite": 1_000}
# Any number that is not used otherwise: the bytes of "agwseal".
_LOCK_KEY = int.from_bytes(b"agwseal", "big")
# PostgreSQL: read-only transaction, insufficient privilege. SQLite says "readonly database".
_MAY_NOT_WRITE = ("25006", "42501")
_logger = logging.getLogger("agent_gateway_store.evidence")
_checkpoint_logger = logging.getLogger("agent_gateway_store.checkpoints")

_TYPES: dict[str, Any] = {
    "p_after": BigInteger(),
    "p_limit": Integer(),
    "p_xmin": BigInteger(),
    "p_size": BigInteger(),
    "p_root_hash": Text(),
    "p_origin": Text(),
    "p_note": Text(),
    "p_created_at": UtcDateTime(),
}


def _statement(sql: str, **columns: Any) -> Statement:
    return Statement(typed_text(sql, _TYPES, tuple(column(name, kind) for name, kind in columns.items())))


_TRY_LOCK = _statement(f"SELECT pg_try_advisory_xact_lock({_LOCK_KEY}) AS locked", locked=Boolean())
_WAIT_LOCK = _statement(f"SELECT pg_advisory_xact_lock({_LOCK_KEY})::text AS locked", locked=Text())
# The start of the server: transaction ids that a crash took back are given out again afterwards.
_SNAPSHOT = _statement(
    """
    SELECT pg_snapshot_xmin(pg_current_snapshot())::text::bigint AS xmin, pg_postmaster_start_time()::text AS started
    """,
    xmin=BigInteger(),
    started=Text(),
)
_STATE = _statement(
    """
    SELECT (SELECT coalesce(max(position), -1) + 1 FROM audit_leaves) AS size,
        (SELECT identity FROM database_identity) AS identity
    """,
    size=BigInteger(),
    identity=Text(),
)
_UNSEALED = """
    SELECT event.id, event.content_hash FROM audit_events AS event
    WHERE {condition} AND NOT EXISTS (SELECT 1 FROM audit_leaves AS leaf WHERE leaf.event_id = event.id)
    ORDER BY {order} LIMIT :p_limit
    """
_WALK = _statement(
    _UNSEALED.format(condition="event.id > :p_after", order="event.id"), id=BigInteger(), content_hash=Text()
)
_RECENT = _statement(
    _UNSEALED.format(condition="event.transaction_id >= :p_xmin", order="event.transaction_id, event.id"),
    id=BigInteger(),
    content_hash=Text(),
)
_LAST = _statement(
    "SELECT size, root_hash, origin, note, created_at FROM audit_checkpoints ORDER BY size DESC LIMIT 1",
    size=BigInteger(),
    root_hash=Text(),
    origin=Text(),
    note=Text(),
    created_at=UtcDateTime(),
)
_INSERT_CHECKPOINT = _statement(
    """
    INSERT INTO audit_checkpoints (size, root_hash, origin, note, created_at)
    VALUES (:p_size, :p_root_hash, :p_origin, :p_note, :p_created_at)
    RETURNING size
    """,
    size=BigInteger(),
)


class Progress(NamedTuple):
    """How far this sealer has looked.

    Attributes:
        after: Up to which event id it has compared events with leaves, one by one.
        is_compared: Whether that has come to the end.
        xmin: Transactions with a lower id were finished when it looked last. PostgreSQL.
        started: The start of the server in which that is true.
    """

    after: int = 0
    is_compared: bool = False
    xmin: int = 0
    started: str = ""


class _Batch(NamedTuple):
    progress: Progress
    is_last: bool
    checkpoint: Checkpoint | None
    is_new: bool


async def last_checkpoint(connection: AnyConnection) -> Checkpoint | None:
    """Return the checkpoint of the largest size, or None."""
    row = await _LAST.first(connection, {})
    return None if row is None else Checkpoint(**row)


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
        self._progress = Progress()
        self._one_at_a_time = asyncio.Lock()

    async def seal(self, *, wait: bool = True) -> Checkpoint | None:
        """Seal every event that was committed before the call, and return the checkpoint over all; None: there is none.

        Args:
            wait: False returns None at once where another sealer is at work.

        Raises:
            LogMismatchError: The log does not agree with its last checkpoint; nothing is added to it.
            StoreUnavailableError: The database is away, or this role may not write.
        """
        async with self._one_at_a_time:
            is_first = True
            while True:
                batch = await self._batch(wait=wait, is_first=is_first)
                if batch is None:
                    return None
                self._progress, is_first = batch.progress, False
                if batch.checkpoint is not None and batch.is_new:
                    _checkpoint_logger.info("%s", batch.checkpoint.note.rstrip("\n"))
                    self._publish(batch.checkpoint)
                if batch.is_last:
                    return batch.checkpoint

    @retry_conflicts
    async def _batch(self, *, wait: bool, is_first: bool) -> _Batch | None:
        async with self._database.connection("transaction") as connection:
            if connection.dialect.name == "postgresql":
                lock = await (_WAIT_LOCK if wait else _TRY_LOCK).first(connection, {})
                if lock is not None and lock["locked"] is False:
                    return None
            state = await _STATE.first(connection, {})
            assert state is not None  # noqa: S101  an aggregate has a row
            last = await last_checkpoint(connection)
            if is_first and last is not None:
                await _require_agreement(connection, state["size"], last)
            rows, progress, is_last = await self._unsealed(connection)
            size = await _add(connection, state["size"], rows)
            if not is_last or size == (last.size if last else 0):
                return _Batch(progress, is_last, last, False)
            return _Batch(progress, True, await self._checkpoint(connection, size, known(state["identity"])), True)

    async def _unsealed(self, connection: AnyConnection) -> tuple[Sequence[Mapping[str, Any]], Progress, bool]:
        """Return events without a leaf, how far that leads, and whether there are no more."""
        limit = _BATCH[connection.dialect.name]
        progress, xmin = self._progress, 0
        if connection.dialect.name == "postgresql":
            # Before the events are looked for: what this snapshot does not know is looked for again.
            snapshot = await _SNAPSHOT.first(connection, {})
            assert snapshot is not None  # noqa: S101  a SELECT of constants has a row
            xmin = snapshot["xmin"]
            if snapshot["started"] != progress.started:
                progress = Progress(xmin=xmin, started=snapshot["started"])
        if not progress.is_compared or connection.dialect.name == "sqlite":
            rows = await _WALK.rows(connection, {"p_after": progress.after, "p_limit": limit})
            is_end = len(rows) < limit
            progress = progress._replace(after=rows[-1]["id"] if rows else progress.after, is_compared=is_end)
            # On PostgreSQL a lower id may have been committed meanwhile, which is found by its transaction.
            return rows, progress, is_end and connection.dialect.name == "sqlite"
        rows = await _RECENT.rows(connection, {"p_xmin": progress.xmin, "p_limit": limit})
        is_end = len(rows) < limit
        return rows, progress._replace(xmin=xmin) if is_end else progress, is_end

    async def _checkpoint(self, connection: AnyConnection, size: int, identity: str) -> Checkpoint:
        root = await _root(connection, size)
        origin = f"{self._origin}/{identity}"
        note = checkpoint_note(origin, size, root, self._signer)
        made = Checkpoint(origin=origin, size=size, root_hash=root.hex(), note=note, created_at=utc_now())
        await _INSERT_CHECKPOINT.rows(connection, {f"p_{name}": value for name, value in made.model_dump().items()})
        return made


async def _require_agreement(connection: AnyConnection, size: int, last: Checkpoint) -> None:
    if size < last.size or (await _root(connection, last.size)).hex() != last.root_hash:
        raise _mismatch(f"does not agree with its checkpoint at {last.size:,} events")


async def _root(connection: AnyConnection, size: int) -> bytes:
    try:
        return root_from(await read_tiles(connection, tiles_for_root(size)), size)
    except LookupError:
        raise _mismatch("lacks a hash") from None


def _mismatch(what: str) -> LogMismatchError:
    return LogMismatchError(f"The log {what}, so nothing is added to it: run `gateway-store evidence verify`.")


async def _add(connection: AnyConnection, size: int, rows: Sequence[Mapping[str, Any]]) -> int:
    """Insert the leaves of events, and the nodes above them; return the new size."""
    if not rows:
        return size
    salts = os.urandom(SALT_BYTES * len(rows))
    records = []
    for place, row in enumerate(rows):
        salt = salts[place * SALT_BYTES : (place + 1) * SALT_BYTES]
        records.append((size + place, row["id"], salt, leaf_hash(salt, row["content_hash"])))
    names = ("position", "event_id", "salt", "leaf_hash")
    if isinstance(connection, AsyncConnection):
        await connection.execute(insert(_leaves), [dict(zip(names, record, strict=True)) for record in records])
    else:
        await connection.driver.copy_records_to_table(_leaves.name, records=records, columns=names)
    await append(connection, size, [leaf for *_, leaf in records])
    return size + len(rows)


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
        self._idle = asyncio.Event()
        self._idle.set()

    def start(self) -> None:
        """Begin, unless the interval is 0."""
        if self._every_s > 0 and self._task is None:
            self._task = asyncio.get_running_loop().create_task(self._run())

    async def stop(self, timeout_s: float) -> None:
        """End; a seal under way gets `timeout_s` seconds to finish."""
        if self._task is None:
            return
        try:
            async with asyncio.timeout(timeout_s):
                await self._idle.wait()
        except TimeoutError:
            pass
        task, self._task = self._task, None
        task.cancel()
        await asyncio.wait([task])

    async def _run(self) -> None:
        said: object = None
        while True:
            await asyncio.sleep(self._every_s)
            if not self._has_written():
                continue
            self._idle.clear()
            try:
                await self._sealer.seal(wait=False)
                said = None
            except GatewayStoreError as exc:
                if may_not_write(exc):
                    # A role that only reads, or a standby: sealing is the work of others.
                    _logger.debug("This store does not seal: %s", exc)
                    return
                if said != (said := (type(exc), str(exc))):
                    _logger.error("Sealing failed, and is tried again: %s", exc)
            finally:
                self._idle.set()


def may_not_write(exc: BaseException) -> bool:
    """True for the error of a role, or of a server, that only reads."""
    cause: BaseException | None = exc
    while cause is not None:
        if sqlstate_of(cause) in _MAY_NOT_WRITE or "readonly database" in str(cause):
            return True
        if isinstance(cause, asyncpg.InsufficientPrivilegeError | asyncpg.ReadOnlySQLTransactionError):
            return True
        cause = cause.__cause__
    return False
