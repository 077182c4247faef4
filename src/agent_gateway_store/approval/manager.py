"""`ApprovalManager`: ask, decide once, use once."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from datetime import timedelta
from typing import Any, Self
from uuid import UUID

from sqlalchemy.ext.asyncio import AsyncSession

from agent_gateway_store.approval import deciding, listing, using
from agent_gateway_store.approval.cache import ApprovalCache
from agent_gateway_store.approval.deciding import Ballot
from agent_gateway_store.approval.issuing import Asked, already_issued, end_standing, insert_or_rebind, issue_values
from agent_gateway_store.approval.listing import COLUMNS
from agent_gateway_store.approval.lookup import ApprovalLookup
from agent_gateway_store.approval.notifier import notice_of
from agent_gateway_store.approval.recording import Later, Outbox, insert_and_tell, record
from agent_gateway_store.approval.rows import Name, request_of, require_text, result_of
from agent_gateway_store.approval.statements import CANCEL, DENY, READ, Key
from agent_gateway_store.approval.using import Permission
from agent_gateway_store.approval.vetoing import require_no_veto
from agent_gateway_store.approval.waiting import Waiting
from agent_gateway_store.encoding.sanitize import Scrubber, storable_key
from agent_gateway_store.errors import ApprovalNotFoundError
from agent_gateway_store.hooks.dispatch import Vetoes
from agent_gateway_store.models.approval import (
    ApprovalRequest,
    ApprovalResult,
    ApprovalScope,
    VoteDecision,
    hash_tool_call,
)
from agent_gateway_store.models.values import ApprovalStatus, ToolCall
from agent_gateway_store.settings import StoreSettings
from agent_gateway_store.storage.cache import RedisClient
from agent_gateway_store.storage.database import AnyConnection, Database, SessionTransactions, Transactions
from agent_gateway_store.storage.filters import number, require_between
from agent_gateway_store.storage.redis_cache import RedisCache
from agent_gateway_store.storage.statements import Statement

__all__ = ["COLUMNS", "ApprovalManager"]

_PENDING = ApprovalStatus.PENDING
_LARGEST_BATCH = 10_000
_TRIES = 3  # the approval in the way may be swept or decided while it is asked for again


class ApprovalManager(ApprovalLookup):
    """One decision per approval, one use per approval, in any number of processes.

    SQL decides everything; Redis only makes reads fast, and may be absent, down, flushed or wrong. An approval of
    another organisation looks absent.

    Args:
        session: A session of the caller's; every writing method commits it, and rolls it back when it raises.
        redis: A client of the caller's, or None.
        settings: Default: from the environment.
        org_id: See and change only this organisation; None: all.
        notifiers: Names of notifiers for which a delivery is written with each change, in the session's transaction;
            `gateway-store notifications run` sends them. Default: none.
    """

    def __init__(
        self,
        session: AsyncSession,
        redis: RedisClient | None = None,
        *,
        settings: StoreSettings | None = None,
        org_id: str | None = None,
        notifiers: Iterable[str] = (),
    ) -> None:
        settings = settings or StoreSettings()
        accelerator = RedisCache(redis, timeout_s=settings.redis_timeout_seconds)
        self._set(SessionTransactions(session), accelerator, settings, org_id, Later(notifiers))

    @classmethod
    def over(
        cls,
        database: Database,
        redis: RedisCache,
        settings: StoreSettings,
        *,
        org_id: str | None = None,
        outbox: Outbox | None = None,
        vetoes: Vetoes | None = None,
        waiting: Waiting | None = None,
    ) -> Self:
        """Return a manager that opens its own transactions.

        Notices go through `outbox`; before a vote or a denial `vetoes` are asked. `waiting`, which the views of one
        store share, publishes decisions to the tasks that wait for them.
        """
        manager = cls.__new__(cls)
        manager._set(database, redis, settings, org_id, outbox or Later(()), waiting)
        manager._vetoes = vetoes
        # Redis would answer where the store is not open, too.
        manager._check_owner = database.check_owner
        return manager

    def _set(
        self,
        transactions: Transactions,
        redis: RedisCache,
        settings: StoreSettings,
        org_id: str | None,
        outbox: Outbox,
        waiting: Waiting | None = None,
    ) -> None:
        self._waiting = waiting or Waiting(None, trust_s=settings.approval_cache_seconds)
        self._pubsub = self._waiting.pubsub
        self._transactions, self._settings, self._org_id, self._outbox = transactions, settings, org_id, outbox
        self._cache = ApprovalCache(redis, trust_s=settings.approval_cache_seconds)
        self._check_owner: Callable[[], None] = lambda: None
        self._vetoes: Vetoes | None = None

    @property
    def _hash_key(self) -> str | None:
        return self._settings.hash_key.get_secret_value() if self._settings.hash_key else None

    async def issue_token(self, request: ApprovalRequest, *, call: ToolCall | None = None) -> str:
        """Ask for an approval and return the token that follows and uses it.

        Asking again for the same call (organisation, caller, request_id, tool call) while it is pending gives the new
        token to the same approval, ends the old token, and notifies nobody. Where anything that is shown or decided
        differs (scope, output, required_approvals, shown call, explanation, a deadline that is given), the pending
        approval is cancelled and a new one is asked, in one transaction: no vote for other terms counts. `request`
        itself is not changed.

        Args:
            request: Its `tool_call` is what approvers see. Its `expires_at`, if None, becomes now +
                APPROVAL_TOKEN_TTL_SECONDS by the database's clock, or stays as the pending approval has it. Its
                `output_hash`, if None, becomes that of `output_payload`.
            call: The call as it will run, if `request.tool_call` is a sanitised one; the permission binds to it.

        Raises:
            ApprovalMismatchError: The request names another organisation than this store is bound to, or its
                `output_hash` is not that of its `output_payload`.
            ApprovalError: The same request object was issued before, and has been decided or changed since.
            StoreUnavailableError: The database is away.
        """
        ttl = timedelta(seconds=self._settings.approval_token_ttl_seconds)
        values = issue_values(request, call=call, org_id=self._org_id, ttl=ttl, hash_key=self._hash_key)
        row, is_new, mine = await self._ask(values)
        self._waiting.note_change()
        token: str = values["p_token"]
        old = None if is_new else await self._cache.token_of(row["approval_id"])
        asked = await self._remember(row, token, is_known=False)
        if old is not None and old != token:
            await self._cache.drop(old)
        if is_new:
            self._outbox.send(notice_of(asked, "pending"), mine)
        return token

    async def _ask(self, values: dict[str, Any]) -> Asked:
        for _ in range(_TRIES):
            async with self._transactions.connection("autocommit") as connection:
                asked = await insert_or_rebind(connection, values, self._outbox)
            if asked is not None:
                return asked
            async with self._transactions.connection("transaction") as connection:
                ended = await end_standing(connection, values)
                mine = await self._record(connection, *ended)
                row, kept = await insert_and_tell(connection, values, self._outbox)
                if row is None and any(each["status"] is ApprovalStatus.CANCELLED for each in ended):
                    # Nothing else can be in the way now: this request's own id or token is taken.
                    raise already_issued(values)
            for each in ended:
                await self._decided(each, None, mine)
            if row is not None:
                return row, True, kept
        raise already_issued(values)

    async def check_token(self, token: str, *, fresh: bool = False) -> ApprovalResult:
        """Return where the approval of `token` stands.

        Args:
            token: As returned by `issue_token`.
            fresh: True reads SQL, by itself; otherwise the answer may be APPROVAL_CACHE_SECONDS old, and any number of
                tasks that find nothing in Redis share their reads of SQL.

        Raises:
            ApprovalNotFoundError: No approval has this token.
            StoreUnavailableError: Neither Redis nor the database answers.
        """
        require_text(token)
        self._check_owner()
        if not fresh and (known := await self._cache.get(token, org_id=self._org_id)) is not None:
            return known
        if fresh:
            return await self._read_and_cache(token)
        return await self._waiting.read(self._org_id, token, lambda: self._read_and_cache(token))

    async def _read_and_cache(self, token: str) -> ApprovalResult:
        return result_of(await self._remember(await self._row(token), token, is_known=False), token)

    async def _row(self, token: str) -> Mapping[str, Any]:
        name = Name(token, None, self._org_id)
        async with self._transactions.connection("read") as connection:
            row = await READ[name.by].first(connection, name.values)
        if row is None:
            raise ApprovalNotFoundError
        return row

    async def approve(
        self,
        token: str | None = None,
        approver_id: str = "",
        note: str = "",
        *,
        approval_id: UUID | str | None = None,
        channel: str = "api",
    ) -> ApprovalResult:
        """Approve, once. With `required_approvals` above 1 this is one voice among several.

        Args:
            token: The token, or None with `approval_id`.
            approver_id: Who decides, as written to the record.
            note: Why.
            approval_id: The handle that approvers see, in place of the token.
            channel: How the decision came: api, cli, slack, ...

        Raises:
            ApprovalNotFoundError: There is no such approval.
            ApprovalAlreadyDecidedError: Somebody decided first; it names whom.
            ApprovalAlreadyVotedError: This approver has voted before.
            ApprovalExpiredError: The deadline has passed.
            SelfApprovalError: The approver is the caller, and ALLOW_SELF_APPROVAL is off.
            DecisionVetoedError: A plugin refuses this decision, or failed when it was asked.
        """
        name = self._name(token, approval_id)
        ballot = Ballot(approver_id, note, channel, VoteDecision.APPROVED)
        await require_no_veto(self._vetoes, self._transactions, name, ballot)
        async with self._transactions.connection("transaction") as connection:
            row = await deciding.approve(connection, name, ballot, allow_self=self._settings.allow_self_approval)
            mine = await self._record(connection, row)
        return await self._decided(row, token, mine)

    async def deny(
        self,
        token: str | None = None,
        approver_id: str = "",
        note: str = "",
        *,
        approval_id: UUID | str | None = None,
        channel: str = "api",
    ) -> ApprovalResult:
        """Deny, once; one denial is enough. Arguments and errors as for `approve`."""
        name = self._name(token, approval_id)
        ballot = Ballot(approver_id, note, channel, VoteDecision.DENIED)
        await require_no_veto(self._vetoes, self._transactions, name, ballot)
        return await self._end(DENY, name, ballot, token)

    async def cancel(
        self,
        token: str | None = None,
        approver_id: str = "",
        note: str = "",
        *,
        approval_id: UUID | str | None = None,
        channel: str = "api",
    ) -> ApprovalResult:
        """Withdraw an approval that is pending, or approved and not used. The caller may cancel, too.

        Arguments and errors as for `approve`; no plugin can refuse it.
        """
        ballot = Ballot(approver_id, note, channel, VoteDecision.CANCELLED)
        return await self._end(CANCEL, self._name(token, approval_id), ballot, token)

    async def _end(
        self, moves: Mapping[Key, Statement], name: Name, ballot: Ballot, token: str | None
    ) -> ApprovalResult:
        async with self._transactions.connection("transaction") as connection:
            row = await deciding.end(connection, name, ballot, moves)
            mine = await self._record(connection, row)
        return await self._decided(row, token, mine)

    async def consume_token(
        self,
        token: str,
        *,
        caller_id: str,
        tool_call: ToolCall | Mapping[str, Any],
        scope: ApprovalScope = ApprovalScope.EXECUTION,
    ) -> ApprovalResult:
        """Use an approval, once: of any number of consumers one returns, and that one may run the call.

        Args:
            token: As returned by `issue_token`.
            caller_id: Must be who asked.
            tool_call: The call as it will run; must be the one that was approved, to the last argument.
            scope: What is about to be done; must be what was approved. For an output see `release_output`, too.

        Raises:
            ApprovalNotFoundError: No approval has this token.
            ApprovalMismatchError: Another caller, another call or another scope.
            ApprovalNotApprovedError: It is pending, denied or cancelled.
            ApprovalExpiredError: The deadline to use it has passed.
            ApprovalAlreadyUsedError: It has released its call.
        """
        require_text(token)
        call = tool_call if isinstance(tool_call, ToolCall) else ToolCall.model_validate(tool_call)
        caller, digest = storable_key(caller_id), hash_tool_call(call, key=self._hash_key)
        bound = Permission(caller, ApprovalScope(scope), digest)
        async with self._transactions.connection("autocommit") as connection:
            row = await using.consume(connection, Name(token, None, self._org_id), bound)
        return result_of(await self._remember(row, token), token)

    async def release_output(self, token: str, *, caller_id: str) -> Any:
        """Use an approval of scope OUTPUT_RELEASE, once, and return the output that was approved.

        Of any number of callers one gets the output. It is the stored payload, checked against its hash; an approval
        whose payload was changed since is not used up. An error after the use may have used it: the output is not
        given a second time.

        Args:
            token: As returned by `issue_token`.
            caller_id: Must be who asked.

        Raises:
            ApprovalNotFoundError: No approval has this token.
            ApprovalMismatchError: Another caller, an approval that releases no output, or a payload that does not
                match its hash.
            ApprovalNotApprovedError: It is pending, denied or cancelled.
            ApprovalExpiredError: The deadline to use it has passed.
            ApprovalAlreadyUsedError: It has released its output.
            StoreUnavailableError: The database is away.
        """
        require_text(token)
        bound = Permission(storable_key(caller_id), ApprovalScope.OUTPUT_RELEASE)
        async with self._transactions.connection("transaction") as connection:
            row = await using.release(connection, Name(token, None, self._org_id), bound, hash_key=self._hash_key)
        await self._remember(row, token)
        return row["output_payload"]

    async def record_outcome(self, token: str, outcome: str) -> ApprovalResult:
        """Note what came of the call, after its use; once. A used approval without an outcome is shown as unknown.

        Raises:
            ApprovalNotFoundError: No approval has this token.
            ApprovalNotApprovedError: It has not been used.
            ApprovalAlreadyUsedError: Another outcome was recorded before (the same one again changes nothing).
        """
        require_text(token)
        text = Scrubber().text("outcome", outcome)
        async with self._transactions.connection("autocommit") as connection:
            row = await using.record(connection, Name(token, None, self._org_id), text)
        return result_of(await self._remember(row, token), token)

    async def wait_for_decision(self, token: str, *, timeout_s: float = 60.0) -> ApprovalResult:
        """Wait until the approval is no longer PENDING, and return how it stands.

        Thousands may wait: a process has one subscription, and one read answers all who wait for the same approval.
        A signal that was missed is caught by a slow poll. Cancelling leaves nothing behind.

        Args:
            token: As returned by `issue_token`.
            timeout_s: Seconds; `math.inf` waits without end. At the timeout the result is returned as it stands, still
                PENDING; nothing is decided.

        Raises:
            ApprovalNotFoundError: No approval has this token.
            StoreUnavailableError: The database is away.
            TypeError, ValueError: `timeout_s` is no number.
        """
        require_text(token)
        self._check_owner()
        return await self._waiting.wait(
            self._org_id, token, lambda: self._read(token), timeout_s=number("timeout_s", timeout_s)
        )

    async def _read(self, token: str) -> ApprovalResult:
        return result_of(request_of(await self._row(token)), token)

    async def expire_stale(self, *, batch_size: int = 500) -> int:
        """Write EXPIRED to what has passed its deadline, and tell the notifiers. Returns how many there were.

        Any number of processes may sweep at once; each approval is swept by one.

        Args:
            batch_size: How many are written in one transaction, 1 to 10,000.

        Raises:
            ValueError: `batch_size` is out of range.
        """
        require_between("batch_size", batch_size, 1, _LARGEST_BATCH, hint="every batch is swept until none is left")
        swept, is_more = 0, True
        while is_more:
            async with self._transactions.write() as connection:
                rows, is_more = await listing.sweep(connection, *self._mine(), batch_size=batch_size)
                mine = await self._record(connection, *rows)
            for row in rows:
                await self._decided(row, None, mine)
            swept += len(rows)
        return swept

    async def _record(self, connection: AnyConnection, *rows: Mapping[str, Any]) -> dict[UUID, dict[str, UUID]]:
        """Write what others learn of these decisions; returns the deliveries kept for this process, by approval."""
        if self._pubsub is not None:
            for row in rows:
                await self._pubsub.notify(connection, str(row["approval_id"]))
        notices = [notice_of(request_of(row), "decision") for row in rows if row["status"] is not _PENDING]
        mine = await record(connection, notices, self._outbox)
        return {notice.approval_id: each for notice, each in zip(notices, mine, strict=True)}

    async def _decided(
        self, row: Mapping[str, Any], token: str | None, mine: Mapping[UUID, Mapping[str, UUID]]
    ) -> ApprovalResult:
        known = token or await self._cache.token_of(row["approval_id"])
        request = request_of(row)
        self._waiting.note_change()
        if request.status is _PENDING or self._pubsub is None:
            await self._cache.put(row, request, known)
        else:
            key = str(request.approval_id)
            await self._cache.put(row, request, known, message=self._pubsub.message(key))
            self._pubsub.notify_local(key)
        if request.status is not _PENDING:
            self._outbox.send(notice_of(request, "decision"), mine.get(request.approval_id, {}))
        return result_of(request, token)

    async def _remember(self, row: Mapping[str, Any], token: str, *, is_known: bool = True) -> ApprovalRequest:
        request = request_of(row)
        if is_known:
            self._waiting.note_change()
        await self._cache.put(row, request, token, is_known=is_known)
        return request
