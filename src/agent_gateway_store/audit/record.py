"""From an event to the row that is stored: scrubbed, flagged, hashed. The hot path of every write."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import UTC, datetime
from operator import itemgetter
from typing import Any, TypeAlias
from uuid import UUID

from pydantic import ValidationError

from agent_gateway_store.audit.document import COLUMNS, EMPTY, HASHED, document, document_writer, encode, encode_labels
from agent_gateway_store.clock import utc_now
from agent_gateway_store.encoding.canonical import tag
from agent_gateway_store.encoding.plain import plain, type_name
from agent_gateway_store.encoding.sanitize import MAX_KEY_BYTES, Scrubber, is_heavy, is_storable
from agent_gateway_store.models.audit import AuditEvent, Decision, ExecutionStatus, OutputDecision, RedactionFlag
from agent_gateway_store.models.columns import UTC_MAX, UTC_MIN

UNSTORABLE = "UNSTORABLE"
INVALID = "INVALID"
PLUGIN_FAILED = "PLUGIN_FAILED"
WITHHELD = "[WITHHELD]"
REUSED_LABEL = "REQUEST_ID_REUSED"

# Cut to the length that an index holds, as events are found by them.
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
# What a BIGINT of PostgreSQL and an INTEGER of SQLite hold.
_LARGEST_BIGINT = 2**63 - 1
_KINDS = frozenset({str, type(None), int, float, dict, list, datetime, UUID, Decision, ExecutionStatus, OutputDecision})
# A value that is not valid says nothing; neither do these, which replace it.
_REPLACEMENTS: dict[str, Callable[[], Any]] = {
    "sanitized_args": lambda: {WITHHELD: INVALID},
    "extra": lambda: {WITHHELD: INVALID},
    "approval_id": lambda: None,
    "redaction_flags": list,
    "risk_score": float,
    "latency_ms": int,
    "timestamp": utc_now,
}
# Chosen: about what a row takes in memory besides its long texts.
_ROW_BYTES = 2_000

EncodedRow: TypeAlias = tuple[Any, ...]
"""One row as the drivers take it: values in the order of `COLUMNS`, JSON as text. A tuple of plain values, which the
garbage collector does not track; otherwise it would cost as much as everything else here."""


def encode_event(event: AuditEvent, *, org_id: str | None = None, trace_id: str | None = None) -> EncodedRow:
    """Return the row for `event`, which itself is not changed.

    What no database can hold is replaced and noted in `redaction_flags`. So is what was set past the validation and is
    not valid, as far as the event says the same without it.

    Args:
        event: Any event that could be constructed.
        org_id: Organisation to stamp; None keeps the event's own.
        trace_id: For an event that has none.

    Raises:
        TypeError: It is not an event, or one that `model_construct` left incomplete.
        ValidationError: A decision, a status or a hash was set past the validation, and is not valid.
    """
    given = _values_of(event, trace_id)
    return _quick_row(given, org_id) or _any_row(given, org_id)


def encode_light(event: AuditEvent, *, org_id: str | None = None, trace_id: str | None = None) -> EncodedRow | None:
    """Return the row as `encode_event` does, or None if that could hold the event loop up: use a thread."""
    given = _values_of(event, trace_id)
    row = _quick_row(given, org_id)
    return row if row is not None or is_heavy(given) else _any_row(given, org_id)


def _quick_row(given: tuple[Any, ...], org_id: str | None) -> EncodedRow | None:
    try:
        return _plain_row(given, org_id)
    except TypeError:
        # A text is something else, which the validation says.
        return None


def _any_row(given: tuple[Any, ...], org_id: str | None) -> EncodedRow:
    values = _row_of(given, org_id)
    if _is_typed(values):
        try:
            return _stored(values)
        except (TypeError, ValueError):
            values = _row_of(given, org_id)
    try:
        valid = AuditEvent.model_validate(values)
    except ValidationError as exc:
        # An error without a place was raised by an object inside a flag.
        invalid = {error["loc"][0] if error["loc"] else "redaction_flags" for error in exc.errors()}
        valid = AuditEvent.model_validate(_repaired(values, invalid))
    return _stored(_row_of(_values_of(valid), org_id))


def _repaired(values: Mapping[str, Any], invalid: Iterable[Any]) -> dict[str, Any]:
    """Return the values with a flagged replacement for each invalid one that has a replacement."""
    repaired = dict(values)
    flags = [flag for flag in _listed(values["redaction_flags"]) if type(flag) is RedactionFlag]
    for name in invalid:
        if name in _TEXTS:
            repaired[name] = "" if values[name] is None else str(tag(values[name], as_key=True))
        elif name == "risk_labels":
            repaired[name] = [str(tag(label, as_key=True)) for label in _listed(values[name])]
        elif name in _REPLACEMENTS:
            repaired[name] = _REPLACEMENTS[name]()
        else:
            continue
        flags.append(RedactionFlag(field=name, reason=INVALID))
    return repaired | {"redaction_flags": flags}


def _listed(value: Any) -> Sequence[Any]:
    found = plain(value)
    return found if type(found) is list or type(found) is tuple else ()


def _values_of(event: AuditEvent, trace_id: str | None = None) -> tuple[Any, ...]:
    """Return the values of an event in the order of `COLUMNS`."""
    # The first question answers nearly always, at a tenth of what `issubclass` takes of a Pydantic model.
    if type(event) is not AuditEvent and not issubclass(type(event), AuditEvent):
        raise TypeError(
            f"The event must be a whole AuditEvent, not {type_name(type(event)).removeprefix('builtins.')}."
        )
    try:
        values = _in_order(event.__dict__)
    except KeyError as exc:
        raise TypeError(f"The event must be a whole AuditEvent, not AuditEvent without {exc}.") from None
    if trace_id is not None and values[_TRACE_ID] is None:
        values = (*values[:_TRACE_ID], trace_id, *values[_TRACE_ID + 1 :])
    return values


def _row_of(given: tuple[Any, ...], org_id: str | None) -> dict[str, Any]:
    values = dict(zip(COLUMNS, given, strict=True))
    if not _KINDS.issuperset(map(type, given)):
        # A subclass may do anything when it is compared, encoded or sent.
        values = {
            name: value if issubclass(type(value), datetime | UUID) else plain(value) for name, value in values.items()
        }
    if org_id is not None:
        values["org_id"] = org_id
    return values


def _plain_row(given: tuple[Any, ...], org_id: str | None) -> EncodedRow | None:
    """Return the row of an event in which nothing must be replaced, as in nearly every one; None if one has to look.

    What the other functions do one after the other, in half the time: every value is in a variable.

    Raises:
        TypeError: A text is something else.
    """
    if not _KINDS.issuperset(map(type, given)):
        return None
    # fmt: off
    (
        request_id, org, trace_id, session_id, parent_request_id, timestamp, caller_id, caller_role, key_id,
        environment, mcp_server, tool_name, args_hash, args, labels, risk_score, rule, policy_version, decision,
        approver_id, status, latency_ms, output_hash, output_decision, output_rationale, flags, explanation, rationale,
        approval_id, extra, _,
    ) = given
    if org_id is not None:
        org = org_id
    # One check of the joined texts in place of eighteen. Longer ones may be plain as well, and are looked at again.
    texts = "".join([
        request_id, org, caller_id, caller_role, environment, mcp_server, tool_name, rule, rationale,
        *[text for text in (
            trace_id, session_id, parent_request_id, key_id, policy_version, approver_id, output_hash, output_rationale,
            explanation,
        ) if text is not None],
    ])
    if not (
        len(texts) <= MAX_KEY_BYTES and texts.isascii() and texts.isprintable()
        and '"' not in texts and "\\" not in texts
        and type(decision) is Decision and type(output_decision) is OutputDecision
        and (status is None or type(status) is ExecutionStatus)
        and type(latency_ms) is int and 0 <= latency_ms <= _LARGEST_BIGINT
        and type(risk_score) is float and 0 < risk_score < _LARGEST_BIGINT
        and type(timestamp) is datetime and timestamp.tzinfo is UTC and UTC_MIN < timestamp < UTC_MAX
        and type(args) is dict and is_storable(args)
        and type(labels) is list and (not labels or is_storable(labels))
        and type(extra) is dict and (not extra or is_storable(extra))
        and type(flags) is list and not flags
        and (approval_id is None or type(approval_id) is UUID)
    ):
        return None
    encoded = (
        request_id, org, trace_id, session_id, parent_request_id, timestamp, caller_id, caller_role, key_id,
        environment, mcp_server, tool_name, args_hash, encode(args), encode_labels(labels), risk_score, rule,
        policy_version, decision, approver_id, status, latency_ms, output_hash, output_decision, output_rationale, "[]",
        explanation, rationale, approval_id and str(approval_id), encode(extra) if extra else EMPTY,
    )
    # fmt: on
    return (*encoded, hashlib.sha256(_plain_document(*encoded).encode()).hexdigest())


def _is_typed(values: dict[str, Any]) -> bool:
    """True if every value has the type that validation gives; one that has not could fail its batch."""
    return (
        all(values[name] is None or type(values[name]) is str for name in _TEXTS)
        and type(values["decision"]) is Decision
        and type(values["output_decision"]) is OutputDecision
        and (values["execution_status"] is None or type(values["execution_status"]) is ExecutionStatus)
        and type(values["latency_ms"]) is int
        and values["latency_ms"] >= 0
        and type(values["risk_score"]) is float
        and type(values["timestamp"]) is datetime
        and values["timestamp"].tzinfo is UTC
        and type(values["sanitized_args"]) is dict
        and type(values["extra"]) is dict
        and (values["approval_id"] is None or type(values["approval_id"]) is UUID)
        and type(values["risk_labels"]) is list
        and type(values["redaction_flags"]) is list
        and all(type(flag) is RedactionFlag for flag in values["redaction_flags"])
    )


def _stored(values: dict[str, Any]) -> EncodedRow:
    _scrub(values)
    return _with_hash(values)


def key_of(row: EncodedRow) -> tuple[str, str]:
    """Return request_id and org_id, which together are unique."""
    return row[_REQUEST_ID], row[_ORG_ID]


def hash_of(row: EncodedRow) -> str:
    """Return the content_hash."""
    return row[_CONTENT_HASH]  # type: ignore[no-any-return]


def mark_of(row: EncodedRow) -> str:
    """Return what `is_same` compares: the content_hash and the trace."""
    trace_id = row[_TRACE_ID]
    return hash_of(row) if trace_id is None else f"{hash_of(row)}:{trace_id}"


def is_same(row: EncodedRow, mark: str | None) -> bool:
    """True if `row` is the event of this mark: a retry may belong to another trace, by which it was stamped."""
    digest, _, trace_id = (mark or "").partition(":")
    if digest == hash_of(row):
        return True
    if not digest or (row[_TRACE_ID] or "") == trace_id:
        return False
    return digest == hash_of(_with_hash(to_values(row) | {"trace_id": trace_id or None}))


def size_of(row: EncodedRow) -> int:
    """Return about how many bytes of memory the row takes."""
    return _ROW_BYTES + sum(map(len, filter(None, _large(row))))


def to_values(row: EncodedRow) -> dict[str, Any]:
    """Return the row as column name to value, as SQLAlchemy's column types take it."""
    values = dict(zip(COLUMNS, row, strict=True))
    for name in ("sanitized_args", "risk_labels", "extra"):
        values[name] = json.loads(values[name])
    values["approval_id"] = values["approval_id"] and UUID(values["approval_id"])
    values["redaction_flags"] = [RedactionFlag(**flag) for flag in json.loads(values["redaction_flags"])]
    return values


