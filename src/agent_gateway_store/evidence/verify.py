"""Recompute the log from its events, and name what does not fit."""

from __future__ import annotations

import asyncio
import json
import re
import sqlite3
from collections.abc import AsyncGenerator, Callable, Iterable, Sequence
from contextlib import aclosing
from datetime import datetime
from pathlib import Path
from typing import Any

from sqlalchemy import BigInteger, Select, Text, bindparam, cast, func, or_, select

from agent_gateway_store._text import escape
from agent_gateway_store.audit.document import COLUMNS
from agent_gateway_store.audit.doors import ERASE, PRUNE, is_door, names_door
from agent_gateway_store.audit.selects import select_events, table
from agent_gateway_store.errors import InvalidEvidenceError
from agent_gateway_store.evidence.archived import read_archives
from agent_gateway_store.evidence.notes import ParsedNote, VerifierKey, parse_note
from agent_gateway_store.evidence.tree import EMPTY_ROOT
from agent_gateway_store.evidence.walk import MOST_FINDINGS, Doors, LogWalk, Root, computed_hash
from agent_gateway_store.models.evidence import (
    AuditCheckpoint,
    AuditLeaf,
    AuditTile,
    Checkpoint,
    Finding,
    FindingKind,
    Verification,
    identity_table,
    leaf_hash,
)
from agent_gateway_store.storage import append_only
from agent_gateway_store.storage.append_only import LOG_TABLES
from agent_gateway_store.storage.database import Database
from agent_gateway_store.storage.sequences import HIGHEST_ID
from agent_gateway_store.storage.statements import Statement, typed_text
from agent_gateway_store.storage.streaming import Snapshot, snapshot

_leaves = AuditLeaf.__table__
_tiles = AuditTile.__table__
_checkpoints = AuditCheckpoint.__table__
# Positions that are read at a time: fewer than the 700 objects after which Python looks for garbage.
_PAGE = 600


def _events_with_leaves(dialect: str) -> Select[Any]:
    leaf = (_leaves.c.position, _leaves.c.event_id, _leaves.c.salt, _leaves.c.leaf_hash)
    return select_events(dialect, (), has_zones=False).add_columns(*leaf)


def _log(dialect: str) -> Select[Any]:
    joined = _leaves.outerjoin(table, table.c.id == _leaves.c.event_id)
    page = _leaves.c.position >= _FROM, _leaves.c.position < _UNTIL
    return _events_with_leaves(dialect).select_from(joined).where(*page).order_by(_leaves.c.position)


def _doors(dialect: str) -> Select[Any]:
    joined = table.join(_leaves, table.c.id == _leaves.c.event_id)
    return _events_with_leaves(dialect).select_from(joined).where(is_door(PRUNE, ERASE), _leaves.c.position < _SIZE)


_SIZE, _FROM, _UNTIL = (bindparam(name, type_=BigInteger()) for name in ("p_size", "p_from", "p_until"))


def _checkpoint(dialect: str) -> Select[Any]:
    # As text: a time that Python cannot hold would end the whole read.
    made = _checkpoints.c.created_at
    columns = (_checkpoints.c.size, _checkpoints.c.root_hash, _checkpoints.c.origin, _checkpoints.c.note)
    return select(*columns, cast(made, Text()) if dialect == "postgresql" else made)


_LOG, _DOORS = Statement(_log), Statement(_doors)
_NEXT = Statement(
    select(func.min(_leaves.c.position).label("position")).where(
        _leaves.c.position >= _FROM, _leaves.c.position < _SIZE
    )
)
# Of the table itself: an index can say something else. An index of PostgreSQL holds no `ctid`.
_EVENTS = Statement(
    lambda dialect: typed_text(
        f"SELECT count(ctid) FROM {table.name}"  # noqa: S608  names of our own
        if dialect == "postgresql"
        else f"SELECT count(*) FROM {table.name} NOT INDEXED",  # noqa: S608  likewise
        {},
    )
)
_BEYOND = Statement(
    select(func.count().label("leaves")).where(
        or_(_leaves.c.position < 0, _leaves.c.position >= _SIZE, _leaves.c.position.is_(None))
    )
)


