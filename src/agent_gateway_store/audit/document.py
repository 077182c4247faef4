"""The canonical document of an event, and the hash over it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Collection, Sequence
from datetime import datetime
from decimal import Decimal
from functools import lru_cache
from typing import Any
from uuid import UUID

from sqlalchemy import JSON, Column, Float, Integer

from agent_gateway_store.models.audit import AuditEvent, RedactionFlag
from agent_gateway_store.models.columns import JsonOf, UtcDateTime

COLUMNS = tuple(name for name in AuditEvent.model_fields if name != "id")
"""The columns of an encoded row, in order."""

# An object without members.
EMPTY = "{}"
# Fields that came later, as members of the hashed document. Where they hold nothing they are left out of it, so that an
# event that was stored before them keeps its hash.
_OPTIONAL = {"approval_id": '"approval_id":"%s",', "extra": '"extra":%s,'}
scan_json: Callable[[str, int], tuple[Any, int]] = vars(json.JSONDecoder())["scan_once"]
"""What `json.loads` calls, without its checks: returns the value that begins at an index, and where it ends."""
_text = json.encoder.encode_basestring


def _written_float(text: str) -> float:
    """Return a number of JSON; ValueError for one that is not spelled as Python or PostgreSQL spells a float."""
    value = float(text)
    if text not in (repr(value), _without_exponent(value)):
        raise ValueError("not a float as it is written")
    return value


def _without_exponent(value: float) -> str:
    return format(Decimal(repr(value)), "f")


_scan_exactly: Callable[[str, int], tuple[Any, int]] = vars(json.JSONDecoder(parse_float=_written_float))["scan_once"]
# The C encoder, which `JSONEncoder.encode` makes anew at each call. Only CPython has it.
_make_encoder: Any = getattr(json.encoder, "c_make_encoder", None)
_chunks = _make_encoder and _make_encoder(None, str, _text, None, ":", ",", True, False, True)
_encoder = json.JSONEncoder(sort_keys=True, separators=(",", ":"), ensure_ascii=False, check_circular=False)


def encode(value: Any) -> str:
    """Return a value as canonical JSON."""
    return "".join(_chunks(value, 0)) if _chunks else _encoder.encode(value)


def encode_labels(labels: list[str]) -> str:
    """Return labels as canonical JSON."""
    return f"[{','.join(map(_text, labels))}]" if labels else "[]"


def _member(column: Column[Any], plain: Collection[str]) -> str:
    """Return the part of the document's f-string for this column, whose value is a variable of its name."""
    name = column.name
    if name in _OPTIONAL:
        return f"{{_none if {name} in _nothing else _{name} % {name}}}"
    match column.type:
        case Float():
            value = f"{{_real({name})}}"
        case Integer():
            value = f"{{{name}:d}}"
        case UtcDateTime() if name not in plain:
            value = f'"{{{name}.isoformat()[:-6]}}Z"'
        case JSON() | JsonOf():
            # Encoded already.
            value = f"{{{name}}}"
        case _ if name in plain:
            value = f"{{_null if {name} is None else _quote + {name} + _quote}}" if column.nullable else f'"{{{name}}}"'
        case _:
            value = f"{{_null if {name} is None else _text({name})}}" if column.nullable else f"{{_text({name})}}"
    return f'"{name}":{value},'


def document_writer(plain: Collection[str]) -> Callable[..., str]:
    """Return a function that makes the document from the values of the columns; texts in `plain` need no escape.

    Its code is generated, as that of a dataclass is: hashing is most of the cost of a write, and a loop over the
    columns takes half as long again.
    """
    columns = AuditEvent.__table__.c
    parameters, members = ", ".join(HASHED), "".join(_member(columns[name], plain) for name in sorted(HASHED))[:-1]
    names = {"_null": "null", "_quote": '"', "_real": float.__repr__, "_text": _text}
    names |= {"_none": "", "_nothing": (None, EMPTY)}
    names |= {f"_{name}": member for name, member in _OPTIONAL.items()}
    made: Callable[..., str] = eval(f"lambda {parameters}: f'{{{{{members}}}}}'", names)  # noqa: S307  of our own names
    return made