def from_values(values: Mapping[str, Any]) -> EncodedRow:
    """Return the row of values that were spooled before; a field that the version then did not know has its default.

    Raises any error for values that are not an event or do not fit their hash: they were altered, or a newer version
    wrote them.
    """
    encoded = {name: values[name] for name in COLUMNS}
    for name, value in encoded.items():
        if value is None and not AuditEvent.__table__.c[name].nullable:
            encoded[name] = AuditEvent.model_fields[name].get_default(call_default_factory=True)
    row = _with_hash(encoded)
    if hash_of(row) != values["content_hash"]:
        raise ValueError("its hash is another one")
    return row


def with_derived_id(row: EncodedRow) -> EncodedRow:
    """Return the row under a new request_id, because another event has its own.

    The id is derived from the content, so that the same event under the same used id gives the same row again.
    """
    values, digest = to_values(row), hash_of(row)
    base = values["request_id"].encode()[: MAX_KEY_BYTES - len(digest) - 1].decode("utf-8", "ignore")
    values["request_id"] = f"{base}~{digest}"
    if REUSED_LABEL not in values["risk_labels"]:
        values["risk_labels"] = [*values["risk_labels"], REUSED_LABEL]
    return _with_hash(values)


def without_payload(row: EncodedRow) -> EncodedRow:
    """Return the row without arguments, extra and free texts, each flagged: a plugin that redacts them failed."""
    values = to_values(row)
    replaced: dict[str, Any] = {name: WITHHELD for name in _QUOTING if values[name]}
    replaced |= {name: {WITHHELD: PLUGIN_FAILED} for name in ("sanitized_args", "extra") if values[name]}
    known = {(flag.field, flag.reason) for flag in values["redaction_flags"]}
    values["redaction_flags"] += [
        RedactionFlag(field=name, reason=PLUGIN_FAILED) for name in replaced if (name, PLUGIN_FAILED) not in known
    ]
    return _with_hash(values | replaced)


