"""Blocking twins of the async classes; made by `scripts/generate_sync_stub.py`, do not edit."""

from collections import Counter
from collections.abc import AsyncIterable, Callable, Generator, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from datetime import datetime, timedelta
from os import PathLike
from types import TracebackType
from typing import Any, Literal, Self, Unpack
from uuid import UUID

import pandas
import polars
import pyarrow as pa
from pydantic import SecretStr
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession

from agent_gateway_store.approval.filters import ApprovalFilters
from agent_gateway_store.audit.filters import Filters
from agent_gateway_store.audit.outcomes import AuditCounters, WriteOutcome
from agent_gateway_store.evidence import proof
from agent_gateway_store.hooks.manager import Plugins
from agent_gateway_store.hooks.specs import Sink
from agent_gateway_store.models.approval import ApprovalRequest, ApprovalResult, ApprovalScope
from agent_gateway_store.models.audit import AuditEvent, Decision
from agent_gateway_store.models.delivery import DeliveryStatus, NotificationDelivery
from agent_gateway_store.models.evidence import Checkpoint, Verification
from agent_gateway_store.models.keys import ApiKey, CallerIdentity, IssuedKey, KeyReading, TrustLevel
from agent_gateway_store.models.retention import Erased, FoundRecord, Hold, Pruned, PrunedApprovals
from agent_gateway_store.models.values import ApprovalStatus, ToolCall
from agent_gateway_store.results import Page, Stats
from agent_gateway_store.settings import StoreSettings
from agent_gateway_store.storage.cache import RedisClient
from agent_gateway_store.storage.database import Database
from agent_gateway_store.storage.export import ExportResult
from agent_gateway_store.storage.filters import Moment

__all__ = [
    "SyncApprovalManager",
    "SyncAuditManager",
    "SyncEvidenceManager",
    "SyncGatewayStore",
    "SyncKeyManager",
    "SyncNotificationManager",
    "SyncRetentionManager",
    "SyncSinkManager",
]

class SyncAuditManager:
    def write(self, event: AuditEvent) -> WriteOutcome:
        """Store `event` and commit, together with other events that arrive meanwhile."""

    def write_many(self, events: Iterable[AuditEvent] | AsyncIterable[AuditEvent]) -> Counter[WriteOutcome]:
        """Store many events, in order, in batches that are committed one by one; return the number of each outcome."""

    def import_file(
        self,
        path: str | PathLike[str],
        *,
        format: Literal["jsonl", "parquet"] | None = None,
        on_refused: Callable[[str], None] | None = None,
        progress: bool | Callable[[int], None] = False,
    ) -> Counter[WriteOutcome]:
        """Store the events of a file or dataset that `export` wrote: the same events, under ids of this store."""

    def call(
        self,
        call: ToolCall,
        caller: CallerIdentity,
        *,
        decision: Decision | str,
        rule: str = "",
        rationale: str = "",
        approval_id: UUID | str | None = None,
        sanitize: Callable[[ToolCall], Mapping[str, Any]] = ...,
        intent: bool = False,
        **fields: Any,
    ) -> AbstractContextManager[AuditEvent]:
        """Record one tool call, which runs in the body: `async with store.audit.call(call, caller, ...) as event:`."""

    def orphans(self, *, older_than: timedelta | str = "1h", limit: int = 100) -> Page[AuditEvent]:
        """Return intents of `call` without outcome, newest first: calls that run still, or whose process was killed."""

    def record(self, event: AuditEvent, *, session: AsyncSession) -> WriteOutcome:
        """Store `event` in the transaction of `session`: it is committed or rolled back with the caller's work."""

    def flush(self) -> int:
        """Wait until every event written so far is acknowledged, and try to empty the spool."""

    @property
    def counters(self) -> AuditCounters:
        """How many events came to which outcome in this process since the store was opened; a copy."""

    def get(self, event_id: int) -> AuditEvent | None:
        """Return the event of this row (its `id`), or None; one of another organisation looks absent."""

    def get_by_request_id(self, request_id: str) -> AuditEvent | None:
        """Return the event with this `request_id`, or None; of several organisations' events the newest."""

    def list_by_caller(self, caller_id: str, limit: int = 50, offset: int = 0) -> Page[AuditEvent]:
        """Return up to `limit` events of one caller, after skipping `offset`."""

    def list_by_decision(self, decision: Decision | str, limit: int = 50) -> Page[AuditEvent]:
        """Return up to `limit` events with this decision; ValueError if there is no such decision."""

    def list_recent(self, limit: int = 100) -> Page[AuditEvent]:
        """Return the `limit` newest events."""

    def search(self, *, limit: int = 100, cursor: str | None = None, **filters: Unpack[Filters]) -> Page[AuditEvent]:
        """Return events that match every filter (see `Filters`), newest first, ties broken by id."""

    def stats(
        self,
        by: str | Sequence[str] | None = None,
        bucket: timedelta | str | None = None,
        time_zone: str | None = None,
        **filters: Unpack[Filters],
    ) -> Stats:
        """Count events and their latencies, aggregated by the database."""

    def stream(self, **filters: Unpack[Filters]) -> Generator[AuditEvent]:
        """Yield every event that matches (see `Filters`), newest first, as the log was when the first was asked for."""

    def changes(self, cursor: str | None = "now", *, limit: int = 1000, **filters: Unpack[Filters]) -> Page[AuditEvent]:
        """Return the events that were committed since `cursor`, in the order of their commits."""

    def follow(
        self, *, start: str | None = "now", poll_s: float = 0.5, patience_s: float = 60.0, **filters: Unpack[Filters]
    ) -> Generator[AuditEvent]:
        """Yield new events as they are committed, without end, with the guarantees of `changes`."""

    def ship(
        self,
        sink: str | Sink,
        *,
        once: bool = False,
        start: Literal["beginning", "now"] = "beginning",
        batch: int = 500,
        poll_s: float = 1.0,
    ) -> int:
        """Send the log to a sink, in the order of `changes`, each event at least once; return how many it took."""

    def to_arrow(self, **filters: Unpack[Filters]) -> pa.Table:
        """Return every event that matches as an Arrow table, newest first, without making event objects."""

    def to_pandas(self, **filters: Unpack[Filters]) -> pandas.DataFrame:
        """Return the table of `to_arrow` as a pandas DataFrame. Raises the same, also if pandas is missing."""

    def to_polars(self, **filters: Unpack[Filters]) -> polars.DataFrame:
        """Return the table of `to_arrow` as a Polars DataFrame. Raises the same, also if Polars is missing."""

    def export(
        self,
        path: str | PathLike[str],
        *,
        format: Literal["jsonl", "csv", "parquet"] | None = None,
        compression: Literal["gzip", "zstd"] | None = None,
        partition_by: Literal["day"] | None = None,
        raw: bool = False,
        overwrite: bool = False,
        progress: bool | Callable[[int], None] = False,
        **filters: Unpack[Filters],
    ) -> ExportResult:
        """Write every event that matches to a file, oldest first, as the log was at one moment."""

