"""Erase what one request held: in the table or in the archive, with its approvals and their notices.

The leaf stays, so the log verifies: an event that says what is left of the erased one is sealed before anything goes.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Collection, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple
from uuid import UUID

from sqlalchemy import ColumnElement, Row, and_, bindparam, or_, select, text, update
from sqlalchemy.ext.asyncio import AsyncConnection

from agent_gateway_store._text import code_text
from agent_gateway_store.archive.files import NAMES, Record, read_approvals, rewrite_approvals, rewrite_events
from agent_gateway_store.archive.manifest import Manifest
from agent_gateway_store.archive.reader import Archive, rows_of, stored_form
from agent_gateway_store.audit.backends import json_texts
from agent_gateway_store.audit.doors import ERASE, is_door, names_door, write_door
from agent_gateway_store.audit.erased import BLANK, BLANK_APPROVAL, BLANK_TEXTS, blank_hash, blank_row
from agent_gateway_store.audit.selects import table
from agent_gateway_store.encoding.sanitize import storable_key
from agent_gateway_store.errors import AuditEventNotFoundError, EventHeldError, StoreUnavailableError
from agent_gateway_store.evidence.sealer import Sealer
from agent_gateway_store.models.approval import ERASED, ApprovalRequest, ApprovalVote, is_blank_approval
from agent_gateway_store.models.delivery import NotificationDelivery
from agent_gateway_store.models.evidence import AuditLeaf
from agent_gateway_store.models.retention import Erased, Hold
from agent_gateway_store.retention.holds import covers, lock_holds, read_holds, require_archive
from agent_gateway_store.retention.ownership import open_own_archive, require_own_events
from agent_gateway_store.retention.prune import archived_columns, seal_door
from agent_gateway_store.storage.append_only import open_door
from agent_gateway_store.storage.arrow import in_thread
from agent_gateway_store.storage.database import Database
from agent_gateway_store.storage.db_clock import db_now
from agent_gateway_store.storage.errors import retry_conflicts
from agent_gateway_store.storage.exclusive import StillHeld
from agent_gateway_store.storage.statements import Statement

_leaves = AuditLeaf.__table__
_approvals = ApprovalRequest.__table__
_votes = ApprovalVote.__table__
_notices = NotificationDelivery.__table__

# Chosen: readers of a page or a list are gone in less than 10 s.
_WAL_TRIES = 50
_WAL_PAUSE_S = 0.2
_BLANKED = (*BLANK_TEXTS, "request_id", "content_hash", "salt")
_BY_REQUEST = Statement(
    lambda dialect: archived_columns(dialect).where(table.c.request_id == bindparam("p_request_id"))
)


class _Target(NamedTuple):
    """An event under the id, in the table or in the archive."""

    values: dict[str, Any]
    archived: bool

    @property
    def position(self) -> int:
        return int(self.values["position"])

    @property
    def is_blank(self) -> bool:
        return self.values["content_hash"] is None and self.values["deterministic_rationale"] == ERASED


class _Touched(NamedTuple):
    """What an erasure changes: the targets, and of other events the approvals that they name or asked for."""

    targets: Sequence[_Target]
    # Those that are blanked, in the table or in the archive, each with the id of the request that asked.
    approvals: Mapping[UUID, str]
    org_id: str

    def in_table(self) -> ColumnElement[bool]:
        """Return the condition of these events."""
        ids = [each.values["id"] for each in self.targets if not each.archived]
        asked = table.c.request_id.in_(set(self.approvals.values()))
        touched = or_(table.c.id.in_(ids), table.c.approval_id.in_(self.approvals), asked)
        return and_(table.c.org_id == self.org_id, ~is_door(), touched)

    def in_archive(self) -> Any:
        """Return the condition of these events for pyarrow."""
        import pyarrow as pa
        import pyarrow.compute as pc

        positions = pa.array([each.position for each in self.targets if each.archived], pa.int64())
        ids = pa.array(map(str, self.approvals), pa.string())
        requests = pa.array(set(self.approvals.values()), pa.string())
        asked = pc.field("request_id").isin(requests)
        touched = pc.field("position").isin(positions) | pc.field("approval_id").isin(ids) | asked
        return (pc.field("org_id") == self.org_id) & touched


class Eraser:
    """Erases one request; its user holds the lock of retention.

    Args:
        forget: Deletes the Redis entries of approvals; False where Redis does not answer.
        archive: Where pruned events are; None: only the table is looked at.
    """

    def __init__(
        self,
        database: Database,
        sealer: Sealer,
        *,
        org_id: str | None,
        environment: str,
        archive: Path | None,
        forget: Callable[[Collection[UUID]], Awaitable[bool]],
    ) -> None:
        self._database, self._sealer, self._org_id = database, sealer, org_id
        self._environment, self._forget = environment, forget
        self._manifest = None if archive is None else Manifest(archive)

    async def erase(self, given: str, still_locked: StillHeld, *, reason: str, by: str) -> Erased:
        """Erase everything under a request id; errors as of `RetentionManager.erase`."""
        request_id = storable_key(given)
        targets = await self._targets(request_id)
        if not targets:
            raise AuditEventNotFoundError(given)
        org_id = targets[0].values["org_id"]
        asked, archived = await self._approvals_of(targets, request_id, org_id)
        approvals = [row.approval_id for row in asked]
        touched = _Touched(targets, archived | {row.approval_id: row.request_id for row in asked}, org_id)
        async with self._database.read() as connection:
            await self._require_unheld(connection, touched, await read_holds(connection))
        _require_over(asked)
        # Before: nothing is said or blanked while Redis is away. After: somebody may have cached it in between.
        await self._forget_all(touched.approvals, request_id)
        await self._announce(targets, reason=reason, by=by, approvals=len(approvals))
        manifest, archived_approvals = self._manifest, 0
        own = set(touched.approvals)
        await still_locked()
        if manifest is not None:
            archived_approvals = await in_thread(lambda: rewrite_approvals(manifest, partial(_blanked, own)))
        notices = await self._blank(touched, approvals, still_locked)
        newest = max(targets, key=lambda each: each.position)
        erased_id, in_archive = blank_row(newest.values)["request_id"], any(each.archived for each in targets)
        await self._forget_all(own, request_id if in_archive else erased_id)
        if manifest is not None:
            # After the table: an id that holds a hash goes with it, by which a run after a kill finds what is left.
            blank = {
                (each.position, each.values["leaf_hash"]): {
                    name: value for name, value in blank_row(each.values).items() if name in _BLANKED
                }
                for each in targets
                if each.archived
            }
            await still_locked()
            await in_thread(lambda: rewrite_events(manifest, blank))
        if self._database.dialect == "sqlite":
            await self._empty_wal(erased_id)
        return Erased(
            request_id=erased_id,
            org_id=org_id,
            position=newest.position,
            archived=in_archive,
            approvals=len(approvals) + archived_approvals,
            notices=notices,
        )

    async def _forget_all(self, approvals: Collection[UUID], request_id: str) -> None:
        if not await self._forget(approvals):
            raise StoreUnavailableError(
                f"Redis does not answer, and may hold what is to be erased: erase {code_text(request_id)} again."
            )

    async def _empty_wal(self, erased_id: str) -> None:
        """Bring SQLite's write-ahead log, which holds what was erased, into the file, and empty it."""
        async with self._database.raw_connection() as driver:
            [(timeout_ms,)] = await driver.execute_fetchall("PRAGMA busy_timeout")
            # While SQLite itself waits for readers, nobody can write.
            await driver.execute_fetchall("PRAGMA busy_timeout = 0")
            try:
                for _ in range(_WAL_TRIES):
                    [(is_busy, *_)] = await driver.execute_fetchall("PRAGMA wal_checkpoint(TRUNCATE)")
                    if not is_busy:
                        return
                    await asyncio.sleep(_WAL_PAUSE_S)
            finally:
                await driver.execute_fetchall(f"PRAGMA busy_timeout = {timeout_ms}")
        raise StoreUnavailableError(
            f"Somebody reads the database as it was before: end that, and erase {code_text(erased_id)} again."
        )

    async def _targets(self, request_id: str) -> list[_Target]:
        async with self._database.connection("read") as connection:
            rows = await _BY_REQUEST.tuples(connection, {"p_request_id": request_id})
        found = [_Target(dict(zip(NAMES, row, strict=False)), archived=False) for row in rows]
        if self._manifest is not None:
            folder = self._manifest.folder
            await open_own_archive(self._database, self._manifest)
            found += [
                _Target(values, archived=True) for values in await in_thread(lambda: _archived(folder, request_id))
            ]
        own = [each for each in found if self._org_id in (None, each.values["org_id"])]
        calls = [each for each in own if not names_door(each.values)]
        if own and not calls:
            raise ValueError("This event says what retention did: it holds nothing of a call, and is not erased.")
        if len(organisations := sorted({each.values["org_id"] for each in calls})) > 1:
            names = ", ".join(map(code_text, organisations))
            raise ValueError(f"Events of {names} have this request id: use `store.for_org(...)` (`--org`) for one.")
        if self._manifest is not None:
            rows = [[each.values[name] for name in NAMES] for each in calls if each.archived]
            whole = {each.position: blank_hash(each.values) for each in calls if not (each.archived or each.is_blank)}
            await require_own_events(self._database, self._manifest, rows, whole)
        return calls

    async def _require_unheld(self, connection: AsyncConnection, touched: _Touched, holds: Sequence[Hold]) -> None:
        dialect = self._database.dialect
        names = [
            hold.name
            for hold in holds
            if (await connection.execute(
                select(table.c.id).where(touched.in_table(), covers(dialect, hold.filters)).limit(1)
            )).first()
        ]  # fmt: skip
        if touched.approvals and self._manifest is None:
            await require_archive(connection, holds)
        may_be_archived = touched.approvals or any(each.archived for each in touched.targets)
        if may_be_archived and self._manifest is not None:
            names += await in_thread(partial(_holds_of_archived, self._manifest.folder, holds, touched))
        if names:
            # A name may tell of another organisation.
            raise EventHeldError(tuple(dict.fromkeys(names)) if self._org_id is None else ())

    async def _approvals_of(
        self, targets: Sequence[_Target], request_id: str, org_id: str
    ) -> tuple[Sequence[Row[Any]], dict[UUID, str]]:
        """Return the approvals of the request in the table, and those in the archive with what they were asked for."""
        async with self._database.read() as connection:
            found = (await connection.execute(
                select(
                    _approvals.c.approval_id,
                    _approvals.c.request_id,
                    _approvals.c.status,
                    _approvals.c.expires_at,
                    _approvals.c.use_before,
                    db_now().label("now"),
                ).where(_of_request(targets, request_id, org_id))
            )).all()  # fmt: skip
        if self._manifest is None:
            return found, {}
        cited = {str(each.values["approval_id"]) for each in targets if each.values["approval_id"]}
        return found, await in_thread(partial(_archived_approvals, self._manifest, cited, request_id, org_id))

    async def _announce(self, targets: Sequence[_Target], *, reason: str, by: str, approvals: int) -> None:
        """Write and seal what will be left of each event that is not blank yet."""
        in_table = any(not each.archived for each in targets)
        done: set[int] = set()
        for target in targets:
            if target.is_blank or target.position in done:
                continue
            done.add(target.position)
            facts = {
                "position": target.position,
                "row_sha256": blank_hash(target.values),
                "reason": reason,
                "approvals": approvals,
                "archived": target.archived,
            }
            event = partial(
                write_door,
                tool=ERASE,
                facts=facts,
                by=by,
                environment=self._environment,
                why="An operator erased an event.",
                org_id=target.values["org_id"],
                # So that what arrives later under the id of an event that only the archive holds is known.
                request_id=None if in_table or len(done) > 1 else blank_row(target.values)["request_id"],
            )
            await seal_door(self._database, self._sealer, event)

    @retry_conflicts
    async def _blank(self, touched: _Touched, approvals: Sequence[UUID], still_locked: StillHeld) -> int:
        """Blank everything in the tables; return how many notices."""
        async with self._database.write() as connection:
            await self._require_unheld(connection, touched, await lock_holds(connection))
            await self._blank_events(connection, touched.targets)
            await _blank_approvals(connection, approvals)
            # Those that could not be delivered outlive their approval.
            notices = await _blank_notices(connection, touched.approvals)
            await still_locked()
        return notices

    async def _blank_events(self, connection: AsyncConnection, targets: Sequence[_Target]) -> None:
        if connection.dialect.name == "sqlite":
            # Of an engine that was handed over; ours wipe by themselves.
            await connection.execute(text("PRAGMA secure_delete = ON"))
        async with open_door(connection):
            for target in targets:
                if not target.archived:
                    request_id = blank_row(target.values)["request_id"]
                    values = BLANK | json_texts(connection, BLANK_TEXTS)
                    values |= {"request_id": request_id, "content_hash": None}
                    await connection.execute(update(table).where(table.c.id == target.values["id"]).values(values))
                unsalted = update(_leaves).where(_leaves.c.position == target.position)
                await connection.execute(unsalted.values(salt=None))


