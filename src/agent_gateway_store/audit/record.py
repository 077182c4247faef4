"""From an event to the row that is stored: scrubbed, flagged, hashed. The hot path of every write."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from operator import itemgetter
from typing import Any, TypeAlias

from sqlalchemy import JSON, Column, Float, Integer

from agent_gateway_store.encoding.sanitize import MAX_KEY_BYTES, Scrubber, is_storable
from agent_gateway_store.models.audit import AuditEvent, Decision, ExecutionStatus, OutputDecision, RedactionFlag
from agent_gateway_store.models.columns import UTC_MAX, UTC_MIN, JsonOf, UtcDateTime

__all__ = [
    "COLUMNS",
    "PLUGIN_FAILED",
    "REUSED_LABEL",
    "UNSTORABLE",
    "EncodedRow",
    "encode_event",
    "from_values",
    "hash_of",
    "key_of",
    "size_of",
    "to_values",
    "with_derived_id",
    "without_payload",
]

UNSTORABLE = "UNSTORABLE"
PLUGIN_FAILED = "PLUGIN_FAILED"
WITHHELD = "[WITHHELD]"
REUSED_LABEL = "REQUEST_ID_REUSED"

COLUMNS = tuple(name for name in AuditEvent.model_fields if name != "id")
"""The columns of a record, in order."""

_SHORT = (
    "request_id",
    "org_id",
    "trace_id",
    "session_id",
    "parent_request_id",
    "caller_id",
    "key_id",
    "environment",
    "mcp_server",
    "tool_name",
    "approver_id",
)
_LONG = (
    "caller_role",
    "matched_policy_rule",
    "policy_version",
    "output_hash",
    "output_policy_rationale",
    "llm_explanation",
    "deterministic_rationale",
)
_TEXTS = (*_SHORT, *_LONG)
_QUOTING = ("output_policy_rationale", "llm_explanation", "deterministic_rationale")
_LARGEST_BIGINT = 2**63 - 1

_text = json.encoder.encode_basestring
# What `JSONEncoder.encode` makes anew at each call, made once; absent on other interpreters than CPython.
_make_encoder: Any = getattr(json.encoder, "c_make_encoder", None)
_chunks = _make_encoder and _make_encoder(None, str, _text, None, ":", ",", True, False, True)
_encoder = json.JSONEncoder(sort_keys=True, separators=(",", ":"), ensure_ascii=False, check_circular=False)


def _encode(value: Any) -> str:
    return "".join(_chunks(value, 0)) if _chunks else _encoder.encode(value)


EncodedRow: TypeAlias = tuple[Any, ...]
"""One row as the drivers take it: values in the order of `COLUMNS`, JSON as text. A tuple of plain values, because the
garbage collector passes those by, and it would otherwise cost as much as everything else here."""


def encode_event(event: AuditEvent, *, org_id: str | None = None) -> EncodedRow:
    """Return the record for `event`, which itself is not changed.

    What no database can hold is replaced and noted in `redaction_flags`.

    Args:
        event: Any event that could be constructed.
        org_id: Organisation to stamp; None keeps the event's own.

    Raises:
        TypeError: It is not an event, or one that `model_construct` left incomplete.
        ValidationError: A field was set past the validation, as `model_copy(update=...)` does, and is not valid.
    """
    row = _row_of(event, org_id)
    if _is_typed(row):
        try:
            return _stored(row)
        except (TypeError, ValueError):  # a text that is none
            row = _row_of(event, org_id)
    return _stored(_row_of(AuditEvent.model_validate(row), org_id))


def _row_of(event: AuditEvent, org_id: str | None) -> dict[str, Any]:
    try:
        given: Mapping[str, Any] = event.__dict__
        row = {name: given[name] for name in COLUMNS}
    except (AttributeError, KeyError) as exc:
        lacking = f" without {exc}" if isinstance(exc, KeyError) else ""
        raise TypeError(f"Hand over a whole AuditEvent, not {type(event).__name__}{lacking}.") from None
    if org_id is not None:
        row["org_id"] = org_id
    return row


def _is_typed(row: dict[str, Any]) -> bool:
    """True if what is no text has the types that the validation gives; else one row could fail a whole batch."""
    return (
        type(row["decision"]) is Decision
        and type(row["output_decision"]) is OutputDecision
        and (row["execution_status"] is None or type(row["execution_status"]) is ExecutionStatus)
        and type(row["latency_ms"]) is int
        and row["latency_ms"] >= 0
        and type(row["risk_score"]) is float
        and isinstance(row["timestamp"], datetime)
        and row["timestamp"].tzinfo is UTC
        and isinstance(row["sanitized_args"], dict)
        and isinstance(row["risk_labels"], list)
        and isinstance(row["redaction_flags"], list)
        and (not row["redaction_flags"] or all(isinstance(flag, RedactionFlag) for flag in row["redaction_flags"]))
    )


def _stored(row: dict[str, Any]) -> EncodedRow:
    if not _is_plain(row):
        _scrub(row)
    return _with_hash(row)


def key_of(record: EncodedRow) -> tuple[str, str]:
    """Return what must be unique: request_id and org_id."""
    return record[_REQUEST_ID], record[_ORG_ID]


def hash_of(record: EncodedRow) -> str:
    """Return the content_hash, by which two events are the same one."""
    return record[_CONTENT_HASH]  # type: ignore[no-any-return]


def size_of(record: EncodedRow) -> int:
    """Return about how many bytes of memory the record takes."""
    return 2_000 + sum(map(len, filter(None, _large(record))))


def to_values(record: EncodedRow) -> dict[str, Any]:
    """Return the record as column name to value, as SQLAlchemy's column types take it."""
    values = dict(zip(COLUMNS, record, strict=True))
    for name in ("sanitized_args", "risk_labels"):
        values[name] = json.loads(values[name])
    values["redaction_flags"] = [RedactionFlag(**flag) for flag in json.loads(values["redaction_flags"])]
    return values