class SyncApprovalManager:
    def issue_token(self, request: ApprovalRequest, *, call: ToolCall | None = None) -> str:
        """Ask for an approval and return the token that follows and uses it."""

    def acquire(
        self, request: ApprovalRequest, *, call: ToolCall | None = None, bind: str = "", wait_s: float = 0.0
    ) -> ApprovalResult:
        """Ask, before each run of a call, whether it may go: USED (run it now), PENDING (come back) or DENIED."""

    def check_token(self, token: str, *, fresh: bool = False) -> ApprovalResult:
        """Return where the approval of `token` stands."""

    def approve(
        self,
        token: str | None = None,
        approver_id: str = "",
        note: str = "",
        *,
        approval_id: UUID | str | None = None,
        channel: str = "api",
    ) -> ApprovalResult:
        """Approve, once. With `required_approvals` above 1 this is one vote of several."""

    def deny(
        self,
        token: str | None = None,
        approver_id: str = "",
        note: str = "",
        *,
        approval_id: UUID | str | None = None,
        channel: str = "api",
    ) -> ApprovalResult:
        """Deny, once; one denial is enough. Arguments and errors as for `approve`."""

    def cancel(
        self,
        token: str | None = None,
        approver_id: str = "",
        note: str = "",
        *,
        approval_id: UUID | str | None = None,
        channel: str = "api",
    ) -> ApprovalResult:
        """Withdraw an approval that is pending, or approved and not used; the caller may do so, too."""

    def consume_token(
        self,
        token: str,
        *,
        caller_id: str,
        tool_call: ToolCall | Mapping[str, Any],
        scope: ApprovalScope = ApprovalScope.EXECUTION,
    ) -> ApprovalResult:
        """Use an approval, once: of any number of consumers one returns, and that one may run the call."""

    def release_output(self, token: str, *, caller_id: str) -> Any:
        """Use an approval of scope OUTPUT_RELEASE, once, and return the output that was approved."""

    def record_outcome(
        self, token: str | None = None, outcome: str = "", *, approval_id: UUID | str | None = None
    ) -> ApprovalResult:
        """Store what came of the call, after its use; once. A used approval without an outcome is shown as unknown."""

    def wait_for_decision(self, token: str, *, timeout_s: float = 60.0) -> ApprovalResult:
        """Wait until the approval is no longer PENDING, and return how it stands."""

    def expire_stale(self, *, batch_size: int = 500) -> int:
        """Write EXPIRED to what has passed its deadline, and notify the notifiers. Returns how many there were."""

    def list_requests(
        self, status: ApprovalStatus | str | None = None, limit: int = 50, cursor: str | None = None
    ) -> Page[ApprovalRequest]:
        """Return a page of `search` by one status, as a reader sees it (EXPIRED from the deadline on); None: all."""

    def search(
        self, *, limit: int = 50, cursor: str | None = None, **filters: Unpack[ApprovalFilters]
    ) -> Page[ApprovalRequest]:
        """Return approvals that match every filter (see `ApprovalFilters`), newest first, ties broken by id."""

    def stream(self, **filters: Unpack[ApprovalFilters]) -> Generator[ApprovalRequest]:
        """Yield every approval that `search` finds, in its order; no connection is held between two pages of it."""

    def get(self, *, approval_id: UUID | str) -> ApprovalRequest:
        """Return the approval of this id with its votes, without its token."""

    def stats(
        self,
        by: str | Sequence[str] | None = None,
        bucket: timedelta | str | None = None,
        time_zone: str | None = None,
        **filters: Unpack[ApprovalFilters],
    ) -> Stats:
        """Count approvals and how long they waited for a decision, aggregated by the database."""

    def export(
        self,
        path: str | PathLike[str],
        *,
        format: Literal["jsonl", "csv", "parquet"] | None = None,
        compression: Literal["gzip", "zstd"] | None = None,
        partition_by: Literal["day"] | None = None,
        raw: bool = False,
        overwrite: bool = False,
        progress: bool | Callable[[int], None] = False,
        **filters: Unpack[ApprovalFilters],
    ) -> ExportResult:
        """Write every approval that matches, with its votes, to a file, oldest first, as they stood at one moment."""

    def history(self, approval_id: UUID | str) -> Page[dict[str, Any]]:
        """Return what happened to an approval, in the order of time."""