_OURS = {sql for name in append_only.TABLES for sql in append_only.triggers("sqlite", name).values()}
# SQLite keeps the text of a trigger alone. One that is spelled otherwise runs before INSERT, or may do so. What is a
# space or a comment is said as SQLite does, and matches in one way: no name and no body may pass for what follows it.
_GAP = r"(?:[ \t\n\f\r]|--[^\n]*\n|/\*(?:[^*]|\*(?!/))*\*/)"
_QUOTED = r"""(?:"(?:[^"]|"")*"|`(?:[^`]|``)*`|'(?:[^']|'')*'|\[[^]]*\])"""
_NOT_BEFORE_INSERT = re.compile(
    rf"CREATE TRIGGER (?:[\w$]+{_GAP}|{_QUOTED}){_GAP}*"
    rf"(?:AFTER{_GAP}+INSERT|(?:(?:BEFORE|AFTER){_GAP}+)?(?:UPDATE|DELETE)){_GAP}",
    re.IGNORECASE,
)
_STRANGE = Statement(
    lambda dialect: typed_text(
        append_only.STRANGE_ON_POSTGRES if dialect == "postgresql" else append_only.STRANGE_ON_SQLITE, {}
    )
)
# Both databases number rows from 1, and readers that go on from an id begin at 0. Behind a very high one none is left.
_NOT_GIVEN = Statement(
    select(_leaves.c.position, table.c.id, table.c.request_id)
    .select_from(table.outerjoin(_leaves, _leaves.c.event_id == table.c.id))
    .where(or_(table.c.id < 1, table.c.id > HIGHEST_ID))
    .order_by(table.c.id)
    .limit(MOST_FINDINGS)
)
_HISTORY = Statement(
    select(
        *(
            select(func.coalesce(func.max(column), 0)).scalar_subquery()
            for column in (identity_table.c.history_id, table.c.id, _leaves.c.event_id)
        )
    )
)
# Of our own tables: what others keep in the file may need functions that are not here.
_INTEGRITY = [Statement(typed_text(f"PRAGMA integrity_check({name})", {})) for name in LOG_TABLES]
# Chosen: of a hundred lines, enough to recognise what they are about.
_MOST_DAMAGES = 3
_STORED_TILES = Statement(select(_tiles.c.level, _tiles.c.index, _tiles.c.hashes))
_LAST = Statement(lambda dialect: _checkpoint(dialect).order_by(_checkpoints.c.size.desc()).limit(1))
_BETWEEN = Statement(
    lambda dialect: (
        _checkpoint(dialect)
        .where(_checkpoints.c.size > bindparam("p_after", type_=BigInteger()), _checkpoints.c.size <= _SIZE)
        .order_by(_checkpoints.c.size)
    )
)


async def verify(
    database: Database,
    *,
    against: Iterable[str | Checkpoint] = (),
    keys: Iterable[str] = (),
    archives: Sequence[Path] = (),
    report: Callable[[int], None] = lambda _rows: None,
) -> Verification:
    """Recompute every hash from the columns of the events; arguments and result as for `EvidenceManager.verify`."""
    verifiers = [VerifierKey.parse(key) for key in keys]
    kept = [parse_note(each.note if isinstance(each, Checkpoint) else each) for each in against]
    async with snapshot(database) as reader:
        strange, remarks = await _strange(reader)
        if strange:
            return _unreadable(*strange, remarks=remarks)
        damage = await _damage(reader) if database.dialect == "sqlite" else ""
        try:
            walk, events = await _walked(reader, kept, verifiers, archives, report)
        except sqlite3.DatabaseError:
            if not damage:
                raise
            return _unreadable(damage, remarks=remarks)
    if damage:
        walk.note(FindingKind.ALTERED, damage)
    return Verification(
        ok=not walk.findings,
        size=walk.tree.size,
        root_hash=walk.tree.root().hex(),
        origin=walk.origin,
        checked=walk.checked,
        unsealed=max(events - walk.present, 0),
        erased=walk.erased,
        pruned=walk.pruned,
        archived=walk.archived,
        anchored=walk.anchored,
        findings=tuple(walk.findings),
        remarks=(*remarks, *walk.remarks, *walk.archive.remarks),
    )


async def _walked(
    reader: Snapshot,
    kept: Sequence[ParsedNote],
    verifiers: Sequence[VerifierKey],
    archives: Sequence[Path],
    report: Callable[[int], None],
) -> tuple[LogWalk, int]:
    """Return the walk over the whole log, and how many events there are."""
    is_jsonb = reader.dialect.name == "postgresql"
    last = next(iter(await reader.fetched(_LAST)), None)
    size = last[0] if last and type(last[0]) is int else 0
    doors = await _read_doors(reader, size, is_jsonb=is_jsonb)
    walk = LogWalk(size, doors, is_jsonb=is_jsonb)
    await _take_tiles(reader, walk)
    walk.archive = await read_archives(reader, archives, doors.archived, doors.erased, walk.note)
    # In a thread: a year of checkpoints, one a minute, takes a minute to verify.
    await asyncio.to_thread(_take_kept, walk, kept, verifiers)
    _check_last(walk, last, verifiers)
    await _walk_log(reader, walk, verifiers, report)
    ((beyond,),) = await reader.fetched(_BEYOND, {"p_size": walk.size})
    ((events,),) = await reader.fetched(_EVENTS)
    walk.finish(beyond)
    await _check_ids(reader, walk)
    return walk, events