def from_values(values: Mapping[str, Any]) -> EncodedRow:
    """Return the record of a row that was stored elsewhere before, as it was."""
    row = {name: values[name] for name in COLUMNS}
    _encode_json(row)
    return tuple(row.values())


def with_derived_id(record: EncodedRow) -> EncodedRow:
    """Return the record as it is kept when its request_id belongs to another event already.

    The id is derived from the content, so that the same event under the same used id gives the same record again.
    """
    row, digest = to_values(record), hash_of(record)
    base = row["request_id"].encode()[: MAX_KEY_BYTES - len(digest) - 1].decode("utf-8", "ignore")
    row["request_id"] = f"{base}~{digest}"
    if REUSED_LABEL not in row["risk_labels"]:
        row["risk_labels"] = [*row["risk_labels"], REUSED_LABEL]
    return _with_hash(row)


def without_payload(record: EncodedRow) -> EncodedRow:
    """Return the record without its arguments and free texts, each flagged: a plugin that might redact them failed."""
    row = to_values(record)
    replaced: dict[str, Any] = {name: WITHHELD for name in _QUOTING if row[name]}
    if row["sanitized_args"]:
        replaced["sanitized_args"] = {WITHHELD: PLUGIN_FAILED}
    known = {(flag.field, flag.reason) for flag in row["redaction_flags"]}
    row["redaction_flags"] += [
        RedactionFlag(field=name, reason=PLUGIN_FAILED) for name in replaced if (name, PLUGIN_FAILED) not in known
    ]
    return _with_hash(row | replaced)


_REQUEST_ID, _ORG_ID, _CONTENT_HASH = map(COLUMNS.index, ("request_id", "org_id", "content_hash"))
_large = itemgetter(*map(COLUMNS.index, ("sanitized_args", "risk_labels", "redaction_flags", *_LONG)))


def _encode_json(row: dict[str, Any]) -> None:
    labels, flags = row["risk_labels"], row["redaction_flags"]
    row["sanitized_args"] = _encode(row["sanitized_args"])
    row["risk_labels"] = f"[{','.join(map(_text, labels))}]" if labels else "[]"
    row["redaction_flags"] = _encode([flag.__dict__ for flag in flags]) if flags else "[]"


def _with_hash(row: dict[str, Any]) -> EncodedRow:
    """Encode the JSON and set `content_hash`: SHA-256 (64 hex digits) of the canonical event.

    It is taken over `json.dumps(document, sort_keys=True, separators=(",", ":"), ensure_ascii=False)` in UTF-8, where
    the document is `event.model_dump(mode="json", exclude={"id", "content_hash"})` of the stored event.
    """
    _encode_json(row)
    row["content_hash"] = hashlib.sha256(_document(*_hashed(row)).encode()).hexdigest()
    return tuple(row.values())


