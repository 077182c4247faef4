"""`store.evidence`: a sealed log that others can verify."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from functools import cached_property, partial
from os import PathLike
from pathlib import Path
from typing import Any

from agent_gateway_store._concurrency import BackgroundTasks
from agent_gateway_store._text import escape
from agent_gateway_store.errors import GatewayStoreError, LogMismatchError
from agent_gateway_store.evidence import proof, publish, verify
from agent_gateway_store.evidence.sealer import Sealer, last_checkpoint, may_not_write
from agent_gateway_store.evidence.tiles import read_tiles
from agent_gateway_store.evidence.tree import TileHashes
from agent_gateway_store.hooks.dispatch import PluginHooks
from agent_gateway_store.hooks.executor import awaited
from agent_gateway_store.models.evidence import Checkpoint, Verification
from agent_gateway_store.settings import StoreSettings
from agent_gateway_store.storage.database import Database
from agent_gateway_store.storage.files import progress_bar
from agent_gateway_store.storage.filters import require_all
from agent_gateway_store.telemetry import traced

CHECKPOINT = "gateway_store_checkpoint"
_logger = logging.getLogger("agent_gateway_store.hooks")


class CheckpointHooks(PluginHooks):
    """Hands each new checkpoint to the plugins, in the background."""

    @cached_property
    def _tasks(self) -> BackgroundTasks:
        return BackgroundTasks()

    def notify(self, checkpoint: Checkpoint) -> None:
        """Hand over a checkpoint that is committed."""
        for name, caller in self._plugins().callers(CHECKPOINT).items():
            self._tasks.start(self._call(name, caller, checkpoint))

    async def close(self) -> None:
        """Wait for the plugins for as long as one call may take."""
        await self._tasks.join(self._executor.timeout_s)

    async def _call(self, name: str, caller: Callable[..., list[object]], checkpoint: Checkpoint) -> None:
        failure = await self._executor.run("checkpoint", name, partial(_hand_over, caller, checkpoint))
        if failure is not None:
            _logger.warning("Plugin %s failed to take a checkpoint: %s", escape(name), failure.text)


async def _hand_over(caller: Callable[..., list[Any]], checkpoint: Checkpoint) -> None:
    await awaited(caller(checkpoint=checkpoint))


class EvidenceManager:
    """`store.evidence`: seals the audit log, verifies it, and proves from it what happened.

    On a store that is bound to one organisation only `prove` works, since the log is that of all organisations.

    Args:
        database: Where the log is.
        sealer: Seals it.
        settings: Whether this store seals by itself, and the key of argument hashes.
        org_id: The organisation; None: all.
    """

    def __init__(
        self, database: Database, sealer: Sealer, settings: StoreSettings, *, org_id: str | None = None
    ) -> None:
        self._database, self._sealer, self._org_id = database, sealer, org_id
        self._seals = settings.audit_seal_seconds > 0
        self._hash_key = settings.hash_key.get_secret_value() if settings.hash_key else None

    @traced("log.seal")
    async def seal(self) -> Checkpoint | None:
        """Give every event that is committed its position in the log, and return the checkpoint over all of them.

        Another sealer at work, in any process, is waited for. Safe to repeat and to kill: there is never a gap, and no
        event is sealed twice.

        Returns:
            The checkpoint; None: there is no event.

        Raises:
            LogMismatchError: The log does not agree with its last checkpoint, so nothing is added to it.
            StoreUnavailableError: The database is away, or this role may not write.
            ValueError: The store is bound to one organisation.
        """
        require_all(self._org_id)
        return await self._sealer.seal()

    async def checkpoint(self) -> Checkpoint | None:
        """Return the last checkpoint, or None; ValueError on a store that is bound to one organisation."""
        require_all(self._org_id)
        async with self._database.connection("read") as connection:
            return await last_checkpoint(connection)

    async def verify(
        self,
        *,
        against: Iterable[str | Checkpoint] = (),
        keys: Iterable[str] = (),
        archive: str | PathLike[str] | Iterable[str | PathLike[str]] | None = None,
        progress: bool | Callable[[int], None] = False,
    ) -> Verification:
        """Recompute the log from the columns of its events, and say what does not fit.

        Takes constant memory. Three statements, apart from each other: integrity (`ok`), anchoring (`anchored`: up to
        which size a checkpoint that was kept elsewhere vouches for it) and completeness (`unsealed`). It sees the
        database as it is at one moment; events that were not sealed then are sealed afterwards, if nothing was found
        and this store may write and seals by itself.

        Args:
            against: Checkpoints that were kept elsewhere, or their notes.
            keys: Verifier keys (vkeys) of which one must have signed each of those, and the last checkpoint.
            archive: The folder to which events were pruned, or several; each event in it is checked as well, and one
                that must be there and is not is a finding.
            progress: True shows a progress bar; a function is called with the events checked so far.

        Raises:
            InvalidEvidenceError: What was kept cannot be read as a checkpoint.
            StoreUnavailableError: The database is away.
            ValueError: A key cannot be read, or the store is bound to one organisation.
        """
        require_all(self._org_id)
        folders = [archive] if isinstance(archive, str | PathLike) else archive or ()
        with progress_bar(progress, "Verifying the log") as report:
            found = await verify.verify(
                await self._up_to_date(), against=against, keys=keys, archives=[*map(Path, folders)], report=report
            )
        if found.ok and found.unsealed and self._seals:
            # What is committed and was missed: ids of transactions are given out again after a crash of the server.
            try:
                await self._sealer.seal(wait=False, anew=True)
            except GatewayStoreError as exc:
                if not may_not_write(exc):
                    raise
        return found

    async def _up_to_date(self) -> Database:
        """Return the replica if it has the last checkpoint: where it lags, one that was kept would be a finding."""
        replica = self._database.replica
        if replica is self._database:
            return replica
        async with replica.connection("read") as connection:
            there = await last_checkpoint(connection)
        return replica if there == await self.checkpoint() else self._database

    async def prove(self, request_id: str) -> proof.Evidence:
        """Return the evidence of one event: what happened, who approved it, and the proof that the log holds it.

        Of several events with this id the newest is taken. It shows the log's size and the event's position.

        Raises:
            AuditEventNotFoundError: There is no such event.
            LogMismatchError: A hash of the log is missing.
            StoreUnavailableError: The database is away.
        """
        return await proof.prove(
            self._database, self._read_tiles, request_id, org_id=self._org_id, hash_key=self._hash_key
        )

    async def publish(self, folder: str | PathLike[str]) -> Checkpoint | None:
        """Write the last checkpoint and the hash tiles below it to a folder, which any web server can serve.

        No event and no salt is among them. Readers, meanwhile or after a crash, find a checkpoint with all its
        tiles. Full tiles under the checkpoint that is there are written again only where one is missing or was cut:
        if one was damaged otherwise, publish to an empty folder. Another process that publishes there is waited for.

        Returns:
            The checkpoint; None: there is none, and nothing was written.

        Raises:
            LogMismatchError: The folder holds another log, or another past of this one; or a hash is missing or wrong.
            OSError: The folder cannot be written.
            StoreUnavailableError: Another process publishes there, or the database is away.
            ValueError: The store is bound to one organisation.
        """
        checkpoint = await self.checkpoint()
        if checkpoint is None:
            return None
        async with publish.publish_lock(Path(folder)):
            # The process that was waited for may have published a later one.
            checkpoint = await self.checkpoint() or checkpoint
            try:
                await publish.publish(Path(folder), checkpoint, self._read_tiles)
            except LookupError as exc:
                raise LogMismatchError("A hash of the log is missing: run `gateway-store evidence verify`.") from exc
        return checkpoint

    async def _read_tiles(self, wanted: Iterable[tuple[int, int]]) -> TileHashes:
        async with self._database.connection("read") as connection:
            return await read_tiles(connection, list(wanted))
