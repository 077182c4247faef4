"""`store.retention`: what is kept, for how long, and what goes."""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncIterator, Awaitable, Callable, Collection
from contextlib import asynccontextmanager, suppress
from datetime import datetime, timedelta
from os import PathLike
from pathlib import Path
from typing import Unpack
from uuid import UUID

from sqlalchemy import select

from agent_gateway_store.archive.manifest import archive_lock
from agent_gateway_store.audit.filters import Filters
from agent_gateway_store.encoding.plain import is_text
from agent_gateway_store.errors import GatewayStoreError
from agent_gateway_store.evidence.sealer import Sealer
from agent_gateway_store.models.retention import Erased, FoundRecord, Hold, Pruned, PrunedApprovals
from agent_gateway_store.results import Page
from agent_gateway_store.retention import find, holds
from agent_gateway_store.retention.approvals import ApprovalPruner
from agent_gateway_store.retention.erase import Eraser
from agent_gateway_store.retention.prune import Pruner, Step
from agent_gateway_store.settings import StoreSettings
from agent_gateway_store.storage.database import Database
from agent_gateway_store.storage.db_clock import db_now
from agent_gateway_store.storage.exclusive import POLL_S, ExclusiveLock, StillHeld
from agent_gateway_store.storage.files import progress_bar
from agent_gateway_store.storage.filters import Moment, instant, require_all
from agent_gateway_store.telemetry import traced

# Chosen: holds and erasures wait so long for a prune, and a batch may take a second itself.
_TURN_S = 0.5
# Any number that is not used otherwise: the bytes of "agwhold".
LOCK_KEY = int.from_bytes(b"agwhold", "big")
# Chosen: many times what a prune holds it for, and less than the timeout of one command.
_WAIT_S = 20.0
PAUSE_S = 3 * POLL_S
"""Seconds for which a prune leaves the lock alone between two turns: processes that wait for it try meanwhile."""


def retention_lock(database: Database) -> ExclusiveLock:
    """Return the lock of one database; within a store there must be one of it."""
    return ExclusiveLock(
        database, key=LOCK_KEY, suffix=".retention.lock", wait_s=_WAIT_S, busy="Another retention command is at work"
    )


