"""From an event to the row that is stored: scrubbed, flagged, hashed. The hot path of every write."""

from __future__ import annotations

import asyncio
import hashlib
import json
from collections.abc import AsyncIterable, AsyncIterator, Callable, Iterable, Mapping, Sequence
from datetime import UTC, datetime
from itertools import islice
from operator import itemgetter
from typing import Any, TypeAlias
from uuid import UUID

from pydantic import ValidationError
from sqlalchemy import JSON, Column, Float, Integer

from agent_gateway_store.clock import utc_now
from agent_gateway_store.encoding.canonical import tag
from agent_gateway_store.encoding.plain import plain, type_name
from agent_gateway_store.encoding.sanitize import MAX_KEY_BYTES, Scrubber, is_storable
from agent_gateway_store.models.audit import AuditEvent, Decision, ExecutionStatus, OutputDecision, RedactionFlag
from agent_gateway_store.models.columns import UTC_MAX, UTC_MIN, JsonOf, UtcDateTime

UNSTORABLE = "UNSTORABLE"
INVALID = "INVALID"
PLUGIN_FAILED = "PLUGIN_FAILED"
WITHHELD = "[WITHHELD]"
REUSED_LABEL = "REQUEST_ID_REUSED"

COLUMNS = tuple(name for name in AuditEvent.model_fields if name != "id")
"""The columns of an encoded row, in order."""

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
# An object without members.
_EMPTY = "{}"
# Fields that came later, as members of the hashed document. Where they hold nothing they are left out of it, so that an
# event that was stored before them keeps its hash.
_OPTIONAL = {"approval_id": '"approval_id":"%s",', "extra": '"extra":%s,'}
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
# Chosen, of a commit of `write_many`: twice the batch of single writes, as no caller waits for one event of it.
BULK_ROWS = 2_000
# Chosen: a few milliseconds of work, after which other tasks may run.
_SLICE_EVENTS = 50
# Chosen: about what a row takes in memory besides its long texts.
_ROW_BYTES = 2_000

_text = json.encoder.encode_basestring
# The C encoder, which `JSONEncoder.encode` makes anew at each call. Only CPython has it.
_make_encoder: Any = getattr(json.encoder, "c_make_encoder", None)
_chunks = _make_encoder and _make_encoder(None, str, _text, None, ":", ",", True, False, True)
_encoder = json.JSONEncoder(sort_keys=True, separators=(",", ":"), ensure_ascii=False, check_circular=False)


def _encode(value: Any) -> str:
    return "".join(_chunks(value, 0)) if _chunks else _encoder.encode(value)


EncodedRow: TypeAlias = tuple[Any, ...]
"""One row as the drivers take it: values in the order of `COLUMNS`, JSON as text. A tuple of plain values, which the
garbage collector does not track; otherwise it would cost as much as everything else here."""


def encode_event(event: AuditEvent, *, org_id: str | None = None) -> EncodedRow:
    """Return the row for `event`, which itself is not changed.

    What no database can hold is replaced and noted in `redaction_flags`. So is what was set past the validation and is
    not valid, as far as the event says the same without it.

    Args:
        event: Any event that could be constructed.
        org_id: Organisation to stamp; None keeps the event's own.

    Raises:
        TypeError: It is not an event, or one that `model_construct` left incomplete.
        ValidationError: A decision, a status or a hash was set past the validation, and is not valid.
    """
    values = _row_of(event, org_id)
    if _is_typed(values):
        try:
            return _stored(values)
        except (TypeError, ValueError):
            # A text field holds something else: the validation below says so.
            values = _row_of(event, org_id)
    try:
        valid = AuditEvent.model_validate(values)
    except ValidationError as exc:
        # An error without a place was raised by an object inside a flag.
        invalid = {error["loc"][0] if error["loc"] else "redaction_flags" for error in exc.errors()}
        valid = AuditEvent.model_validate(_repaired(values, invalid))
    return _stored(_row_of(valid, org_id))


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


