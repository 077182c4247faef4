"""An event and an approval with a mark everywhere, and everything that is stored, in which the mark is looked for."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from uuid import UUID

from pyarrow import parquet
from sqlalchemy import text

from agent_gateway_store import AuditEvent, GatewayStore, ToolCall
from agent_gateway_store.archive import Archive
from agent_gateway_store.models.tables import metadata
from agent_gateway_store.store import parts_of
from builders import make_event, make_request

OLD = datetime(2025, 3, 1, 12, tzinfo=UTC)
BEFORE = OLD + timedelta(days=60)
MARK = "belongs-to-ada"


class KilledError(Exception):
    """Stands for the end of a process."""


async def killed(*_given: Any, **_options: Any) -> int:
    """Die before anything is deleted."""
    raise KilledError


def secret_call(mark: str = MARK) -> ToolCall:
    """A call with the mark in its arguments."""
    return ToolCall(server="files", tool="delete_file", arguments={"path": f"/home/{mark}"})


def secret_event(mark: str = MARK, **fields: Any) -> AuditEvent:
    """An event whose mark is everywhere that is erased."""
    return make_event(
        **{
            "request_id": "r-1",
            "timestamp": OLD,
            "sanitized_args": {"path": mark},
            "raw_args_hash": AuditEvent.hash_args({"path": mark}),
            "risk_labels": [mark],
            "output_hash": AuditEvent.hash_args({"out": mark}),
            "output_policy_rationale": mark,
            "llm_explanation": mark,
            "deterministic_rationale": mark,
            "redaction_flags": [{"field": mark, "reason": "PII", "original_hash": AuditEvent.hash_args({"was": mark})}],
            "extra": {"error": mark},
        }
        | fields
    )


async def used_approval(store: GatewayStore, request_id: str, mark: str = MARK) -> UUID:
    """Have an approval with the mark everywhere asked for, given, used and notified of; return its id."""
    call = secret_call(mark)
    token = await store.approvals.issue_token(
        make_request(request_id=request_id, tool_call=call, risk_explanation=mark)
    )
    await store.approvals.approve(token, "alice", f"fine for {mark}")
    await store.approvals.consume_token(token, caller_id="dev-agent", tool_call=call)
    used = await store.approvals.record_outcome(token, f"SUCCESS {mark}")
    while await store.notifications.list("DUE"):
        await asyncio.sleep(0.01)
    return used.approval_id


async def settle(store: GatewayStore) -> None:
    """Write the event, an approval of its request that was used, and its notices; and a neighbour."""
    await used_approval(store, "r-1")
    await store.audit.write_many([secret_event(), make_event(request_id="neighbour", timestamp=OLD)])
    await store.audit.write(make_event(request_id="newest"))
    await store.evidence.seal()


async def secrets_of(store: GatewayStore, request_id: str, mark: str = MARK, folder: Path | None = None) -> list[str]:
    """What must not be found again: the mark, every hash of content, and the salts."""
    event = secret_event(mark)
    stored = await store.audit.get_by_request_id(request_id)
    stored = stored or next(Archive(folder or "").events(request_id=request_id))
    async with store.database.read() as connection:
        salts = [bytes(row[0]).hex() for row in await connection.execute(
            text("SELECT salt FROM audit_leaves WHERE event_id = :id"), {"id": stored.id})]  # fmt: skip
    flags = [flag.original_hash or "" for flag in event.redaction_flags]
    return [mark, event.raw_args_hash, event.output_hash or "", stored.content_hash or "", *flags, *salts]


async def everything(store: GatewayStore, folder: Path | None = None) -> str:
    """Every value of every table, of the archive's files whether they are listed or not, and of Redis, as text."""
    parts: list[str] = []
    async with store.database.engine.connect() as connection:
        for table in metadata.sorted_tables:
            for row in await connection.execute(text(f"SELECT * FROM {table.name}")):
                parts += [value.hex() if isinstance(value, bytes) else str(value) for value in row]
    if folder is not None:
        parts += [path.read_text() for path in folder.rglob("*.jsonl")]
        for path in folder.rglob("*.parquet"):
            with parquet.ParquetFile(path) as file:
                parts.append(str(file.read().to_pylist()))
    client: Any = parts_of(store).redis.client
    if client is not None:
        async for key in client.scan_iter("approval*"):
            parts.append(f"{key!r} {await client.get(key)!r}")
    return "\n".join(parts)
