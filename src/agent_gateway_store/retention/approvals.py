"""Prune approvals that are over and that no event in the table cites, with their votes and delivered notices."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any
from uuid import UUID

from pydantic_core import to_jsonable_python
from sqlalchemy import BigInteger, ColumnElement, Table, and_, delete, exists, false, func, or_, select
from sqlalchemy.ext.asyncio import AsyncConnection

from agent_gateway_store.archive.files import read_approvals, write_approvals
from agent_gateway_store.archive.manifest import Manifest
from agent_gateway_store.audit.doors import PRUNE_APPROVALS, write_door
from agent_gateway_store.audit.selects import table as events
from agent_gateway_store.clock import utc_now
from agent_gateway_store.models.approval import ApprovalRequest, ApprovalVote
from agent_gateway_store.models.delivery import NotificationDelivery
from agent_gateway_store.models.retention import PrunedApprovals
from agent_gateway_store.retention.holds import lock_holds, require_archive
from agent_gateway_store.retention.ownership import open_own_archive
from agent_gateway_store.storage.arrow import in_thread
from agent_gateway_store.storage.database import Database
from agent_gateway_store.storage.db_clock import db_now
from agent_gateway_store.storage.errors import retry_conflicts
from agent_gateway_store.storage.exclusive import StillHeld
from agent_gateway_store.storage.statements import Statement, is_one_of

_approvals = ApprovalRequest.__table__
_votes = ApprovalVote.__table__
_notices = NotificationDelivery.__table__
_REMOVE_NOTICES = Statement(
    lambda dialect: delete(_notices).where(is_one_of(dialect, _notices.c.id, "p_ids", BigInteger()))
)

# Chosen: with output that waits for its release a few megabytes, and some 50 ms in which SQLite's writers wait.
_BATCH_ROWS = 500
# The token releases a call, and what `acquire` finds approvals by is of no use to a reader.
_SECRET = ("token", "acquire_key")


class ApprovalPruner:
    """Prunes one batch after the other; its user holds the lock of retention.

    Args:
        before: Approvals that ended from this time on stay; not in the future.
        archive: The folder; None discards.
    """

    def __init__(
        self, database: Database, *, by: str, environment: str, before: datetime, archive: Path | None
    ) -> None:
        self._database, self._by, self._environment = database, by, environment
        self._before = before
        self._manifest = None if archive is None else Manifest(archive)

    async def require_rights(self) -> None:
        """Delete nothing: a role that may not delete is refused before anything is written to the folder."""
        async with self._database.write() as connection:
            await connection.execute(delete(_approvals).where(false()))

    async def start(self, still_locked: StillHeld) -> PrunedApprovals:
        """Make the archive, or remove what a killed run has left in it; delete what that run has archived last."""
        if (manifest := self._manifest) is None:
            return PrunedApprovals()
        await open_own_archive(self._database, manifest)
        finished = PrunedApprovals()
        for entry in reversed(manifest.of_kind("approvals")):
            records = await in_thread(partial(read_approvals, manifest, entry))
            archived = {UUID(record["approval"]["approval_id"]): record for record in records}
            async with self._database.read() as connection:
                left = select(_approvals).where(_approvals.c.approval_id.in_(archived), _is_over(db_now()))
                found = {row["approval_id"]: _plain(row) for row in await Statement(left).rows(connection, {})}
                votes = await _of(connection, _votes, list(found))
            # After a restore, another decision may have been made since.
            ids = [
                each
                for each, row in found.items()
                if archived[each]["approval"].items() <= row.items() and archived[each]["votes"] == votes.get(each, [])
            ]
            if ids:
                finished += await self._delete(ids, 0, still_locked)
            # A file that takes the place of another one was written by an erasure.
            if entry.replaces is None:
                break
        return finished

    async def step(self, still_locked: StillHeld) -> PrunedApprovals:
        """Prune one batch; of none approvals at the end."""
        async with self._database.read() as connection:
            over = select(_approvals).where(_is_over(self._before)).order_by(_approvals.c.id).limit(_BATCH_ROWS)
            found = await Statement(over).rows(connection, {})
            ids = [row["approval_id"] for row in found]
            votes = await _of(connection, _votes, ids)
            delivered = await _of(connection, _notices, ids, _notices.c.status == "DELIVERED")
        if not ids:
            return PrunedApprovals()
        files = 0
        if (manifest := self._manifest) is not None:
            records = [
                {"approval": _plain(row), "votes": votes.get(row["approval_id"], []),
                 "notices": delivered.get(row["approval_id"], [])}
                for row in found
            ]  # fmt: skip
            day = utc_now().date().isoformat()
            written = await in_thread(lambda: write_approvals(manifest, day, records))
            await still_locked()
            await in_thread(lambda: manifest.append([written]))
            files = 1
        return await self._delete(ids, files, still_locked)

    @retry_conflicts
    async def _delete(self, ids: Sequence[Any], files: int, still_locked: StillHeld) -> PrunedApprovals:
        async with self._database.write() as connection:
            if self._manifest is None:
                await require_archive(connection, await lock_holds(connection))
            own = _notices.c.approval_id.in_(ids), _notices.c.status == "DELIVERED"
            # Before the first lock: what is delivered while this waits for it is neither archived nor counted.
            notices = (await connection.execute(select(_notices.c.id).where(*own))).scalars().all()
            # In the order in which a gateway locks them.
            await connection.execute(delete(_approvals).where(_approvals.c.approval_id.in_(ids)))
            await connection.execute(delete(_votes).where(_votes.c.approval_id.in_(ids)))
            remove = _REMOVE_NOTICES.compiled(connection.dialect).statement
            await connection.execute(remove, {"p_ids": notices})
            facts = {
                "approvals": len(ids),
                "notices": len(notices),
                "before": self._before.isoformat(),
                "archived": self._manifest is not None,
            }
            why = "Approvals older than the retention were pruned."
            await write_door(connection, PRUNE_APPROVALS, facts, by=self._by, environment=self._environment, why=why)
            await still_locked()
        return PrunedApprovals(approvals=len(ids), notices=len(notices), files=files)


def _is_over(before: datetime | ColumnElement[datetime]) -> ColumnElement[bool]:
    """The condition of approvals that ended before, and that no event cites."""
    approval = _approvals.c
    ended = func.coalesce(approval.used_at, approval.decision_at, approval.expires_at)
    is_over = or_(
        and_(approval.status.in_(("DENIED", "EXPIRED", "CANCELLED", "USED")), ended < before),
        and_(approval.status == "PENDING", approval.expires_at < before),
        and_(approval.status == "APPROVED", func.coalesce(approval.use_before, approval.expires_at) < before),
    )
    cites = exists().where(events.c.approval_id == approval.approval_id)
    is_of_its_call = exists().where(events.c.request_id == approval.request_id, events.c.org_id == approval.org_id)
    return and_(is_over, approval.created_at < before, ~cites, ~is_of_its_call)


async def _of(connection: AsyncConnection, table: Table, ids: Sequence[Any], *where: Any) -> dict[Any, list[Any]]:
    """Return the rows about some approvals, by approval."""
    found: dict[Any, list[Any]] = {}
    statement = select(table).where(table.c.approval_id.in_(ids), *where).order_by(table.c.id)
    for row in await Statement(statement).rows(connection, {}):
        found.setdefault(row["approval_id"], []).append(_plain(row))
    return found


def _plain(row: Any) -> dict[str, Any]:
    plain: dict[str, Any] = to_jsonable_python({name: value for name, value in row.items() if name not in _SECRET})
    return plain
