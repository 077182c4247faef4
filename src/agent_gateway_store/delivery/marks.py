"""Write down how tries went, many in one statement."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any
from uuid import UUID

from sqlalchemy import Float, Integer, Text, Uuid, and_, case, literal_column, or_, update

from agent_gateway_store._text import describe
from agent_gateway_store.delivery.claims import Delivery, deliveries
from agent_gateway_store.errors import StoreNotOpenError
from agent_gateway_store.models.delivery import DeliveryStatus
from agent_gateway_store.storage.database import Transactions, dialect_of
from agent_gateway_store.storage.db_clock import db_now
from agent_gateway_store.storage.rows import RowsParameter
from agent_gateway_store.storage.statements import Statement

__all__ = ["Mark", "Marks"]

_LINGER_S = 0.2
_RETRY_S = 1.0
_MOST = 500

_logger = logging.getLogger("agent_gateway_store.notifications")


@dataclass(frozen=True, slots=True)
class Mark:
    """What became of one try.

    Attributes:
        delivery: The row.
        status: Where it stands now.
        delay_s: Seconds until it is due again, if it is DUE.
        error: What went wrong, if anything did.
        attempts: How many tries count from now on.
    """

    delivery: Delivery
    status: DeliveryStatus
    attempts: int
    delay_s: float = 0.0
    error: str | None = None

    @classmethod
    def untried(cls, delivery: Delivery) -> Mark:
        """A row that goes back as if it had not been claimed."""
        return cls(delivery, DeliveryStatus.DUE, delivery.attempt - 1)


_MARKS = RowsParameter(
    "marks",
    {
        "delivery_id": Uuid(),
        "attempt": Integer(),
        "attempts": Integer(),
        "status": Text(),
        "error": Text(),
        "delay_s": Float(53),
    },
)


def _mark(dialect: str) -> Any:
    given = _MARKS.table(dialect).c
    is_delivered = given.status == literal_column("'DELIVERED'")
    return (
        update(deliveries)
        .where(
            deliveries.c.delivery_id == given.delivery_id,
            # What has arrived has arrived, whoever holds the row now; all else is for the holder to say.
            or_(
                and_(is_delivered, deliveries.c.status != literal_column("'DELIVERED'")),
                and_(deliveries.c.status == literal_column("'DUE'"), deliveries.c.attempts == given.attempt),
            ),
        )
        .values(
            status=given.status,
            attempts=given.attempts,
            last_error=given.error,
            delivered_at=case((is_delivered, db_now())),
            next_attempt_at=case(
                (given.status == literal_column("'DUE'"), db_now(plus=given.delay_s)),
                else_=deliveries.c.next_attempt_at,
            ),
        )
        .returning(deliveries.c.delivery_id)
    )


_MARK = Statement(_mark)


class Marks:
    """Collects marks and writes those that came meanwhile together; while the database is away it keeps them.

    Args:
        transactions: Where the rows are.
        written: Is called with the marks of each transaction, after it.
    """

    def __init__(self, transactions: Transactions, written: Callable[[Sequence[Mark]], None]) -> None:
        self._transactions = transactions
        self._written = written
        self._waiting: list[Mark] = []
        self._task: asyncio.Task[None] | None = None
        self._urgent = asyncio.Event()
        self._tried = asyncio.Event()
        self._fault: Exception | None = None
        self._delivered: dict[UUID, None] = {}

    def add(self, mark: Mark) -> None:
        """Write it down soon: each commit costs the disk as much as one of the gateway's own."""
        self._waiting.append(mark)
        if len(self._waiting) >= _MOST:
            self._urgent.set()
        if mark.status is DeliveryStatus.DELIVERED:
            self._delivered[mark.delivery.delivery_id] = None
        self._start()

    def is_delivered(self, delivery_id: UUID) -> bool:
        """True if it has arrived and the database has not heard of it yet."""
        return delivery_id in self._delivered

    @property
    def is_empty(self) -> bool:
        """True if everything is written."""
        return not self._waiting and not self._is_writing

    def hurry(self) -> None:
        """Write what there is at once: somebody waits for it."""
        self._urgent.set()

    async def flush(self, *, patient: bool = True) -> None:
        """Write at once, and wait until it is done.

        Args:
            patient: Also while the database is away.

        Raises:
            StoreUnavailableError: Unless `patient`: the database is away. What there is to write stays.
        """
        while not self.is_empty:
            self._start()  # one that was cancelled has left its marks
            self._urgent.set()
            self._tried.clear()
            await self._tried.wait()
            if self._fault is not None and not patient:
                raise self._fault

    async def drop(self) -> None:
        """Stop writing; what is left is sent again when its lease ends."""
        self._waiting.clear()
        if (task := self._task) is not None:
            task.cancel()
            await asyncio.wait({task})

    @property
    def _is_writing(self) -> bool:
        return self._task is not None and not self._task.done()

    def _start(self) -> None:
        if not self._is_writing:
            self._task = asyncio.get_running_loop().create_task(self._write())
            self._task.add_done_callback(lambda _: self._tried.set())

    async def _write(self) -> None:
        with suppress(TimeoutError):
            async with asyncio.timeout(_LINGER_S):
                await self._urgent.wait()
        while self._waiting:
            batch = self._waiting[:_MOST]
            try:
                await _write(self._transactions, batch)
            except StoreNotOpenError:
                self._waiting.clear()  # it was closed meanwhile: these are sent again when their lease ends
                break
            except Exception as exc:
                if self._fault is None:
                    _logger.warning(
                        "How %d notices went could not be written yet: %s", len(self._waiting), describe(exc)
                    )
                self._fault = exc
                self._tried.set()
                await asyncio.sleep(_RETRY_S)
                continue
            self._fault = None
            del self._waiting[: len(batch)]
            for mark in batch:
                self._delivered.pop(mark.delivery.delivery_id, None)
            self._written(batch)
            self._tried.set()
        self._urgent.clear()


async def _write(transactions: Transactions, marks: Sequence[Mark]) -> None:
    rows = [
        {
            "delivery_id": mark.delivery.delivery_id,
            "attempt": mark.delivery.attempt,
            "attempts": mark.attempts,
            "status": mark.status.value,
            "error": mark.error,
            "delay_s": mark.delay_s,
        }
        for mark in marks
    ]
    async with transactions.connection("autocommit") as connection:
        await _MARK.rows(connection, _MARKS.values(dialect_of(connection), rows))