class SyncKeyManager:
    def issue(
        self,
        caller_id: str,
        *,
        role: str,
        trust_level: TrustLevel = TrustLevel.LOW,
        environment: str | None = None,
        expires_at: datetime | None = None,
        expires_in: timedelta | None = None,
        org_id: str | None = None,
    ) -> IssuedKey:
        """Issue a key for `caller_id`. The plaintext is in the result and nowhere else."""

    def verify(self, key: str | SecretStr) -> CallerIdentity:
        """Return the caller that `key` belongs to."""

    def rotate(self, caller_id: str, overlap: timedelta = ..., *, org_id: str | None = None) -> IssuedKey:
        """Replace the key of `caller_id`; its key id stays. The plaintext is in the result and nowhere else."""

    def revoke(self, caller_id: str, *, org_id: str | None = None) -> ApiKey:
        """End the key of `caller_id`, and the one before it, at once. A second call changes nothing."""

    def get(self, caller_id: str, *, org_id: str | None = None) -> ApiKey:
        """Return the row of the active key of `caller_id`, else of the one revoked last; a repr shows no hash."""

    def read(self, caller_id: str, *, org_id: str | None = None) -> KeyReading:
        """Return the row that `get` returns, with the database's time, by which alone a key ends."""

    def list(self, limit: int = 100, offset: int = 0) -> Page[ApiKey]:
        """Return key rows, those of revoked keys included (`is_active` is False), newest first by id."""

class SyncNotificationManager:
    def list(
        self,
        status: DeliveryStatus | str | None = None,
        limit: int = 50,
        cursor: str | None = None,
        *,
        notifier: str | None = None,
        approval_id: UUID | str | None = None,
    ) -> Page[NotificationDelivery]:
        """Return deliveries, newest first. `next_cursor` leads on; new deliveries do not move it."""

    def counts(self) -> Page[dict[str, Any]]:
        """Count what has not arrived, a line for each notifier."""

    def redrive(self, delivery_id: UUID | str | None = None, *, notifier: str | None = None) -> int:
        """Send dead letters again: one, or all. They keep their delivery id and get all their attempts again."""

    def run(self, *, once: bool = False) -> int:
        """Send what is due to the notifiers of this process. Any number of processes may do so at once."""

    def prune(self, older_than: timedelta) -> int:
        """Delete the record of notices that arrived longer ago than `older_than`; returns how many."""