def _archived(folder: Path, request_id: str) -> list[dict[str, Any]]:
    import pyarrow.compute as pc

    found = Archive(folder).batches({}, NAMES, pc.field("request_id") == request_id, skips=False)
    return [dict(zip(NAMES, stored_form(row), strict=True)) for _, batch in found for row in rows_of(batch)]


def _holds_of_archived(folder: Path, holds: Sequence[Hold], touched: _Touched) -> list[str]:
    keep = touched.in_archive()
    return [hold.name for hold in holds if any(Archive(folder).batches(hold.filters, ("position",), keep, skips=False))]


def _archived_approvals(manifest: Manifest, cited: Collection[str], request_id: str, org_id: str) -> dict[UUID, str]:
    return {
        UUID(each["approval_id"]): each["request_id"]
        for entry in manifest.of_kind("approvals")
        for record in read_approvals(manifest, entry)
        if (each := record["approval"])["org_id"] == org_id
        and (each["approval_id"] in cited or each["request_id"] == request_id)
    }


def _require_over(approvals: Iterable[Row[Any]]) -> None:
    for row in approvals:
        deadline = row.expires_at if row.status == "PENDING" else row.use_before or row.expires_at
        if row.status in ("PENDING", "APPROVED") and deadline > row.now:
            raise ValueError(f"The approval {row.approval_id} of this request is still open: cancel it first.")


