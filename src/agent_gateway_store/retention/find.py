"""What an erasure request is about: events and approvals of a caller, or that hold a text, archives included."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from itertools import product
from pathlib import Path
from typing import Any
from uuid import UUID

from sqlalchemy import ColumnElement, Table, Text, and_, cast, literal, or_, select, true

from agent_gateway_store.archive.files import Record, read_approvals
from agent_gateway_store.archive.manifest import Manifest
from agent_gateway_store.archive.reader import Archive, rows_of
from agent_gateway_store.audit.doors import is_door
from agent_gateway_store.audit.selects import table as events
from agent_gateway_store.models.approval import ApprovalRequest, ApprovalVote
from agent_gateway_store.models.base import repaired
from agent_gateway_store.models.columns import as_utc
from agent_gateway_store.models.retention import FoundRecord
from agent_gateway_store.storage.arrow import in_thread
from agent_gateway_store.storage.database import Database
from agent_gateway_store.storage.filters import identifier, like, searched_text
from agent_gateway_store.storage.statements import Statement, contains

_approvals = ApprovalRequest.__table__
_votes = ApprovalVote.__table__

_EVENT_TEXTS = (
    *("request_id", "caller_id", "session_id", "tool_name", "approver_id", "sanitized_args", "risk_labels", "extra"),
    *("output_policy_rationale", "llm_explanation", "deterministic_rationale"),
)
_APPROVAL_TEXTS = (
    *("request_id", "caller_id", "approver_id", "tool_call", "risk_explanation", "output_payload"),
    *("approver_note", "outcome"),
)
_VOTE_TEXTS = ("approver_id", "note")
_SHOWN = ("request_id", "org_id", "caller_id", "timestamp", "tool_name", "approval_id")


async def find(
    database: Database, *, caller_id: str | None, text: str | None, org_id: str | None, archive: Path | None
) -> list[FoundRecord]:
    """Return what is found; arguments and errors as of `RetentionManager.find`."""
    own = {} if org_id is None else {"org_id": org_id}
    if caller_id is not None:
        own["caller_id"] = identifier("caller_id", caller_id)
    wanted = None if text is None else _spellings(searched_text("text", text))
    found: list[FoundRecord] = []
    async with database.read() as connection:
        dialect = connection.dialect.name
        matches = _matches(events, own)
        if wanted is not None:
            matches = and_(matches, _has_text(dialect, events, _EVENT_TEXTS, wanted))
        statement = select(*(events.c[name] for name in _SHOWN)).where(matches, ~is_door()).order_by(events.c.id)
        for row in await Statement(statement).rows(connection, {}):
            found.append(FoundRecord(kind="event", **repaired(row)))
        approval = _approvals.c
        columns = (approval.request_id, approval.org_id, approval.caller_id, approval.approval_id, approval.tool_call)
        matches = _matches(_approvals, own)
        if wanted is not None:
            voted = select(_votes.c.approval_id).where(_has_text(dialect, _votes, _VOTE_TEXTS, wanted))
            matches = and_(
                matches, or_(_has_text(dialect, _approvals, _APPROVAL_TEXTS, wanted), approval.approval_id.in_(voted))
            )
        statement = select(*columns, approval.created_at.label("timestamp")).where(matches).order_by(approval.id)
        for row in await Statement(statement).rows(connection, {}):
            values = dict(repaired(row))
            tool = values.pop("tool_call").tool
            found.append(FoundRecord(kind="approval", tool_name=tool, **values))
    if archive is not None:
        found += await in_thread(lambda: _in_archive(archive, own, wanted))
    return found


def _spellings(text: str) -> Sequence[str]:
    """Return a text as it is, and as JSON spells it: some columns escape what is beyond ASCII, and others do not."""
    return list(dict.fromkeys([text, json.dumps(text, ensure_ascii=False)[1:-1], json.dumps(text)[1:-1]]))


def _matches(table: Table, own: Mapping[str, str]) -> ColumnElement[bool]:
    return and_(true(), *(table.c[name] == value for name, value in own.items()))


def _has_text(dialect: str, table: Table, names: Sequence[str], texts: Sequence[str]) -> ColumnElement[bool]:
    columns = [cast(table.c[name], Text()) for name in names]
    return or_(*(contains(dialect, columns, literal(like(text), Text())) for text in texts))


def _in_archive(folder: Path, own: Mapping[str, str], texts: Sequence[str] | None) -> list[FoundRecord]:
    import pyarrow.compute as pc

    keep = pc.scalar(True)
    for name, value in own.items():
        keep = keep & (pc.field(name) == value)
    if texts is not None:
        has_text = pc.scalar(False)
        for name, text in product(_EVENT_TEXTS, texts):
            has_text = pc.or_kleene(has_text, pc.match_substring(pc.field(name), text, ignore_case=True))
        keep = keep & has_text
    found = []
    known: set[tuple[Any, ...]] = set()
    for entry, batch in Archive(folder).batches({}, (*_SHOWN, "position"), keep, skips=False):
        for row in rows_of(batch):
            if row in known:
                continue
            known.add(row)
            values = dict(zip(_SHOWN, row[:-1], strict=True))
            approval_id = values["approval_id"] and UUID(values["approval_id"])
            values |= {"timestamp": as_utc(values["timestamp"]), "approval_id": approval_id}
            found.append(FoundRecord(kind="event", file=entry.file, **values))
    manifest = Manifest(folder).read()
    for entry in manifest.of_kind("approvals"):
        for record in read_approvals(manifest, entry):
            if (shown := _shown(record, own, texts)) is not None:
                found.append(FoundRecord(kind="approval", file=entry.file, **shown))
    return found


def _shown(record: Record, own: Mapping[str, str], texts: Sequence[str] | None) -> dict[str, Any] | None:
    approval = record["approval"]
    if any(approval[name] != value for name, value in own.items()):
        return None
    if texts is not None:
        values = [approval[name] for name in _APPROVAL_TEXTS if approval[name] is not None]
        values += [vote[name] for vote in record["votes"] for name in _VOTE_TEXTS]
        held = [each if isinstance(each, str) else json.dumps(each, ensure_ascii=False) for each in values]
        if not any(text.casefold() in each.casefold() for each in held for text in texts):
            return None
    shown = {name: approval[name] for name in ("request_id", "org_id", "caller_id")}
    return shown | {
        "approval_id": UUID(approval["approval_id"]),
        "timestamp": datetime.fromisoformat(approval["created_at"]),
        "tool_name": approval["tool_call"]["tool"],
    }
