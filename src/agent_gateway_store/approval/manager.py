"""`ApprovalManager`: ask, decide once, use once."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Iterable, Mapping, Sequence
from datetime import timedelta
from functools import partial
from os import PathLike
from typing import Any, Literal, Unpack
from uuid import UUID

from sqlalchemy.ext.asyncio import AsyncSession

from agent_gateway_store.approval import decisions, issuing, queries, reports
from agent_gateway_store.approval.acquiring import Acquiring, acquire_values
from agent_gateway_store.approval.cache import ApprovalCache
from agent_gateway_store.approval.changes import ApprovalBackend, Changes, in_session
from agent_gateway_store.approval.decisions import Permission, VoteInput
from agent_gateway_store.approval.filters import ApprovalFilters, criteria, waits
from agent_gateway_store.approval.queries import ApprovalRef, result_of
from agent_gateway_store.approval.waiting import Waiting
from agent_gateway_store.encoding.sanitize import storable_key
from agent_gateway_store.models.approval import (
    ApprovalRequest,
    ApprovalResult,
    ApprovalScope,
    VoteDecision,
    hash_tool_call,
)
from agent_gateway_store.models.values import ApprovalStatus, ToolCall
from agent_gateway_store.results import Page, Stats
from agent_gateway_store.settings import StoreSettings
from agent_gateway_store.storage.cache import RedisClient
from agent_gateway_store.storage.export import ExportOptions, ExportResult
from agent_gateway_store.storage.filters import Criteria, require_between
from agent_gateway_store.storage.grouping import grouping
from agent_gateway_store.telemetry import traced

_LARGEST_BATCH = 10_000  # of `expire_stale`: what one transaction writes within a command's time


class ApprovalManager:
    """One decision per approval, one use per approval, in any number of processes.

    SQL decides everything; Redis only makes reads fast, and may be absent, down, flushed or wrong. An approval of
    another organisation looks absent.

    Args:
        session: A session of the caller's; every writing method commits it, and rolls it back when it raises. A store
            gives its `ApprovalBackend` here, which holds all the rest but `org_id`.
        redis: A client of the caller's, or None.
        settings: Default: from the environment.
        org_id: See and change only this organisation; None: all.
        notifiers: Names of notifiers for which a delivery is written with each change, in the session's transaction;
            `gateway-store notifications run` sends them. Default: none.

    Raises:
        TypeError: `session` is not an AsyncSession.
        ValueError: The store cannot work in this session, say in AUTOCOMMIT: the sentence says what to give instead.
    """

    def __init__(
        self,
        session: AsyncSession | ApprovalBackend,
        redis: RedisClient | None = None,
        *,
        settings: StoreSettings | None = None,
        org_id: str | None = None,
        notifiers: Iterable[str] = (),
    ) -> None:
        backend = session if isinstance(session, ApprovalBackend) else in_session(session, redis, settings, notifiers)
        trust_s = backend.settings.approval_cache_seconds
        self._transactions, self._settings = backend.transactions, backend.settings
        self._org_id = org_id
        self._vetoes = backend.vetoes
        self._waiting = backend.waiting or Waiting(None, trust_s=trust_s)
        self._cache = ApprovalCache(backend.redis, trust_s=trust_s)
        self._changes = Changes(self._transactions, backend.outbox, self._cache, self._waiting)
        self._asking = issuing.Asking(self._changes, backend.background)
        self._acquiring = Acquiring(self._changes)

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

        If the caller is cancelled before it has the token, what it newly asked is cancelled in the background, unless
        it was asked for again or voted on meanwhile. (What a session of the caller's has committed stands.)

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
        return await self._asking.issue(self._values(request, call, self._settings.approval_token_ttl_seconds))

    def _values(self, request: ApprovalRequest, call: ToolCall | None, ttl_s: float) -> dict[str, Any]:
        return issuing.issue_values(
            request,
            call=call,
            org_id=self._org_id,
            ttl_s=ttl_s,
            max_pending=self._settings.approval_max_pending,
            hash_key=self._hash_key,
        )

    @traced("approval.acquire", lambda _, request, **__: request.tool_call.tool)
    async def acquire(
        self, request: ApprovalRequest, *, call: ToolCall | None = None, bind: str = "", wait_s: float = 0.0
    ) -> ApprovalResult:
        """Ask, before each run of a call, whether it may go: USED (run it now), PENDING (come back) or DENIED.

        An approval that stands approved is used up by one of any number of callers in any number of processes. One that
        is pending is returned, and nobody is notified again. A denial is returned for APPROVAL_DENIAL_SECONDS. Else a
        new approval is asked for; where the last one was used and its outcome is unknown, its explanation says so.
        The first asking's deadlines and explanation stand; a higher quorum, or another shown call, cancels what stands,
        and asks anew.

        It sees only approvals that `acquire` asked for: of the same organisation, caller, call and `bind`. They have no
        token; `record_outcome` takes their `approval_id`. An error may have used one up: it is never released twice. A
        caller that goes away cancels nothing.

        Args:
            request: As for `issue_token`; its `approval_id` and `token` are not used. Without `expires_at` there are
                ACQUIRE_DECISION_SECONDS to decide, and then APPROVAL_TOKEN_TTL_SECONDS from the decision to use it.
            call: As for `issue_token`.
            bind: Whatever else must be equal for two calls to be the same: a session, an end user.
            wait_s: Seconds to wait for a decision, or for a database that is away; then it looks again.

        Raises:
            ApprovalMismatchError: The request names another organisation than this store is bound to.
            TooManyPendingError: APPROVAL_MAX_PENDING approvals of this caller wait already.
            StoreUnavailableError: The database is away.
            ValueError: The request's scope is not EXECUTION.
        """
        if request.scope is not ApprovalScope.EXECUTION:
            raise ValueError("Only the execution of a call can be acquired: use `issue_token` for an output.")
        values = self._values(request, call, self._settings.acquire_decision_seconds)
        values = acquire_values(values, bind=bind, settings=self._settings)
        return await self._acquiring.acquire(values, wait_s=wait_s)

    async def check_token(self, token: str, *, fresh: bool = False) -> ApprovalResult:
        """Return where the approval of `token` stands.

        Args:
            fresh: True reads SQL, by itself; otherwise the answer may be APPROVAL_CACHE_SECONDS old, and any number of
                tasks that find nothing in Redis share their reads of SQL.

        Raises:
            ApprovalNotFoundError: No approval has this token.
            StoreUnavailableError: Neither Redis nor the database answers.
        """
        ref = ApprovalRef.by_token(token, self._org_id)
        self._transactions.check_owner()
        if fresh:
            return await self._read_and_cache(ref, token)
        cached = await self._cache.get(token, org_id=self._org_id)
        if cached is not None:
            return cached
        return await self._waiting.read(self._org_id, token, lambda: self._read_and_cache(ref, token))

    async def _read_and_cache(self, ref: ApprovalRef, token: str) -> ApprovalResult:
        approval = await queries.get(self._transactions, ref)
        await self._cache.put(approval, token, is_known=False)
        return result_of(approval.request, token)

    async def approve(
        self,
        token: str | None = None,
        approver_id: str = "",
        note: str = "",
        *,
        approval_id: UUID | str | None = None,
        channel: str = "api",
    ) -> ApprovalResult:
        """Approve, once. With `required_approvals` above 1 this is one vote of several.

        Args:
            token: The token, or None with `approval_id`.
            approver_id: Who decides, as written to the record.
            note: Why.
            approval_id: The handle that approvers see, in place of the token.
            channel: How the decision came: api, cli, slack, ...

        Raises:
            ApprovalNotFoundError: There is no such approval.
            ApprovalAlreadyDecidedError: Somebody decided first; the error names them.
            ApprovalAlreadyVotedError: This approver has voted before.
            ApprovalExpiredError: The deadline has passed.
            SelfApprovalError: The approver is the caller, and ALLOW_SELF_APPROVAL is off.
            DecisionVetoedError: A plugin refuses this decision, or failed when it was asked.
        """
        ref = ApprovalRef.by_either(token, approval_id, self._org_id)
        vote = VoteInput(approver_id, note, channel, VoteDecision.APPROVED)
        await decisions.require_no_veto(self._vetoes, self._transactions, ref, vote)
        return await self._decide(ref, vote, token)

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
        ref = ApprovalRef.by_either(token, approval_id, self._org_id)
        vote = VoteInput(approver_id, note, channel, VoteDecision.DENIED)
        await decisions.require_no_veto(self._vetoes, self._transactions, ref, vote)
        return await self._decide(ref, vote, token)

    async def cancel(
        self,
        token: str | None = None,
        approver_id: str = "",
        note: str = "",
        *,
        approval_id: UUID | str | None = None,
        channel: str = "api",
    ) -> ApprovalResult:
        """Withdraw an approval that is pending, or approved and not used; the caller may do so, too.

        Arguments and errors as for `approve`; no plugin can refuse it.
        """
        vote = VoteInput(approver_id, note, channel, VoteDecision.CANCELLED)
        return await self._decide(ApprovalRef.by_either(token, approval_id, self._org_id), vote, token)

    @traced("approval.decide")
    async def _decide(self, ref: ApprovalRef, vote: VoteInput, token: str | None) -> ApprovalResult:
        allow_self, use_s = self._settings.allow_self_approval, self._settings.approval_token_ttl_seconds
        change = await self._changes.decide(ref, vote, allow_self=allow_self, use_s=use_s)
        return await self._changes.publish(change, token)

    @traced("approval.consume", lambda *_, tool_call, **__: tool_call.tool)
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
        ref = ApprovalRef.by_token(token, self._org_id)
        call_hash = hash_tool_call(ToolCall.model_validate(tool_call), key=self._hash_key)
        permission = Permission(storable_key(caller_id), ApprovalScope(scope), call_hash)
        approval = await decisions.use(self._transactions, ref, permission, hash_key=self._hash_key)
        return await self._changes.publish_use(approval, token)

    async def release_output(self, token: str, *, caller_id: str) -> Any:
        """Use an approval of scope OUTPUT_RELEASE, once, and return the output that was approved.

        Of any number of callers, each of whom must be who asked, one gets the output. It is the stored payload, checked
        against its hash; an approval whose payload was changed since is not used up. An error after the use may have
        used it: the output is not given a second time.

        Raises:
            ApprovalMismatchError: Another caller, an approval that releases no output, or a payload that does not
                match its hash. All other errors are those of `consume_token`.
            StoreUnavailableError: The database is away.
        """
        ref = ApprovalRef.by_token(token, self._org_id)
        permission = Permission(storable_key(caller_id), ApprovalScope.OUTPUT_RELEASE)
        approval = await decisions.use(self._transactions, ref, permission, hash_key=self._hash_key)
        await self._changes.publish_use(approval, token)
        return approval.request.output_payload

    async def record_outcome(
        self, token: str | None = None, outcome: str = "", *, approval_id: UUID | str | None = None
    ) -> ApprovalResult:
        """Store what came of the call, after its use; once. A used approval without an outcome is shown as unknown.

        `token` or `approval_id` names the approval, as for `approve`.

        Raises:
            ApprovalNotFoundError: There is no such approval.
            ApprovalNotApprovedError: It has not been used.
            ApprovalAlreadyUsedError: Another outcome was recorded before (the same one again changes nothing).
        """
        ref = ApprovalRef.by_either(token, approval_id, self._org_id)
        return await self._changes.publish_use(await decisions.set_outcome(self._transactions, ref, outcome), token)

    async def wait_for_decision(self, token: str, *, timeout_s: float = 60.0) -> ApprovalResult:
        """Wait until the approval is no longer PENDING, and return how it stands.

        Thousands may wait: a process has one subscription, and one read answers all tasks that wait for the same
        approval. A slow poll catches missed messages; a database that is away is waited for. Cancelling leaves nothing.

        Args:
            timeout_s: Seconds; `math.inf` waits without end. At the timeout the result is returned as it stands, still
                PENDING; nothing is decided.

        Raises:
            ApprovalNotFoundError: No approval has this token.
            StoreUnavailableError: The database was away all the time.
            TypeError, ValueError: `timeout_s` is not a number.
        """
        ref = ApprovalRef.by_token(token, self._org_id)
        self._transactions.check_owner()
        read = partial(queries.get_result, self._transactions, ref, token)
        return await self._waiting.wait(self._org_id, token, read, timeout_s=timeout_s)

    async def expire_stale(self, *, batch_size: int = 500) -> int:
        """Write EXPIRED to what has passed its deadline, and notify the notifiers. Returns how many there were.

        Any number of processes may sweep at once; each approval is swept by one.

        Args:
            batch_size: How many are written in one transaction, 1 to 10,000.

        Raises:
            ValueError: `batch_size` is out of range.
        """
        require_between("batch_size", batch_size, 1, _LARGEST_BATCH, hint="every batch is swept until none is left")
        return await self._changes.expire(self._org_id, batch_size)

    async def list_requests(
        self, status: ApprovalStatus | str | None = None, limit: int = 50, cursor: str | None = None
    ) -> Page[ApprovalRequest]:
        """Return a page of `search` by one status, as a reader sees it (EXPIRED from the deadline on); None: all."""
        return await self.search(limit=limit, cursor=cursor, status=status)

    async def search(
        self, *, limit: int = 50, cursor: str | None = None, **filters: Unpack[ApprovalFilters]
    ) -> Page[ApprovalRequest]:
        """Return approvals that match every filter (see `ApprovalFilters`), newest first, ties broken by id.

        `next_cursor` leads on to older ones; approvals that are asked for meanwhile do not move it.

        Args:
            limit: At most so many, 1 to 2^31 - 1.
            cursor: `next_cursor` of the page before; the filters must be the same.

        Raises:
            InvalidCursorError: The cursor did not come from this search, or is from before `db restored`.
            TypeError: There is no such filter, or its value has the wrong type.
            ValueError: There is no such status or time, or `limit` is out of range.
        """
        found = self._found(filters)
        # What waits for a decision is what people decide by.
        source = self._transactions if waits(found) else self._transactions.replica
        return await reports.search(source, found, limit=limit, cursor=cursor)

    def _found(self, filters: ApprovalFilters) -> Criteria:
        return criteria(filters, org_id=self._org_id)

    async def stream(self, **filters: Unpack[ApprovalFilters]) -> AsyncGenerator[ApprovalRequest]:
        """Yield every approval that `search` finds, in its order; no connection is held between two pages of it."""
        async for request in reports.stream(self._transactions.replica, self._found(filters)):
            yield request

    async def get(self, *, approval_id: UUID | str) -> ApprovalRequest:
        """Return the approval of this id with its votes, without its token.

        Raises:
            ApprovalNotFoundError: There is none.
        """
        return await reports.get(self._transactions, ApprovalRef.by_id(approval_id, self._org_id))

    async def stats(
        self,
        by: str | Sequence[str] | None = None,
        bucket: timedelta | str | None = None,
        time_zone: str | None = None,
        **filters: Unpack[ApprovalFilters],
    ) -> Stats:
        """Count approvals and how long they waited for a decision, aggregated by the database.

        Each row has the columns of its group, then `approvals`, of them `pending`, `approved`, `denied`, `expired`,
        `cancelled` and `used` as a reader sees them, `unknown_outcomes`, and `wait_p50_s`, `wait_p90_s`, `wait_p99_s`:
        percentiles of the seconds from asking to the decision (None: nothing was decided).

        Args:
            by: Columns to group by: status, outcome ("unknown" where it was not recorded after the use), caller_id,
                tool_name, mcp_server, approver_id, scope, org_id; hour_of_day or weekday, of asking.
            bucket, time_zone: As for `store.audit.stats`, by the time of asking.

        Raises:
            TypeError, ValueError: As for `search`; or there is no such column or time zone.
        """
        grouped = grouping(by, bucket, time_zone, reports.GROUPS)
        return await reports.stats(self._transactions.replica, self._found(filters), grouped)

    async def export(
        self,
        path: str | PathLike[str],
        *,
        format: Literal["jsonl", "csv", "parquet"] | None = None,  # noqa: A002  the natural name
        compression: Literal["gzip", "zstd"] | None = None,
        partition_by: Literal["day"] | None = None,
        raw: bool = False,
        overwrite: bool = False,
        progress: bool | Callable[[int], None] = False,
        **filters: Unpack[ApprovalFilters],
    ) -> ExportResult:
        """Write every approval that matches, with its votes, to a file, oldest first, as they stood at one moment.

        Arguments, guarantees and errors are those of `store.audit.export`; a day is that of asking. Neither a token nor
        an output that waits to be released is in the file.

        Raises:
            ValueError: Also if this manager works in a session of the caller's: export from a store.
        """
        options = ExportOptions(format, compression, partition_by, raw, overwrite, progress)
        return await reports.export(self._transactions.replica, self._found(filters), path, options)

    async def history(self, approval_id: UUID | str) -> Page[dict[str, Any]]:
        """Return what happened to an approval, in the order of time.

        Each row has `at`, `event` (asked, vote, decided, expired, used, outcome, notice, call), `by` (caller, approver,
        notifier), `status`, `note`, `channel`. A call is an audit event; an outcome that nobody recorded is "unknown".

        Raises:
            ApprovalNotFoundError: There is no such approval.
        """
        return await queries.history(self._transactions, ApprovalRef.by_id(approval_id, self._org_id))