def _of_request(targets: Sequence[_Target], request_id: str, org_id: str) -> ColumnElement[bool]:
    cited = [UUID(each.values["approval_id"]) for each in targets if each.values["approval_id"]]
    own = or_(_approvals.c.approval_id.in_(cited), _approvals.c.request_id == request_id)
    return and_(_approvals.c.org_id == org_id, own)


async def _blank_approvals(connection: AsyncConnection, ids: Sequence[UUID]) -> None:
    """Blank approvals and their votes."""
    for approval_id in ids:
        own = _approvals.c.approval_id == approval_id
        call = (await connection.execute(select(_approvals.c.tool_call).where(own))).scalar_one()
        values = BLANK_APPROVAL | {
            "tool_call": call.model_copy(update={"arguments": {}}),
            "acquire_key": None,
            "version": _approvals.c.version + 1,
        }
        await connection.execute(update(_approvals).where(own).values(values))
        ended = update(_approvals).where(own, _approvals.c.outcome.is_not(None))
        await connection.execute(ended.values(outcome=ERASED))
        await connection.execute(update(_votes).where(_votes.c.approval_id == approval_id).values(note=""))


async def _blank_notices(connection: AsyncConnection, ids: Iterable[UUID]) -> int:
    """Blank the notices about approvals; return how many."""
    count = 0
    for approval_id in ids:
        notices = select(_notices.c.id, _notices.c.payload).where(_notices.c.approval_id == approval_id)
        for row in (await connection.execute(notices)).all():
            cleared = {"payload": blank_notice(row.payload), "last_error": None}
            await connection.execute(update(_notices).where(_notices.c.id == row.id).values(cleared))
            count += 1
    return count


def blank_notice(payload: Mapping[str, Any]) -> dict[str, Any]:
    """Return the payload of a notice without what it says about the call."""
    call = {**payload.get("tool_call", {}), "arguments": {}}
    return {**payload, "tool_call": call, "risk_explanation": ERASED, "note": ""}


def _blanked(own: Collection[UUID], record: Record) -> Record | None:
    """Return an archived approval blanked; None if it is not one of these, or was blanked before."""
    approval = record["approval"]
    is_own = UUID(approval["approval_id"]) in own
    if not is_own or is_blank_approval(approval["tool_call_hash"], approval["risk_explanation"]):
        return None
    blank = BLANK_APPROVAL | {
        "tool_call": {**approval["tool_call"], "arguments": {}},
        "outcome": ERASED if approval["outcome"] else None,
    }
    return {
        "approval": approval | blank,
        "votes": [vote | {"note": ""} for vote in record["votes"]],
        "notices": [notice | {"payload": blank_notice(notice["payload"])} for notice in record["notices"]],
    }
