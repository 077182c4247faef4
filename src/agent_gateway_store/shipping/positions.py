"""The statements of shipping: how far each sink is, and what it has refused."""

from __future__ import annotations

from typing import Any

from sqlalchemy import BigInteger, Text, and_, bindparam, delete, false, literal_column, null, select, update
from sqlalchemy.dialects import postgresql, sqlite

from agent_gateway_store.models.columns import UtcDateTime
from agent_gateway_store.models.shipping import AuditSink, DeadLetter
from agent_gateway_store.storage.statements import Statement

sinks, letters = AuditSink.__table__, DeadLetter.__table__  # type: ignore[attr-defined]
# The dialects write ON CONFLICT alike.
_INSERT: dict[str, Any] = {"sqlite": sqlite.insert, "postgresql": postgresql.insert}


def _text(name: str) -> Any:
    return bindparam(f"p_{name}", type_=Text())


_NOW = bindparam("p_now", type_=UtcDateTime())
_EVENT = bindparam("p_event_id", type_=BigInteger())
_SINK = and_(sinks.c.sink == _text("sink"), sinks.c.org_id == _text("org_id"))
_LETTER = and_(letters.c.sink == _text("sink"), letters.c.org_id == _text("org_id"))
_ERROR = {"last_error": _text("error")}

POSITION = Statement(select(sinks.c.cursor).where(_SINK))
BEGIN = Statement(
    lambda dialect: (
        _INSERT[dialect](sinks)
        .values(sink=_text("sink"), org_id=_text("org_id"), cursor=_text("cursor"), moved_at=_NOW)
        .on_conflict_do_nothing()
        .returning(sinks.c.cursor)
    )
)
# Compared and set: a shipper that was stopped for so long that another one took over moves nothing.
MOVE = Statement(
    update(sinks)
    .where(_SINK, sinks.c.cursor == _text("before"))
    .values(cursor=_text("cursor"), moved_at=_NOW, last_error=null())
    .returning(sinks.c.sink)
)
NOTE = Statement(update(sinks).where(_SINK, sinks.c.cursor == _text("before")).values(_ERROR).returning(sinks.c.sink))
# A batch that comes again after a crash is refused again.
REFUSE = Statement(
    lambda dialect: (
        _INSERT[dialect](letters)
        .values(
            sink=_text("sink"),
            org_id=_text("org_id"),
            event_id=_EVENT,
            error=_text("error"),
            is_due=false(),
            created_at=_NOW,
        )
        .on_conflict_do_update(
            index_elements=["sink", "org_id", "event_id"], set_={"error": _text("error"), "is_due": false()}
        )
        .returning(letters.c.id)
    )
)
FIRST_DUE = Statement(
    select(letters.c.event_id).where(_LETTER, letters.c.is_due).order_by(letters.c.id).limit(literal_column("1"))
)
SENT = Statement(delete(letters).where(_LETTER, letters.c.event_id == _EVENT, letters.c.is_due).returning(letters.c.id))
FORGET = (
    Statement(delete(letters).where(_LETTER).returning(letters.c.id)),
    Statement(delete(sinks).where(_SINK).returning(sinks.c.sink)),
)