class SyncEvidenceManager:
    def seal(self) -> Checkpoint | None:
        """Give every event that is committed its position in the log, and return the checkpoint over all of them."""

    def checkpoint(self) -> Checkpoint | None:
        """Return the last checkpoint, or None; ValueError on a store that is bound to one organisation."""

    def verify(
        self,
        *,
        against: Iterable[str | Checkpoint] = ...,
        keys: Iterable[str] = ...,
        archive: str | PathLike[str] | Iterable[str | PathLike[str]] | None = None,
        progress: bool | Callable[[int], None] = False,
    ) -> Verification:
        """Recompute the log from the columns of its events, and say what does not fit."""

    def prove(self, request_id: str) -> proof.Evidence:
        """Return the evidence of one event: what happened, who approved it, and the proof that the log holds it."""

    def publish(self, folder: str | PathLike[str]) -> Checkpoint | None:
        """Write the last checkpoint and the hash tiles below it to a folder, which any web server can serve."""

class SyncRetentionManager:
    def prune(
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
        """Take sealed events out of the table, the oldest first, and into an archive."""

    def hold(self, name: str, *, reason: str, by: str, **filters: Unpack[Filters]) -> Hold:
        """Keep events from being pruned and erased, whatever else is asked, until the hold is released."""

    def release_hold(self, name: str, *, by: str) -> Hold:
        """Release a hold, and return what it was."""

    def holds(self) -> Page[Hold]:
        """Return the holds in force, oldest first; ValueError on a store that is bound to one organisation."""

    def erase(self, request_id: str, *, reason: str, by: str, archive: str | PathLike[str] | None = None) -> Erased:
        """Blank what one request held: arguments, labels, free texts, and every hash by which they could be guessed."""

    def find(
        self, *, caller_id: str | None = None, text: str | None = None, archive: str | PathLike[str] | None = None
    ) -> Page[FoundRecord]:
        """Return what an erasure request is about: events and approvals, of a caller or that hold a text, or both."""

    def prune_approvals(
        self,
        before: Moment,
        *,
        by: str,
        archive: str | PathLike[str] | None = None,
        discard: bool = False,
        below_floor: bool = False,
    ) -> PrunedApprovals:
        """Take approvals that are over out of the table, with votes and delivered notices."""

class SyncSinkManager:
    def list(self) -> Page[dict[str, Any]]:
        """Return how far each sink is, by name."""

    def dead_letters(self, sink: str | None = None, limit: int = 50) -> Page[dict[str, Any]]:
        """Return events that were refused for good, newest first; `request_id` is None for one that was pruned."""

    def redrive(self, sink: str | None = None) -> int:
        """Send dead letters again: those of one sink, or all."""

    def forget(self, sink: str) -> bool:
        """Forget how far a sink is, and what it has refused: the next `ship` begins anew. False: nothing was known."""

class SyncGatewayStore:
    @property
    def settings(self) -> StoreSettings:
        """The settings in force."""

    def __init__(
        self,
        database_url: str | None = None,
        *,
        redis_url: str | None = None,
        settings: StoreSettings | None = None,
        engine: AsyncEngine | None = None,
        redis: RedisClient | None = None,
        plugins: Iterable[object] = ...,
        auto_migrate: bool | None = None,
    ) -> None: ...
    @property
    def audit(self) -> SyncAuditManager:
        """Write and find audit events."""

    @property
    def approvals(self) -> SyncApprovalManager:
        """Ask for approvals, decide them, use them."""

    @property
    def keys(self) -> SyncKeyManager:
        """Issue and verify API keys."""

    @property
    def evidence(self) -> SyncEvidenceManager:
        """Seal the audit log, verify it, and prove from it what happened."""

    @property
    def retention(self) -> SyncRetentionManager:
        """What is kept and for how long: holds, pruning into an archive, erasing."""

    @property
    def notifications(self) -> SyncNotificationManager:
        """The notices that notifiers received, and those that they have still to receive."""

    @property
    def sinks(self) -> SyncSinkManager:
        """The sinks to which `audit.ship` has shipped: how far they are, and what they have refused."""

    @property
    def plugins(self) -> Plugins:
        """The plugins as they were loaded, with what is wrong with them."""

    @property
    def database(self) -> Database:
        """The engine and the sessions; `store.database.sessions()` opens a session for `record`."""

    @property
    def org_id(self) -> str | None:
        """The organisation this store is bound to, or None."""

    def for_org(self, org_id: str) -> SyncGatewayStore:
        """Return the same store bound to one organisation: it stamps it on what it writes and sees nothing else."""

    def open(self) -> Self:
        """Connect and check the schema. A second call does nothing."""

    def close(self) -> None:
        """Let notices under way arrive, then close what the store opened itself. A second call does nothing."""

    def migrate(self) -> None:
        """Bring the schema up to date. Any number of processes may call this at once; works before `open`, too."""

    def ping(self) -> None:
        """Return if the database answers, and takes writes. For health checks."""

    def hash_args(self, args: Mapping[str, Any]) -> str:
        """Return `raw_args_hash` for the raw arguments of a call, under this store's setting HASH_KEY."""

    def __enter__(self) -> Self: ...
    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None: ...