def _member(column: Column[Any]) -> str:
    """Return the part of the document's f-string for this column, whose value is a variable of its name."""
    name = column.name
    match column.type:
        case Float():
            value = f"{{_real({name})}}"
        case Integer():
            value = f"{{{name}:d}}"
        case UtcDateTime():
            value = f'"{{{name}.isoformat()[:-6]}}Z"'
        case JSON() | JsonOf():
            value = f"{{{name}}}"  # is JSON already
        case _:
            value = f"{{_null if {name} is None else _text({name})}}" if column.nullable else f"{{_text({name})}}"
    return f'"{name}":{value}'


def _writer(columns: list[Column[Any]]) -> Callable[..., str]:
    """Make the function that writes the document out of the values of these columns.

    Its code is generated, as that of a dataclass is: hashing is most of the cost of a write, and a loop over the
    columns takes half as long again.
    """
    parameters, members = ", ".join(column.name for column in columns), ",".join(map(_member, columns))
    names = {"_null": "null", "_real": float.__repr__, "_text": _text}
    made: Callable[..., str] = eval(f"lambda {parameters}: f'{{{{{members}}}}}'", names)  # noqa: S307  of our own names
    return made


_HASHED = sorted(set(COLUMNS) - {"content_hash"})
_hashed = itemgetter(*_HASHED)
_document = _writer([AuditEvent.__table__.c[name] for name in _HASHED])  # type: ignore[attr-defined]


def _is_plain(row: dict[str, Any]) -> bool:
    """True if nothing in the row needs a closer look: so it is for nearly every event."""
    everything = "".join([text for name in _TEXTS if (text := row[name]) is not None])
    return (
        len(everything) <= MAX_KEY_BYTES
        and everything.isascii()
        and "\0" not in everything
        and is_storable(row["sanitized_args"])
        and is_storable(row["risk_labels"])
        and 0 < row["risk_score"] < _LARGEST_BIGINT
        and row["latency_ms"] <= _LARGEST_BIGINT
        and UTC_MIN < row["timestamp"] < UTC_MAX
        and not row["redaction_flags"]
    )


def _scrub(row: dict[str, Any]) -> None:
    # An event with its hash was stored before, and must stay the same event when it is stored elsewhere.
    scrubber = Scrubber(is_second=row["content_hash"] is not None)
    for name in _SHORT:
        if row[name] is not None:
            row[name] = scrubber.text(name, row[name], limit=MAX_KEY_BYTES)
    for name in _LONG:
        if row[name] is not None:
            row[name] = scrubber.text(name, row[name])
    row["sanitized_args"] = scrubber.json("sanitized_args", row["sanitized_args"])
    row["risk_labels"] = scrubber.json("risk_labels", row["risk_labels"])
    row["risk_score"] = scrubber.number("risk_score", row["risk_score"])
    if row["latency_ms"] > _LARGEST_BIGINT:
        row["latency_ms"] = _LARGEST_BIGINT
        scrubber.report("latency_ms")
    if row["timestamp"] in (UTC_MIN, UTC_MAX) and not any(
        (flag.field, flag.reason) == ("timestamp", UNSTORABLE) for flag in row["redaction_flags"]
    ):
        scrubber.report("timestamp")
    row["redaction_flags"] = _flags(row["redaction_flags"], scrubber)


def _flags(given: list[RedactionFlag], scrubber: Scrubber) -> list[RedactionFlag]:
    kept = [
        RedactionFlag.model_construct(
            field=scrubber.text(f"redaction_flags[{index}]", flag.field),
            reason=scrubber.text(f"redaction_flags[{index}]", flag.reason),
            original_hash=flag.original_hash
            and scrubber.text(f"redaction_flags[{index}]", flag.original_hash, limit=MAX_KEY_BYTES),
        )
        for index, flag in enumerate(given)
    ]
    return kept + [
        RedactionFlag.model_construct(field=place, reason=UNSTORABLE, original_hash=digest)
        for place, digest in scrubber.replaced
    ]