# The content_hash is the last column.
HASHED = COLUMNS[:-1]
"""The columns of the document, in the order of its writers' arguments."""

document = document_writer(())
_stored_document = document_writer(("timestamp",))
_STAMP, _ARGS, _LABELS, _FLAGS, _APPROVAL, _EXTRA = map(
    HASHED.index, ("timestamp", "sanitized_args", "risk_labels", "redaction_flags", "approval_id", "extra")
)


def _canonical(text: str) -> str:
    """Return the text of a jsonb, which has one form for each value, as canonical JSON; raises what `json` raises."""
    value, end = _scan_exactly(text, 0)
    if end != len(text):
        raise ValueError("something follows the value")
    return encode(value)


def _canonical_as_written(text: str) -> str:
    """Return the same for text of any origin; ValueError if no writer spells it so: it could say more than its hash."""
    canonical = _canonical(text)
    # As SQLAlchemy writes it to SQLite, and as PostgreSQL has written it to an archive.
    if text != canonical and text != json.dumps(value := json.loads(text)) and text != _jsonb(value):
        raise ValueError("not as it was written")
    return canonical


def _jsonb(value: Any) -> str:
    """Return JSON as PostgreSQL writes a jsonb, its members in the order that they have."""
    if isinstance(value, dict):
        return f"{{{', '.join(f'{_text(name)}: {_jsonb(member)}' for name, member in value.items())}}}"
    if isinstance(value, list):
        return f"[{', '.join(map(_jsonb, value))}]"
    return _without_exponent(value) if isinstance(value, float) else encode(value)


# Many events have the same labels. Chosen: so many combinations, of so many characters, take a quarter of a megabyte.
_KEPT, _MAX_KEPT_CHARS = 512, 500
_OF_JSONB = _canonical, lru_cache(_KEPT)(_canonical)
_OF_TEXT = _canonical_as_written, lru_cache(_KEPT)(_canonical_as_written)


def _stamp(value: datetime | str) -> str:
    """Return a time of UTC, with its zone or without one, as the document has it."""
    if type(value) is str:
        stamp = datetime.fromisoformat(value)
        # Another spelling of the same time would be out of the order of the others.
        if stamp.tzinfo or stamp.isoformat(" ", "microseconds") != value:
            raise ValueError("not as it was written")
        return f"{stamp.isoformat()}Z"
    return f"{value.isoformat()[:-6]}Z" if value.tzinfo else f"{value.isoformat()}Z"  # type: ignore[union-attr]


def hash_of_stored(row: Sequence[Any], *, is_jsonb: bool = False) -> str:
    """Return the `content_hash` of an event from its columns as the drivers give them, in the order of `COLUMNS`.

    JSON and UUID are text; the time is one of UTC, or text of it. A row that somebody changed past the store, so that
    it is not an event, may raise any error.

    Args:
        is_jsonb: The JSON comes from columns of that type, which hold it in one form. Other text must have a form that
            this package, or PostgreSQL, writes.
    """
    canonical, canonical_labels = _OF_JSONB if is_jsonb else _OF_TEXT
    *values, _ = row
    values[_STAMP] = _stamp(values[_STAMP])
    values[_ARGS] = canonical(values[_ARGS])
    # Most of the others are empty.
    if (labels := values[_LABELS]) != "[]":
        values[_LABELS] = (canonical_labels if len(labels) < _MAX_KEPT_CHARS else canonical)(labels)
    if (extra := values[_EXTRA]) != EMPTY:
        values[_EXTRA] = canonical(extra)
    if values[_FLAGS] != "[]":
        flags = json.loads(canonical(values[_FLAGS]))
        if not isinstance(flags, list):
            raise ValueError("no flags")
        values[_FLAGS] = encode([RedactionFlag(**flag).__dict__ for flag in flags])
    if (approval := values[_APPROVAL]) is not None and str(UUID(approval)) != approval:
        raise ValueError("no approval")
    return hashlib.sha256(_stored_document(*values).encode()).hexdigest()