async def encode_batches(
    events: Iterable[AuditEvent] | AsyncIterable[AuditEvent],
    org_id: str | None,
    *,
    reject: Callable[[AuditEvent, Exception], None],
) -> AsyncIterator[list[EncodedRow]]:
    """Yield the rows of `events` in batches of about `BULK_ROWS`; other tasks run meanwhile.

    An event that is not valid goes to `reject`. If that raises, or `events` does, those before it are yielded first.
    """
    rows: list[EncodedRow] = []
    try:
        async for some in _slices(events):
            for event in some:
                try:
                    rows.append(encode_event(event, org_id=org_id))
                except ValidationError as exc:
                    reject(event, exc)
            if len(rows) >= BULK_ROWS:
                yield rows
                rows = []
    except Exception:
        if rows:
            yield rows
        raise
    if rows:
        yield rows


async def _slices(events: Iterable[AuditEvent] | AsyncIterable[AuditEvent]) -> AsyncIterator[Sequence[AuditEvent]]:
    if isinstance(events, AsyncIterable):
        async for event in events:
            yield (event,)
        return
    source = iter(events)
    while True:
        some: list[AuditEvent] = []
        try:
            some.extend(islice(source, _SLICE_EVENTS))
        except Exception:
            yield some
            raise
        if not some:
            return
        yield some
        # A plain iterable never lets the event loop run.
        await asyncio.sleep(0)


def _row_of(event: AuditEvent, org_id: str | None) -> dict[str, Any]:
    # The first question answers nearly always, at a tenth of what `issubclass` takes of a Pydantic model.
    if type(event) is not AuditEvent and not issubclass(type(event), AuditEvent):
        raise TypeError(
            f"The event must be a whole AuditEvent, not {type_name(type(event)).removeprefix('builtins.')}."
        )
    given: Mapping[str, Any] = event.__dict__
    try:
        values = {name: given[name] for name in COLUMNS}
    except KeyError as exc:
        raise TypeError(f"The event must be a whole AuditEvent, not AuditEvent without {exc}.") from None
    if not _KINDS.issuperset(map(type, values.values())):
        # A subclass may do anything when it is compared, encoded or sent.
        values = {
            name: value if issubclass(type(value), datetime | UUID) else plain(value) for name, value in values.items()
        }
    if org_id is not None:
        values["org_id"] = org_id
    return values