_hashed = itemgetter(*HASHED)
_plain_document = document_writer(_TEXTS)
_in_order: Callable[[Mapping[str, Any]], EncodedRow] = itemgetter(*COLUMNS)
_REQUEST_ID, _ORG_ID, _TRACE_ID, _CONTENT_HASH = map(
    COLUMNS.index, ("request_id", "org_id", "trace_id", "content_hash")
)
_large = itemgetter(*map(COLUMNS.index, ("sanitized_args", "risk_labels", "redaction_flags", "extra", *_LONG)))


def _with_hash(values: dict[str, Any]) -> EncodedRow:
    """Encode the JSON and set `content_hash`: SHA-256 (64 hex digits) of the canonical event.

    It is taken over `json.dumps(document, sort_keys=True, separators=(",", ":"), ensure_ascii=False)` in UTF-8, where
    the document is `event.model_dump(mode="json", exclude={"id", "content_hash"})` of the stored event, without
    `approval_id` where that is None and without `extra` where that is empty.
    """
    flags, extra = values["redaction_flags"], values["extra"]
    values["sanitized_args"] = encode(values["sanitized_args"])
    values["risk_labels"] = encode_labels(values["risk_labels"])
    values["redaction_flags"] = encode([flag.__dict__ for flag in flags]) if flags else "[]"
    values["extra"] = encode(extra) if extra else EMPTY
    values["approval_id"] = values["approval_id"] and str(values["approval_id"])
    values["content_hash"] = hashlib.sha256(document(*_hashed(values)).encode()).hexdigest()
    return tuple(values.values())