async def _check_ids(reader: Snapshot, walk: LogWalk) -> None:
    """Name ids that no store gives, by which followers miss events: ids are not sealed."""
    for position, event_id, request_id in await reader.fetched(_NOT_GIVEN):
        why = "none below 1 is given, and followers pass over it"
        if event_id > 0:
            why = "no store gives one so high, and hardly any is left for new events"
        text = f"The event has the id {event_id:,}: {why}."
        walk.note(FindingKind.ALTERED, text, position=position, event_id=event_id, request_id=request_id)
    ((history_id, *given),) = await reader.fetched(_HISTORY)
    if type(history_id) is int and all(type(each) is int and each < history_id for each in given):
        text = f"Followers take events up to the id {history_id:,} for history, and none has it: they miss new ones."
        walk.note(FindingKind.ALTERED, text)


def _unreadable(*texts: str, remarks: Sequence[str]) -> Verification:
    findings = tuple(Finding(kind=FindingKind.ALTERED, text=text) for text in texts)
    return Verification(ok=False, size=0, root_hash=EMPTY_ROOT.hex(), findings=findings, remarks=tuple(remarks))


async def _strange(reader: Snapshot) -> tuple[list[str], list[str]]:
    """Return what `_STRANGE` names: why nothing may be read, and what is to be said all the same."""
    said: tuple[list[str], list[str]] = [], []
    for row in await reader.fetched(_STRANGE):
        fault, name, what, *sql = map(str, row)
        if sql and fault == "trigger":
            if name not in LOG_TABLES or sql[0] in _OURS:
                continue
            fault = "other" if _NOT_BEFORE_INSERT.match(sql[0]) else fault
        said[fault in ("other", "off")].append(_FAULTS[fault].format(escape(name), escape(what)))
    return said


# By the fault that `_STRANGE` names.
_FAULTS = {
    "table": "{} is not a table. What is in its place may show others something else, so nothing was read.",
    "children": "{} has tables that inherit from it. They may show others something else, so nothing was read.",
    "unlogged": "{} is UNLOGGED: a crash of the server would empty it, and a replica shows nothing. Nothing was read.",
    "rule": "{} has a rule that replaces INSERT, so that new rows are lost or go elsewhere. Nothing was read.",
    "trigger": "{0} has the trigger {1} that runs before INSERT, and can drop or change new rows. Nothing was read.",
    "other": "{} has the trigger or rule {}, which is not the store's: it can change or delete new events before they "
    "are sealed, though writes say STORED. Find out whose it is.",
    "off": "Some sessions fire no triggers, so that rows of the log can be changed: run `{1}` as a superuser.",
    "twice": "{} has no unique constraint on {}: one row may be counted for another. Nothing was read: create it again "
    "(`gateway-store db check` names it).",
    "column": "{} lacks the column {}, or computes it: it can say more than was sealed. Nothing was read.",
}


async def _damage(reader: Snapshot) -> str:
    """Return what is to be said of tables that differ from their indexes, by which everybody else finds rows."""
    said: list[str] = []
    for statement in _INTEGRITY:
        try:
            said += [line for (line,) in await reader.fetched(statement) if line != "ok"]
        except sqlite3.DatabaseError as exc:
            # Not for what passes, such as a lock or a disk that does not answer.
            if getattr(exc, "sqlite_errorcode", 0) & 0xFF not in (sqlite3.SQLITE_ERROR, sqlite3.SQLITE_CORRUPT):
                raise
            said.append(str(exc))
    what = escape("; ".join(said[:_MOST_DAMAGES]))
    return f"The database file is damaged, or its indexes were altered: {what}." if said else ""


async def _walk_log(
    reader: Snapshot, walk: LogWalk, verifiers: Sequence[VerifierKey], report: Callable[[int], None]
) -> None:
    """Check the log, each page while the server reads the next one."""
    checking: asyncio.Task[None] | None = None
    # Before every number that a row can hold.
    after = -(2**63)
    try:
        async with aclosing(_pages(reader, walk.size)) as pages:
            async for rows in pages:
                until = rows[-1][-4] + 1
                found = await reader.fetched(_BETWEEN, {"p_after": after, "p_size": until})
                if checking is not None:
                    await checking
                    report(walk.tree.size)
                for checkpoint in found:
                    _check_note(walk, checkpoint, verifiers)
                roots = [Root(size, _bytes(root_hash), False) for size, root_hash, *_ in found]
                checking = asyncio.create_task(walk.take_all(rows, roots))
                after = until
        if checking is not None:
            await checking
            report(walk.tree.size)
    finally:
        if checking is not None:
            checking.cancel()
            await asyncio.wait([checking])