class RetentionManager:
    """`store.retention`: holds, pruning into an archive, erasing.

    For a role that owns the tables: the gateway's own role needs no right to delete. Everything that it does is written
    to the log as an event of its own. On a store that is bound to one organisation only `erase` and `find` work.

    Args:
        database: Where the log is.
        sealer: Seals it.
        lock: Lets one of these commands work at a time, in all processes.
        forget: Deletes the Redis entries of approvals; False where Redis does not answer.
        org_id: The organisation; None: all.
    """

    def __init__(
        self,
        database: Database,
        sealer: Sealer,
        lock: ExclusiveLock,
        settings: StoreSettings,
        *,
        forget: Callable[[Collection[UUID]], Awaitable[bool]],
        org_id: str | None = None,
    ) -> None:
        self._database, self._sealer, self._lock, self._settings = database, sealer, lock, settings
        self._environment, self._forget, self._org_id = settings.environment, forget, org_id

    @traced("log.prune")
    async def prune(
        self,
        before: Moment,
        *,
        by: str,
        archive: str | PathLike[str] | None = None,
        discard: bool = False,
        below_floor: bool = False,
        max_seconds: float | None = None,
        progress: bool | Callable[[int], None] = False,
    ) -> Pruned:
        """Take sealed events out of the table, the oldest first, and into an archive.

        Works beside writers, followers and other prunes, in batches; killed anywhere, every event is in the table or in
        the archive, and the next run goes on. Memory does not grow with the number of events. The newest event, held
        events and the events that say what retention did stay.

        Args:
            before: Events from this time on stay: a datetime, or how long ago ("365d").
            by: Who asks for it, as the log will say.
            archive: A folder that is empty, missing, or the archive of this log. Its files and its manifest are on disk
                before a row goes.
            discard: True does without an archive: the events are gone for good.
            below_floor: True also takes events younger than AUDIT_RETENTION_FLOOR_DAYS.
            max_seconds: No batch begins after so many seconds; None: until nothing is left.
            progress: True shows a progress bar; a function is called with the events pruned so far.

        Raises:
            ArchiveError: The folder is not an archive of this log, or a file of it is not what was written; or it holds
                other events at these positions, or one erased that the table has whole, as after a restore. Nothing of
                the batch is pruned.
            LogMismatchError: The log does not agree with its last checkpoint.
            MissingExtraError: `archive`, and pyarrow is not installed.
            OSError: The folder cannot be written. The events are in the table.
            StoreUnavailableError: The database is away, this role may not delete, or another process was in the way.
            ValueError: Neither `archive` nor `discard`, or both; `before` is within the floor; the store is bound to
                one organisation.
        """
        end = await self._checked(before, by, archive, discard=discard, below_floor=below_floor)
        folder = None if archive is None else Path(archive)
        pruner = Pruner(self._database, self._sealer, by=by, environment=self._environment, before=end, archive=folder)
        await self._sealer.seal()
        with progress_bar(progress, "Pruning") as report:
            return await self._run(pruner, folder, max_seconds, report)

    async def _run(
        self, pruner: Pruner, archive: Path | None, max_seconds: float | None, report: Callable[[int], None]
    ) -> Pruned:
        loop = asyncio.get_running_loop()
        deadline = math.inf if max_seconds is None else loop.time() + max_seconds
        total, result = Step(0, 0, None), "the time was up"
        try:
            async with self._writing(archive):
                await pruner.start()
            while loop.time() < deadline:
                total = await self._turn(pruner, archive, total, deadline, report)
                if total.next is None:
                    result = "done"
                    break
                # So that a process that waits for the lock gets it.
                await asyncio.sleep(PAUSE_S)
            held, remaining = await pruner.counts()
        except BaseException as exc:
            with suppress(GatewayStoreError):
                await pruner.end(f"failed: {type(exc).__name__}")
            raise
        await pruner.end(result)
        return Pruned(events=total.events, files=total.files, held=held, remaining=remaining)

    async def _turn(
        self, pruner: Pruner, archive: Path | None, total: Step, deadline: float, report: Callable[[int], None]
    ) -> Step:
        """Prune one batch after the other for a while, at least one; return what became of all so far."""
        loop = asyncio.get_running_loop()
        async with self._writing(archive) as still_locked:
            end = min(loop.time() + _TURN_S, deadline)
            while True:
                step = await pruner.step(total.next, still_locked)
                total = Step(total.events + step.events, total.files + step.files, step.next)
                report(total.events)
                if total.next is None or loop.time() >= end:
                    return total

    async def hold(self, name: str, *, reason: str, by: str, **filters: Unpack[Filters]) -> Hold:
        """Keep events from being pruned and erased, whatever else is asked, until the hold is released.

        What it covers is decided when it matters, so events that arrive later are covered as well. It is in force when
        this returns: a batch that is being pruned is waited for.

        Args:
            name: By which it is released.
            reason: Why, as the log will say.
            by: Who asks for it.
            filters: As of `search`; none covers every event. "24h" counts from now, once, by the database's clock.

        Raises:
            StoreUnavailableError: The database is away, or this role may not do it.
            TypeError: There is no such filter.
            ValueError: There is a hold of this name, or no such value; the store is bound to one organisation.
        """
        require_all(self._org_id)
        holds.require_named(name=name, reason=reason, by=by)
        async with self._lock(), self._database.write() as connection:
            return await holds.place(connection, name, filters, reason=reason, by=by, environment=self._environment)

    async def release_hold(self, name: str, *, by: str) -> Hold:
        """Release a hold, and return what it was.

        Raises:
            StoreUnavailableError: The database is away, or this role may not do it.
            HoldNotFoundError: There is no hold of this name.
            ValueError: The store is bound to one organisation.
        """
        require_all(self._org_id)
        holds.require_named(by=by)
        async with self._lock(), self._database.write() as connection:
            return await holds.release(connection, name, by=by, environment=self._environment)

    async def holds(self) -> Page[Hold]:
        """Return the holds in force, oldest first; ValueError on a store that is bound to one organisation."""
        require_all(self._org_id)
        async with self._database.read() as connection:
            return Page(await holds.read_holds(connection, repairs=True))

    async def erase(
        self, request_id: str, *, reason: str, by: str, archive: str | PathLike[str] | None = None
    ) -> Erased:
        """Blank what one request held: arguments, labels, free texts, and every hash by which they could be guessed.

        In the table, or in the archive, whose file is written anew; with the request's approvals, their votes and
        notices, in SQL and in Redis. Who called which tool when, and what was decided, stays. So does the leaf: the log
        verifies, and says "erased". What arrives later under this id is kept blanked. Killed anywhere, a second call
        completes it. Backups, exports, and what notifiers received are not reached.

        Args:
            request_id: Of the event. In several organisations: use a store that is bound to one.
            reason: Why, as the log will say.
            by: Who asks for it.
            archive: Where pruned events are; None: only the table is looked at.

        Raises:
            ArchiveError: As of `prune`. Nothing is erased.
            AuditEventNotFoundError: There is no such event.
            EventHeldError: A hold covers it, or another event of an approval that would go with it.
            StoreUnavailableError: The database or Redis is away, this role may not do it, or another process works
                on the archive.
            ValueError: An approval of the request is still open; or several organisations have this id; or it has an
                approval and no `archive`, while a hold is in force that may cover an archived event of that approval.
        """
        holds.require_named(reason=reason, by=by)
        await self._sealer.seal()
        folder = None if archive is None else Path(archive)
        eraser = Eraser(
            self._database,
            self._sealer,
            org_id=self._org_id,
            environment=self._environment,
            archive=folder,
            forget=self._forget,
        )
        async with self._writing(folder) as still_locked:
            return await eraser.erase(request_id, still_locked, reason=reason, by=by)

    async def find(
        self, *, caller_id: str | None = None, text: str | None = None, archive: str | PathLike[str] | None = None
    ) -> Page[FoundRecord]:
        """Return what an erasure request is about: events and approvals, of a caller or that hold a text, or both.

        Args:
            caller_id: Of the caller.
            text: Part of arguments, ids, labels, rationales or notes, in upper or lower case (beyond ASCII as of
                `search`). The escapes of JSON hide nothing.
            archive: Where pruned events are; None: only the tables are looked at.

        Raises:
            ArchiveError: The folder is not an archive, or a file of it is not what was written.
            StoreUnavailableError: The database is away.
            ValueError: Neither `caller_id` nor `text`.
        """
        if caller_id is None and text is None:
            raise ValueError("Give caller_id, text, or both: what is looked for.")
        folder = None if archive is None else Path(archive)
        found = await find.find(self._database, caller_id=caller_id, text=text, org_id=self._org_id, archive=folder)
        return Page(found, record_type=FoundRecord)

    async def prune_approvals(
        self,
        before: Moment,
        *,
        by: str,
        archive: str | PathLike[str] | None = None,
        discard: bool = False,
        below_floor: bool = False,
    ) -> PrunedApprovals:
        """Take approvals that are over out of the table, with votes and delivered notices.

        One that an event in the table cites stays, so it goes after its event, and never while that is held. In the
        archive they are lines of JSON. Killed anywhere, every approval is in the table or in the archive.

        Args:
            before: Approvals that ended from this time on stay: a datetime, or how long ago ("365d").
            by: Who asks for it, as the log will say.
            archive: As of `prune`; the same folder, or another one.
            discard: True does without an archive: they are gone for good.
            below_floor: True also takes approvals younger than AUDIT_RETENTION_FLOOR_DAYS.

        Raises:
            ArchiveError: The folder is not an archive of this log, or a file of it is not what was written.
            OSError: The folder cannot be written.
            StoreUnavailableError: The database is away, this role may not delete, or another process works on
                the archive.
            ValueError: As of `prune`; or `discard`, while a hold is in force and events were archived, since it may
                cover events whose approvals these are.
        """
        end = await self._checked(before, by, archive, discard=discard, below_floor=below_floor)
        folder = None if archive is None else Path(archive)
        pruner = ApprovalPruner(self._database, by=by, environment=self._environment, before=end, archive=folder)
        await pruner.require_rights()
        async with self._writing(folder) as still_locked:
            total = await pruner.start(still_locked)
        while True:
            async with self._writing(folder) as still_locked:
                step = await pruner.step(still_locked)
            if not step.approvals:
                return total
            total += step
            await asyncio.sleep(PAUSE_S)

    @asynccontextmanager
    async def _writing(self, archive: Path | None) -> AsyncIterator[StillHeld]:
        """Hold the lock of the database, then that of the archive, which a frozen process keeps."""
        async with self._lock() as still_held:
            if archive is None:
                yield still_held
                return
            async with archive_lock(archive):
                await still_held()
                yield still_held

    async def _checked(self, before: Moment, by: str, archive: object, *, discard: bool, below_floor: bool) -> datetime:
        """Return the end of what may go, after a check that what must be said was said."""
        require_all(self._org_id)
        holds.require_named(by=by)
        if (archive is None) is not discard:
            raise ValueError("Give archive=FOLDER, or discard=True if they are to be gone for good.")
        if not is_text(str(archive)):
            raise ValueError("archive must have a name that UTF-8 can hold, as the log can: rename the folder.")
        instant("before", before)
        # The database's: with this machine's clock ahead, what is young would go.
        async with self._database.read() as connection:
            now: datetime = (await connection.execute(select(db_now()))).scalar_one()
        end, days = instant("before", before, now=now), self._settings.audit_retention_floor_days
        if not below_floor and end > now - timedelta(days=days):
            raise ValueError(
                f"before is less than {days:g} days ago (AUDIT_RETENTION_FLOOR_DAYS): choose an earlier time, or pass "
                "below_floor=True (`--below-floor`)."
            )
        return min(end, now)