def _scrub(values: dict[str, Any]) -> None:
    # An event with a hash was stored before, and must stay the same event when it is imported.
    scrubber = Scrubber(is_second=values["content_hash"] is not None)
    for name in _SHORT:
        if values[name] is not None:
            values[name] = scrubber.text(name, values[name], limit=MAX_KEY_BYTES)
    for name in _LONG:
        if values[name] is not None:
            values[name] = scrubber.text(name, values[name])
    values["sanitized_args"] = scrubber.json("sanitized_args", values["sanitized_args"])
    values["risk_labels"] = scrubber.json("risk_labels", values["risk_labels"])
    values["extra"] = scrubber.json("extra", values["extra"])
    # The order of the calls is that of the flags, which are part of the hash.
    values["risk_score"] = scrubber.number("risk_score", values["risk_score"])
    if values["latency_ms"] > _LARGEST_BIGINT:
        values["latency_ms"] = _LARGEST_BIGINT
        scrubber.report("latency_ms")
    # The flag of an event that was stored before may be one of those beyond the number that is kept.
    if (
        values["content_hash"] is None
        and values["timestamp"] in (UTC_MIN, UTC_MAX)
        and not any((flag.field, flag.reason) == ("timestamp", UNSTORABLE) for flag in values["redaction_flags"])
    ):
        scrubber.report("timestamp")
    values["redaction_flags"] = _flags(values["redaction_flags"], scrubber)


def _flags(given: list[RedactionFlag], scrubber: Scrubber) -> list[RedactionFlag]:
    kept = []
    for index, flag in enumerate(given):
        place, digest = f"redaction_flags[{index}]", flag.original_hash
        field, reason = scrubber.text(place, flag.field), scrubber.text(place, flag.reason)
        digest = digest and scrubber.text(place, digest, limit=MAX_KEY_BYTES)
        kept.append(RedactionFlag.model_construct(field=field, reason=reason, original_hash=digest))
    return kept + [
        RedactionFlag.model_construct(field=place, reason=UNSTORABLE, original_hash=digest)
        for place, digest in scrubber.replaced
    ]