def _is_typed(values: dict[str, Any]) -> bool:
    """True if every value but the texts has the type that validation gives; one that has not could fail its batch."""
    return (
        type(values["decision"]) is Decision
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
    if not _is_plain(values):
        _scrub(values)
    return _with_hash(values)


def key_of(row: EncodedRow) -> tuple[str, str]:
    """Return request_id and org_id, which together are unique."""
    return row[_REQUEST_ID], row[_ORG_ID]


def hash_of(row: EncodedRow) -> str:
    """Return the content_hash: two rows with the same one are the same event."""
    return row[_CONTENT_HASH]  # type: ignore[no-any-return]


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
    """Return the row of values that were stored before, unchanged."""
    encoded = {name: values[name] for name in COLUMNS}
    _encode_json(encoded)
    return tuple(encoded.values())


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


_REQUEST_ID, _ORG_ID, _CONTENT_HASH = map(COLUMNS.index, ("request_id", "org_id", "content_hash"))
_large = itemgetter(*map(COLUMNS.index, ("sanitized_args", "risk_labels", "redaction_flags", "extra", *_LONG)))


def _encode_json(values: dict[str, Any]) -> None:
    labels, flags, extra = values["risk_labels"], values["redaction_flags"], values["extra"]
    values["sanitized_args"] = _encode(values["sanitized_args"])
    values["risk_labels"] = f"[{','.join(map(_text, labels))}]" if labels else "[]"
    values["redaction_flags"] = _encode([flag.__dict__ for flag in flags]) if flags else "[]"
    values["extra"] = _encode(extra) if extra else _EMPTY
    values["approval_id"] = values["approval_id"] and str(values["approval_id"])


def _with_hash(values: dict[str, Any]) -> EncodedRow:
    """Encode the JSON and set `content_hash`: SHA-256 (64 hex digits) of the canonical event.

    It is taken over `json.dumps(document, sort_keys=True, separators=(",", ":"), ensure_ascii=False)` in UTF-8, where
    the document is `event.model_dump(mode="json", exclude={"id", "content_hash"})` of the stored event, without
    `approval_id` where that is None and without `extra` where that is empty.
    """
    _encode_json(values)
    values["content_hash"] = hashlib.sha256(_document(*_hashed(values)).encode()).hexdigest()
    return tuple(values.values())


def _member(column: Column[Any]) -> str:
    """Return the part of the document's f-string for this column, whose value is a variable of its name."""
    name = column.name
    if name in _OPTIONAL:
        return f"{{_none if {name} in _nothing else _{name} % {name}}}"
    match column.type:
        case Float():
            value = f"{{_real({name})}}"
        case Integer():
            value = f"{{{name}:d}}"
        case UtcDateTime():
            value = f'"{{{name}.isoformat()[:-6]}}Z"'
        case JSON() | JsonOf():
            # Encoded already.
            value = f"{{{name}}}"
        case _:
            value = f"{{_null if {name} is None else _text({name})}}" if column.nullable else f"{{_text({name})}}"
    return f'"{name}":{value},'


def _writer(columns: list[Column[Any]]) -> Callable[..., str]:
    """Return a function that makes the document from the values of these columns.

    Its code is generated, as that of a dataclass is: hashing is most of the cost of a write, and a loop over the
    columns takes half as long again.
    """
    parameters, members = ", ".join(column.name for column in columns), "".join(map(_member, columns))[:-1]
    names = {"_null": "null", "_real": float.__repr__, "_text": _text, "_none": "", "_nothing": (None, _EMPTY)}
    names |= {f"_{name}": member for name, member in _OPTIONAL.items()}
    made: Callable[..., str] = eval(f"lambda {parameters}: f'{{{{{members}}}}}'", names)  # noqa: S307  of our own names
    return made


_HASHED = sorted(set(COLUMNS) - {"content_hash"})
_hashed = itemgetter(*_HASHED)
_document = _writer([AuditEvent.__table__.c[name] for name in _HASHED])  # type: ignore[attr-defined]
_stored_values = itemgetter(*map(COLUMNS.index, _HASHED))
_STAMP, _FLAGS, _APPROVAL = map(_HASHED.index, ("timestamp", "redaction_flags", "approval_id"))
_JSON = tuple(map(_HASHED.index, ("sanitized_args", "risk_labels", "extra")))


def hash_of_stored(row: Sequence[Any]) -> str:
    """Return the `content_hash` of an event from its columns as the drivers give them, in the order of `COLUMNS`.

    JSON and UUID are text. Raises what may be, where somebody has changed the row past the store and it is no event.
    """
    values = list(_stored_values(row))
    if type(values[_STAMP]) is str:
        values[_STAMP] = datetime.fromisoformat(values[_STAMP]).replace(tzinfo=UTC)
    for place in _JSON:
        # Most are empty.
        if values[place] not in (_EMPTY, "[]"):
            values[place] = _encode(json.loads(values[place]))
    if values[_FLAGS] != "[]":
        flags = [RedactionFlag(**flag) for flag in json.loads(values[_FLAGS])]
        values[_FLAGS] = _encode([flag.__dict__ for flag in flags])
    values[_APPROVAL] = values[_APPROVAL] and str(UUID(values[_APPROVAL]))
    return hashlib.sha256(_document(*values).encode()).hexdigest()


def _is_plain(values: dict[str, Any]) -> bool:
    """True if nothing in the row must be replaced, as in nearly every event."""
    # One check of the joined texts in place of eighteen. Longer ones may be plain as well, and take the slow path.
    everything = "".join([text for name in _TEXTS if (text := values[name]) is not None])
    return (
        len(everything) <= MAX_KEY_BYTES
        and everything.isascii()
        and "\0" not in everything
        and is_storable(values["sanitized_args"])
        and is_storable(values["risk_labels"])
        and (not values["extra"] or is_storable(values["extra"]))
        and 0 < values["risk_score"] < _LARGEST_BIGINT
        and values["latency_ms"] <= _LARGEST_BIGINT
        and UTC_MIN < values["timestamp"] < UTC_MAX
        and not values["redaction_flags"]
    )


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