async def _pages(reader: Snapshot, size: int) -> AsyncGenerator[Sequence[Sequence[Any]], None]:
    """Yield the leaves and their events. By positions: a cursor over all would sort them all where statistics lack."""
    start = 0
    while start < size:
        until = min(start + _PAGE, size)
        if rows := await reader.fetched(_LOG, {"p_from": start, "p_until": until}):
            yield rows
            start = until
        else:
            ((found,),) = await reader.fetched(_NEXT, {"p_from": until, "p_size": size})
            start = size if found is None else found


async def _take_tiles(reader: Snapshot, walk: LogWalk) -> None:
    # 32 bytes for 256 events: of a hundred million, 12 MB.
    for level, index, hashes in await reader.fetched(_STORED_TILES):
        if (level, index) in walk.tiles:
            walk.note(FindingKind.BAD_TREE, f"There are two tiles {index:,} of level {level}.")
        elif (type(level), type(index), type(hashes)) != (int, int, bytes):
            walk.note(FindingKind.BAD_TREE, "A tile holds no hashes, or stands at no place.")
        else:
            walk.tiles[level, index] = hashes


async def _read_doors(reader: Snapshot, size: int, *, is_jsonb: bool) -> Doors:
    """Return what the doors did, as far as the events that say so fit their leaves."""
    doors = Doors()
    for row in await reader.fetched(_DOORS, {"p_size": size}):
        _, *values, position, _, salt, leaf = row
        content, event = computed_hash(values, is_jsonb=is_jsonb), dict(zip(COLUMNS, values, strict=True))
        is_whole = bool(content) and event["content_hash"] == content and type(salt) is bytes
        if is_whole and leaf_hash(salt, content) == leaf and names_door(event, PRUNE, ERASE):
            said = json.loads(event["sanitized_args"])
            doors.add(event["tool_name"], said if isinstance(said, dict) else {}, position)
    return doors


def _bytes(text: str) -> bytes:
    try:
        return bytes.fromhex(text)
    except (TypeError, ValueError):
        return b""


def _check_note(walk: LogWalk, checkpoint: Sequence[Any], verifiers: Sequence[VerifierKey]) -> None:
    size, root_hash, origin, text, created_at = checkpoint
    if not _is_time(created_at):
        walk.note(FindingKind.ALTERED, f"The checkpoint over {size:,} events holds no time that can be read.")
    try:
        note = _note(text)
        fits = (note.origin, note.size, note.root.hex()) == (origin, size, root_hash)
    except InvalidEvidenceError:
        fits = False
    else:
        # An earlier one may be signed by a key of its time, or by none; what names one of these keys must be by it.
        if verifiers and note.signed_by(verifiers) is False:
            walk.note(FindingKind.BAD_SIGNATURE, f"The signature of the checkpoint over {size:,} events is forged.")
    if not fits:
        walk.note(FindingKind.BAD_SIGNATURE, f"The checkpoint over {size:,} events and its note differ.")


def _is_time(text: Any) -> bool:
    try:
        datetime.fromisoformat(text)
    except (TypeError, ValueError):
        return False
    return True


def _note(text: Any) -> ParsedNote:
    # A database can be made to hold something else.
    return parse_note(text if isinstance(text, str) else "")


def _vouching(note: ParsedNote, verifiers: Sequence[VerifierKey]) -> bool:
    """True for a kept checkpoint where no key is given, since it vouches by where it was kept, or a key has signed."""
    return not verifiers or bool(note.signed_by(verifiers))


def _take_kept(walk: LogWalk, kept: Sequence[ParsedNote], verifiers: Sequence[VerifierKey]) -> None:
    for note in kept:
        vouches = _vouching(note, verifiers)
        walk.kept.setdefault(note.size, []).append(Root(note.size, note.root, True, vouches))
        if not vouches:
            text = f"No key that was named has signed the kept checkpoint over {note.size:,} events."
            walk.note(FindingKind.BAD_SIGNATURE, text)
    for empty in walk.kept.pop(0, ()):
        walk.check_root(empty)


def _check_last(walk: LogWalk, last: Sequence[Any] | None, verifiers: Sequence[VerifierKey]) -> None:
    try:
        note = _note(last[3]) if last is not None else None
        is_signed = note is None or _vouching(note, verifiers)
        walk.origin = note.origin if note is not None else ""
    except InvalidEvidenceError:
        # It is a finding of its own.
        is_signed = not verifiers
    if last is not None and type(last[0]) is not int:
        walk.note(FindingKind.BAD_SIGNATURE, "The last checkpoint is over no number of events.")
    if last is None and verifiers:
        walk.remarks.append(
            "There is no checkpoint, so no key has signed anything. If there was one, the log was deleted."
        )
    if not is_signed:
        walk.note(FindingKind.BAD_SIGNATURE, "No key that was named has signed the last checkpoint.")
