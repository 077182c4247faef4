"""The outbox of an open store: approvals hand it the notices that are committed, and it sends them."""

from __future__ import annotations

import asyncio
import logging
from uuid import uuid4

from agent_gateway_store._concurrency import BackgroundTasks
from agent_gateway_store.delivery.worker import DeliveryWorker
from agent_gateway_store.errors import StoreNotOpenError
from agent_gateway_store.hooks.dispatch import Dispatcher
from agent_gateway_store.models.delivery import Leased
from agent_gateway_store.models.values import Notice
from agent_gateway_store.settings import StoreSettings
from agent_gateway_store.storage.database import Database

_logger = logging.getLogger("agent_gateway_store.notifications")


class StoreOutbox:
    """The outbox of one store: knows the notifiers while it is open, and sends what was committed."""

    def __init__(self, database: Database, settings: StoreSettings) -> None:
        self._database, self._settings = database, settings
        self._dispatcher: Dispatcher | None = None
        self._worker: DeliveryWorker | None = None
        self._names: tuple[str, ...] = ()
        self._is_closing = False
        self._events = BackgroundTasks()

    @property
    def worker(self) -> DeliveryWorker:
        """The worker of the open store.

        Raises:
            StoreNotOpenError: It is not open.
        """
        if self._worker is None:
            raise StoreNotOpenError("The store is not open: use `async with GatewayStore() as store:` or `open()`.")
        return self._worker

    @property
    def is_open(self) -> bool:
        """True between `open` and the end of `close`."""
        return self._worker is not None

    @property
    def notifiers(self) -> tuple[str, ...]:
        """Names of the notifiers that are loaded; while the store closes, of those that were."""
        return self._names

    @property
    def lease_s(self) -> float | None:
        """For how many seconds a new row is leased to this process; None if it does not send, or is closing."""
        if self._worker is None or self._is_closing or not self._settings.notification_worker:
            return None
        return self._worker.policy.lease_s

    def open(self, dispatcher: Dispatcher, names: tuple[str, ...]) -> None:
        """Send from now on, by an open dispatcher, whose threads the store ends after `close`."""
        self._dispatcher, self._names, self._is_closing = dispatcher, names, False
        self._worker = DeliveryWorker(self._database, dispatcher, names, self._settings)
        if self._settings.notification_worker:
            self._worker.start()

    def send(self, notice: Notice, leased: Leased) -> None:
        """Give the notice to the event hooks and, if this process sends, to the notifiers, in the background."""
        if self._worker is None or self._dispatcher is None:
            # The change is committed, so the caller must not get an error.
            _logger.warning("Approval %s: the store is closed, so its notice is sent later.", notice.approval_id)
            return
        if self._dispatcher.has_event_hooks:
            self._events.start(self._dispatcher.emit(notice.model_copy(update={"delivery_id": uuid4()})))
        if self._settings.notification_worker:
            # Once the caller has its answer: preparing twenty attempts takes as long as a fast commit.
            asyncio.get_running_loop().call_soon(self._worker.send, notice, leased)

    async def close(self) -> None:
        """Let notices under way arrive, at most PLUGIN_TIMEOUT_SECONDS and a second; the rest stays DUE."""
        worker, self._is_closing = self._worker, True
        timeout_s = self._settings.plugin_timeout_seconds + 1
        await asyncio.sleep(0)  # what was handed over last is on its way now
        try:
            if worker is not None:
                await worker.close(timeout_s)
            await self._events.join(timeout_s)
        finally:
            self._worker = self._dispatcher = None
