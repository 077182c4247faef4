"""Changes of approvals: written with what others learn of them, and published once they are committed."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from sqlalchemy.ext.asyncio import AsyncSession

from agent_gateway_store import telemetry
from agent_gateway_store._concurrency import BackgroundTasks
from agent_gateway_store.approval import decisions
from agent_gateway_store.approval.cache import ApprovalCache
from agent_gateway_store.approval.decisions import VoteInput
from agent_gateway_store.approval.outbox_rows import Change, Outbox, PersistOnlyOutbox, decide_at_once, enqueue
from agent_gateway_store.approval.queries import ApprovalRef, StoredApproval, result_of
from agent_gateway_store.approval.waiting import Waiting
from agent_gateway_store.hooks.dispatch import Vetoes
from agent_gateway_store.models.approval import ApprovalRequest, ApprovalResult
from agent_gateway_store.settings import StoreSettings
from agent_gateway_store.storage.asyncpg_pool import RawConnection
from agent_gateway_store.storage.cache import RedisClient
from agent_gateway_store.storage.database import AnyConnection, SessionTransactions, Transactions
from agent_gateway_store.storage.errors import retry_conflicts
from agent_gateway_store.storage.redis_cache import RedisCache


@dataclass(frozen=True, slots=True)
class ApprovalBackend:
    """What approvals work with: one for each store, shared by its views, or one for a session of the caller's.

    Attributes:
        vetoes: The plugins that may object to a vote; None: none.
        waiting: Wakes the tasks that wait for decisions; None: they poll.
        background: As for `Asking`; None for a session of the caller's.
    """

    transactions: Transactions
    redis: RedisCache
    settings: StoreSettings
    outbox: Outbox = field(default_factory=lambda: PersistOnlyOutbox(()))
    vetoes: Vetoes | None = None
    waiting: Waiting | None = None
    background: BackgroundTasks | None = None


def in_session(
    session: AsyncSession, redis: RedisClient | None, settings: StoreSettings | None, notifiers: Iterable[str]
) -> ApprovalBackend:
    """Return the backend of a session of the caller's; errors as for `ApprovalManager`."""
    settings = settings or StoreSettings()
    transactions = SessionTransactions(session, ApprovalRequest, atomic=True)
    guarded = RedisCache(redis, timeout_s=settings.redis_timeout_seconds)
    return ApprovalBackend(transactions, guarded, settings, PersistOnlyOutbox(notifiers))


class Changes:
    """Writes and publishes changes, whoever made them."""

    def __init__(self, transactions: Transactions, outbox: Outbox, cache: ApprovalCache, waiting: Waiting) -> None:
        self.transactions, self.outbox, self.cache, self.waiting = transactions, outbox, cache, waiting

    @retry_conflicts
    async def decide(self, ref: ApprovalRef, vote: VoteInput, *, allow_self: bool, use_s: float) -> Change:
        """Decide by one statement where that can be, else in a transaction; arguments as for `decisions.decide`."""

        async def in_transaction(connection: AnyConnection) -> Change:
            decided = await decisions.decide(connection, ref, vote, allow_self=allow_self, use_s=use_s)
            return (await self.enqueue(connection, [decided]))[0]

        async with self.transactions.connection("autocommit") as connection:
            if not isinstance(connection, RawConnection):
                # Then this is a transaction.
                return await in_transaction(connection)
            values = {**ref.values, **vote.values, "p_allow_self": allow_self, "p_ttl_s": use_s}
            pubsub = self.waiting.pubsub
            decided = await decide_at_once(
                connection,
                vote.decision,
                ref.by,
                values,
                outbox=self.outbox,
                publishes=pubsub is not None and pubsub.notifies,
            )
            if decided is not None:
                return decided
            async with connection.transaction():
                return await in_transaction(connection)

    async def expire(self, org_id: str | None, batch_size: int) -> int:
        """Write EXPIRED to what is overdue, a transaction for each batch; return how many there were."""
        swept = 0
        while True:
            changes = await self._expire_batch(org_id, batch_size)
            for change in changes:
                await self.publish(change)
            swept += len(changes)
            if len(changes) < batch_size:
                return swept

    @retry_conflicts
    async def _expire_batch(self, org_id: str | None, batch_size: int) -> list[Change]:
        async with self.transactions.connection("transaction") as connection:
            swept = await decisions.expire(connection, org_id=org_id, batch_size=batch_size)
            return await self.enqueue(connection, swept)

    async def enqueue(self, connection: AnyConnection, approvals: Sequence[StoredApproval]) -> list[Change]:
        """Write, in the transaction that changes them, what other processes and the notifiers learn of approvals."""
        if self.waiting.pubsub is not None:
            for approval in approvals:
                await self.waiting.pubsub.notify(connection, str(approval.request.approval_id))
        return await enqueue(connection, approvals, self.outbox)

    async def publish(self, change: Change, token: str | None = None) -> ApprovalResult:
        """Publish a change whose transaction is committed, and return where the approval stands."""
        approval, notice, leased = change
        approval_id = approval.request.approval_id
        known = token or await self.cache.token_of(approval_id)
        # Before anybody can learn of the change: a read that began before it must not be shared from now on.
        self.waiting.note_change()
        pubsub = self.waiting.pubsub
        if notice is None or pubsub is None:
            await self.cache.put(approval, known)
        else:
            await self.cache.put(approval, known, message=pubsub.message(str(approval_id)))
            pubsub.notify_local(str(approval_id))
        if notice is not None:
            self.outbox.send(notice, leased)
            if notice.decided_at is not None and notice.created_at is not None:
                waited_s = (notice.decided_at - notice.created_at).total_seconds()
                telemetry.record("approvals.decision_time", waited_s, status=str(notice.status))
        return result_of(approval.request, token)

    async def publish_use(self, approval: StoredApproval, token: str | None) -> ApprovalResult:
        """Publish that an approval was used, or has its outcome: of that nobody is notified."""
        self.waiting.note_change()
        await self.cache.put(approval, token)
        return result_of(approval.request, token)
