"""What an auditor asks of many approvals: pages, counts and waiting times, exports; with the votes of each."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import AsyncGenerator, Iterable, Mapping, Sequence
from functools import lru_cache
from os import PathLike
from typing import Any
from uuid import UUID

from sqlalchemy import BigInteger, DateTime, Integer, Text, Uuid, column, select
from sqlalchemy.types import TypeEngine

from agent_gateway_store.approval.filters import conditions, types_of, words_of
from agent_gateway_store.approval.queries import ApprovalRef, StoredApproval, read
from agent_gateway_store.approval.statements import OVERDUE, readable_columns, sql_statement
from agent_gateway_store.models.approval import ApprovalRequest, ApprovalVote, CastVote, hash_approval
from agent_gateway_store.models.base import UnreadableRow, repaired
from agent_gateway_store.models.columns import UTC_MAX, UTC_MIN
from agent_gateway_store.models.values import ApprovalStatus
from agent_gateway_store.results import Page, Stats
from agent_gateway_store.results.cells import Column, columns_of
from agent_gateway_store.storage.database import AnyConnection, Database, Transactions
from agent_gateway_store.storage.errors import retry_conflicts
from agent_gateway_store.storage.export import ExportOptions, ExportResult, Source, export_rows
from agent_gateway_store.storage.filters import Criteria, Shape, require_between
from agent_gateway_store.storage.grouping import Grouping, Metrics, Offsets, aggregate, stats_of
from agent_gateway_store.storage.identity import restored_identity
from agent_gateway_store.storage.pagination import decode, decode_cursor, encode_cursor
from agent_gateway_store.storage.statements import Statement, is_one_of, typed_text
from agent_gateway_store.storage.streaming import read_all

_requests, _votes = ApprovalRequest.__table__, ApprovalVote.__table__

_COLUMNS = (
    "created_at",
    "caller_id",
    "tool_call",
    "status",
    "risk_explanation",
    "approver_id",
    "votes",
    "outcome",
    "approval_id",
)

_STREAMED_ROWS = 500  # chosen: about a megabyte of requests

GROUPS = ("status", "outcome", "caller_id", "tool_name", "mcp_server", "approver_id", "scope", "org_id")
"""The columns that approvals can be grouped by."""

_STATUSES = ("pending", "approved", "denied", "expired", "cancelled", "used")
# Numbers of microseconds, which both databases count exactly.
_COUNTED = Metrics(
    counts={
        "approvals": "TRUE",
        **{status: f"status = '{status.upper()}'" for status in _STATUSES},
        "unknown_outcomes": "outcome = 'unknown'",
    },
    value="waited_us",
    percentiles={"wait_p50_s": 0.5, "wait_p90_s": 0.9, "wait_p99_s": 0.99},
    scale=1_000_000,
)
_METRICS = (
    *(Column(name, "integer") for name in _COUNTED.counts),
    *(Column(name, "number") for name in _COUNTED.percentiles),
)

# The output is not released yet, and no report is a way around that.
_EXPORTED = tuple(each for each in columns_of(ApprovalRequest) if each.name != "output_payload")

# A status as a reader sees it, by what is stored: the index over it serves no CASE.
_STANDS = {
    **{status: [f"status = '{status.value}'"] for status in ApprovalStatus},
    ApprovalStatus.PENDING: ["status = 'PENDING' AND expires_at > {now_once}"],
    ApprovalStatus.APPROVED: ["status = 'APPROVED' AND COALESCE(use_before, expires_at) > {now_once}"],
    ApprovalStatus.EXPIRED: ["status = 'EXPIRED'", *(condition for condition, _ in OVERDUE)],
}
# In the text: for a LIMIT in a parameter PostgreSQL plans as if a tenth of the rows were wanted.
_ROWS = """
    SELECT * FROM approval_requests WHERE {stands} AND {conditions} ORDER BY created_at DESC, id DESC LIMIT {limit}
    """
_PAGE = "SELECT {readable} FROM ({pages}) AS pages ORDER BY pages.created_at DESC, pages.id DESC LIMIT {limit}"
_GROUPED = """
    SELECT id, {at} AS at, {readable_status} AS status, {outcome_known} AS outcome, {waited_us} AS waited_us{groups}
    FROM approval_requests WHERE {conditions}
    """
_EXPORT = """
    SELECT {exported} FROM approval_requests WHERE {conditions} ORDER BY created_at, id
    """
# The driver stores the first and the last instant of UTC as infinities.
_FINITE = f"LEAST(GREATEST({{0}}, TIMESTAMPTZ '{UTC_MIN.isoformat()}'), TIMESTAMPTZ '{UTC_MAX.isoformat()}')"
_DIALECTS = {
    "postgresql": {
        "at": _FINITE.format("created_at"),
        "waited_us": "CAST(EXTRACT(EPOCH FROM decision_at - created_at) * 1000000 AS BIGINT)",
        "votes": """COALESCE((
            SELECT jsonb_agg(jsonb_build_object(
                'approver_id', v.approver_id, 'decision', v.decision, 'note', v.note, 'channel', v.channel,
                'voted_at', to_char(v.voted_at AT TIME ZONE 'UTC', 'YYYY-MM-DD"T"HH24:MI:SS.US"Z"')
            ) ORDER BY v.voted_at, v.id) FROM approval_votes AS v WHERE v.approval_id = approval_requests.approval_id
        ), '[]')::text""",
        "as_uuid": "CAST({} AS TEXT)",
        "as_json": "CAST({} AS TEXT)",
        # LEAST alone would fill a NULL.
        "as_time": f"CASE WHEN {{0}} IS NOT NULL THEN {_FINITE} END",
    },
    "sqlite": {
        "at": "created_at",
        "waited_us": " - ".join(
            f"(CAST(strftime('%s', substr({each}, 1, 19)) AS INTEGER) * 1000000 + CAST(substr({each}, 21) AS INTEGER))"
            for each in ("decision_at", "created_at")
        ),
        "votes": """(
            SELECT json_group_array(json_object(
                'approver_id', v.approver_id, 'decision', v.decision, 'note', v.note, 'channel', v.channel,
                'voted_at', replace(v.voted_at, ' ', 'T') || 'Z'
            )) FROM (
                SELECT * FROM approval_votes AS each WHERE each.approval_id = approval_requests.approval_id
                ORDER BY voted_at, id
            ) AS v
        )""",
        "as_uuid": "substr({0}, 1, 8) || '-' || substr({0}, 9, 4) || '-' || substr({0}, 13, 4) || '-' || "
        "substr({0}, 17, 4) || '-' || substr({0}, 21)",
    },
}


def _typed(sql: str, dialect: str, shape: Shape, columns: Iterable[Any], **words: str) -> Any:
    """Return a text as a statement of this dialect, narrowed by the filters of `shape`."""
    known = words_of(dialect) | _DIALECTS[dialect] | {"conditions": conditions(dialect, shape), **words}
    return typed_text(sql.format_map(known), types_of(dialect, shape), columns)


@lru_cache(maxsize=128)
def _page(shape: Shape, statuses: tuple[str, ...], limit: int) -> Statement:
    standing = [each for status in dict.fromkeys(statuses) for each in _STANDS[ApprovalStatus(status)]]
    # A page of each, in the order of an index, and of these a page: of an OR the planner would sort all that match.
    pages = " UNION ALL ".join(
        f"SELECT * FROM ({_ROWS.replace('{stands}', each)}) AS page_{at}"  # noqa: S608  pieces of the program's own
        for at, each in enumerate(standing or ["1 = 1"])
    )
    sql = _PAGE.replace("{pages}", pages)
    return Statement(lambda dialect: _typed(sql, dialect, shape, readable_columns, limit=str(limit)))


_VOTES = Statement(
    lambda dialect: (
        select(_votes.c.id, _votes.c.approval_id, *(_votes.c[name] for name in CastVote.model_fields))
        .where(is_one_of(dialect, _votes.c.approval_id, "p_ids", Uuid()))
        .order_by(_votes.c.voted_at, _votes.c.id)
    )
)


async def add_votes(connection: AnyConnection, requests: Sequence[ApprovalRequest], *, repairs: bool) -> None:
    """Read the votes of all these approvals, by one statement; unless it `repairs`, an altered one raises its error."""
    if not requests:
        return
    found: dict[UUID, list[CastVote]] = defaultdict(list)
    ids = [each.approval_id if connection.dialect.name == "postgresql" else each.approval_id.hex for each in requests]
    for vote in await _VOTES.rows(connection, {"p_ids": ids}):
        row = repaired(vote) if repairs else vote
        found[row["approval_id"]].append(CastVote(**{name: row[name] for name in CastVote.model_fields}))
    for request in requests:
        request.__dict__["votes"] = found[request.approval_id]


@retry_conflicts
async def search(
    transactions: Transactions, found: Criteria, *, limit: int, cursor: str | None
) -> Page[ApprovalRequest]:
    """Read one page, newest first, ties broken by id. Arguments and errors as for `ApprovalManager.search`."""
    require_between("limit", limit, 1, hint="for more approvals, go on with next_cursor")
    # Each status has its own index here, instead of the condition over all.
    shape, values = tuple(each for each in found.shape if each[0] != "status"), dict(found.values)
    statuses = tuple(values.get("p_status", ()))
    if cursor is not None:
        decode(found.scope, cursor)
    async with transactions.connection("read") as connection:
        restored = None
        if cursor is not None:
            restored = await restored_identity(connection)
            values["p_before"], values["p_before_id"] = decode_cursor(found.scope, cursor, restored)
            shape = (*shape, ("after", False))
        rows = await _page(shape, statuses, limit + 1).rows(connection, values)
        requests = [StoredApproval.repaired(row).request for row in rows[:limit]]
        # From a time that cannot be read no page goes on: such rows at the end of this one are on the next.
        while len(rows) > limit and requests and _has_no_time(rows[len(requests) - 1]):
            requests.pop()
        await add_votes(connection, requests, repairs=True)
        if len(rows) > limit and cursor is None:
            restored = await restored_identity(connection)
    following = None
    if len(rows) > limit:
        if not requests:
            # Raises its error.
            rows[0]["created_at"]
        following = encode_cursor(found.scope, requests[-1].created_at, requests[-1].id or 0, restored)
    return Page(requests, next_cursor=following, columns=_COLUMNS, record_type=ApprovalRequest)


def _has_no_time(row: Mapping[str, Any]) -> bool:
    return isinstance(row, UnreadableRow) and bool(row.stand_ins["created_at"] == UTC_MIN)


async def stream(transactions: Transactions, found: Criteria) -> AsyncGenerator[ApprovalRequest]:
    """Yield every approval that matches, newest first."""
    cursor: str | None = None
    while True:
        page = await search(transactions, found, limit=_STREAMED_ROWS, cursor=cursor)
        for request in page:
            yield request
            transactions.check_owner()
        if (cursor := page.next_cursor) is None:
            return


@retry_conflicts
async def get(transactions: Transactions, ref: ApprovalRef) -> ApprovalRequest:
    """Return the approval that `ref` names with its votes; ApprovalNotFoundError if there is none."""
    async with transactions.connection("read") as connection:
        request = (await read(connection, ref)).request
        await add_votes(connection, [request], repairs=False)
    return request


async def decision_hash(transactions: Transactions, ref: ApprovalRef) -> str:
    """Return the hash of an approval and its votes, by which an event holds them (see `hash_approval`).

    Raises:
        ApprovalNotFoundError: There is no such approval.
    """
    request = await get(transactions, ref)
    return hash_approval(request, request.votes or ())


_SPAN = sql_statement(
    "SELECT min(created_at) AS first, max(created_at) AS last FROM approval_requests",
    (column("first"), column("last")),
)


@lru_cache(maxsize=128)
def _grouped(shape: Shape, by: tuple[str, ...], zone: Offsets, *, in_buckets: bool) -> Statement:
    sources = {"status": "readable_status", "outcome": "outcome_known", "tool_name": "tool", "mcp_server": "server"}

    def build(dialect: str) -> Any:
        names = [name for name in by if name in GROUPS]
        words = words_of(dialect)
        groups = "".join(f", {words.get(sources.get(name, ''), name)} AS g_{name}" for name in names)
        at: TypeEngine[Any] = DateTime(timezone=True) if dialect == "postgresql" else Text()
        kinds: Mapping[str, TypeEngine[Any]] = {
            "id": BigInteger(), "at": at, "status": Text(), "outcome": Text(), "waited_us": Integer(),
        }  # fmt: skip
        columns = [column(name, kind) for name, kind in kinds.items()] + [column(f"g_{name}", Text()) for name in names]
        base = _typed(_GROUPED, dialect, shape, columns, groups=groups).subquery("base")
        return aggregate(dialect, base, by, zone, _COUNTED, in_buckets=in_buckets)

    return Statement(build)


async def stats(transactions: Transactions, found: Criteria, grouped: Grouping) -> Stats:
    """Count approvals and how long they waited. Columns as for `ApprovalManager.stats`."""
    values = {**found.values, **grouped.values}
    zone = grouped.offsets(*(await read_all(transactions, _SPAN, values))[0]) if grouped.zone else ()
    statement = _grouped(found.shape, grouped.by, zone, in_buckets=grouped.bucket is not None)
    rows = await read_all(transactions, statement, values)
    return stats_of(rows, grouped, _COUNTED, _METRICS)


@lru_cache(maxsize=128)
def _exported(shape: Shape) -> Statement:
    def expression(dialect: str, name: str, kind: str) -> str:
        words = words_of(dialect) | _DIALECTS[dialect]
        if name == "votes":
            return words["votes"]
        if name == "status":
            return words["readable_status"]
        form = "uuid" if name == "approval_id" else kind
        return words[f"as_{form}"].format(name) if f"as_{form}" in words else name

    def build(dialect: str) -> Any:
        texts = (f"{expression(dialect, each.name, each.kind)} AS {each.name}" for each in _EXPORTED)
        columns: list[Any] = [_requests.c.get(each.name, column(each.name)) for each in _EXPORTED]
        return _typed(_EXPORT, dialect, shape, columns, exported=", ".join(texts))

    return Statement(build)


async def export(
    transactions: Transactions, found: Criteria, path: str | PathLike[str], options: ExportOptions
) -> ExportResult:
    """Write the approvals that match to a file, oldest first. Errors as for `ApprovalManager.export`."""
    if not isinstance(transactions, Database):
        raise ValueError("An export needs a connection of its own: use `store.approvals.export`.")
    source = Source(_exported(found.shape), found.values, _EXPORTED, "created_at")
    return await export_rows(transactions, source, path, options)
