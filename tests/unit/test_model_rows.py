"""The models as ORM rows: what is assigned reaches the database; what is refused or edited in place does not."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Any, TypeVar

import pytest
from pydantic import ValidationError
from sqlalchemy import Engine, create_engine, inspect, select, text
from sqlalchemy.orm import Session

from agent_gateway_store.models.approval import ApprovalRequest
from agent_gateway_store.models.audit import AuditEvent, RedactionFlag
from agent_gateway_store.models.keys import ApiKey, TrustLevel
from agent_gateway_store.models.tables import metadata
from builders import make_event, make_key, make_request

pytestmark = pytest.mark.unit

R = TypeVar("R")


@pytest.fixture
def engine() -> Iterator[Engine]:
    made = create_engine("sqlite://")
    metadata.create_all(made)
    yield made
    made.dispose()


@pytest.fixture
def session(engine: Engine) -> Iterator[Session]:
    with Session(engine, expire_on_commit=False) as opened:
        yield opened


def event(**fields: Any) -> AuditEvent:
    nested = {"path": "/etc/hosts", "nested": {"deep": {}}, "list": [{"n": 1}, 2]}
    return make_event(**({"sanitized_args": nested} | fields))


def request(**fields: Any) -> ApprovalRequest:
    return make_request(tool_call_hash="cd" * 32, expires_at=datetime(2030, 1, 1, tzinfo=UTC), **fields)


def saved(session: Session, row: R) -> R:
    session.add(row)
    session.commit()
    return row


def stored(session: Session, row: Any) -> Any:
    with Session(session.get_bind(), expire_on_commit=False) as other:
        return other.get(type(row), row.id)


def raw(session: Session, column: str) -> Any:
    table, _, name = column.partition(".")
    return session.connection().execute(text(f"SELECT {name} FROM {table}")).scalar_one()


def test_assigned_values_reach_the_database(session: Session) -> None:
    made = event()
    made.tool_name = "before the insert"
    session.add(made)
    session.commit()
    made.tool_name = "after the insert"
    made.decision = "DENY"  # type: ignore[assignment]
    session.commit()

    assert (made.tool_name, made.decision) == ("after the insert", "DENY")
    assert (stored(session, made).tool_name, stored(session, made).decision) == ("after the insert", "DENY")


def test_a_refused_value_is_not_committed(session: Session) -> None:
    made = saved(session, event())
    for name, wrong in (("latency_ms", -3), ("decision", "MAYBE"), ("sanitized_args", "x"), ("raw_args_hash", "y")):
        with pytest.raises(ValidationError):
            setattr(made, name, wrong)

    assert not session.dirty
    session.commit()
    assert (made.latency_ms, stored(session, made).latency_ms) == (12, 12)
    assert stored(session, made) == made


@pytest.fixture(params=["inserted", "loaded", "reattached", "expired"])
def row(request: pytest.FixtureRequest, session: Session) -> AuditEvent:
    made = saved(session, event())
    if request.param == "loaded":
        session.expunge_all()
        made = session.scalars(select(AuditEvent)).one()
    elif request.param == "reattached":
        session.expunge_all()
        made = AuditEvent.from_row(session.execute(select(AuditEvent.__table__)).mappings().one())
        session.add(made)
    elif request.param == "expired":
        made.tool_name = "never"
        session.rollback()
    return made


def test_json_is_stored_when_it_is_assigned(session: Session, row: AuditEvent) -> None:
    """A change inside a JSON value, at any depth, is the object's alone until it is assigned: also to itself."""
    before = event().sanitized_args
    row.sanitized_args["nested"]["deep"]["new"] = 1
    row.risk_labels.append("new")
    session.commit()
    assert (stored(session, row).sanitized_args, stored(session, row).risk_labels) == (before, [])
    row.sanitized_args = row.sanitized_args
    session.commit()
    assert stored(session, row).sanitized_args["nested"] == {"deep": {"new": 1}}
    kept = row.sanitized_args
    row.sanitized_args = {**before, "new": {"a": [1]}}
    row.redaction_flags = [RedactionFlag(field="a", reason="PII")]
    session.commit()

    assert kept["nested"] == {"deep": {"new": 1}}
    assert stored(session, row).sanitized_args == {**before, "new": {"a": [1]}}
    assert stored(session, row).redaction_flags == [RedactionFlag(field="a", reason="PII")]


def test_a_tool_call_is_stored_when_assigned(session: Session) -> None:
    """A ToolCall is frozen: another one is assigned; an edit of its arguments is not stored."""
    made = saved(session, request())
    made.tool_call.arguments["lost"] = 1
    session.commit()
    assert "lost" not in stored(session, made).tool_call.arguments
    made.tool_call = made.tool_call.model_copy(update={"arguments": {"path": "/tmp/y"}})
    session.commit()

    assert stored(session, made).tool_call.arguments == {"path": "/tmp/y"}


def test_copies_of_a_row_are_new_rows(session: Session) -> None:
    made = saved(session, event())
    twin = made.model_copy(update={"id": None, "request_id": "copy"}, deep=True)
    twin.sanitized_args["nested"]["x"] = 1
    session.commit()
    session.add(twin)
    session.commit()

    assert "x" not in stored(session, made).sanitized_args["nested"]
    assert stored(session, twin).request_id == "copy"
    assert twin.id != made.id


@pytest.mark.parametrize("loaded", [False, True])
def test_none_in_a_json_column_is_sql_null(session: Session, loaded: bool) -> None:
    """None is NULL, when inserted and when assigned; a null inside JSON stays one."""
    made = saved(session, request(output_payload={"a": None} if loaded else None))
    if loaded:
        assert json.loads(raw(session, "approval_requests.output_payload")) == {"a": None}
        made.output_payload = None
        session.commit()

    assert raw(session, "approval_requests.output_payload") is None
    assert stored(session, made).output_payload is None


def test_the_token_column_holds_a_digest(session: Session) -> None:
    """The token itself is nowhere in the row; comparisons hash what they are given; reading gives None."""
    made = saved(session, request(token="the-secret-token"))
    by_token = select(ApprovalRequest).where(ApprovalRequest.token == "the-secret-token")  # type: ignore[arg-type]
    session.expunge_all()
    found = session.scalars(by_token).one()
    digest = hashlib.sha256(b"the-secret-token").hexdigest()

    assert raw(session, "approval_requests.token") == digest
    assert found.id == made.id
    assert found.token is None
    assert session.scalars(select(ApprovalRequest).where(ApprovalRequest.token == digest)).all() == []  # type: ignore[arg-type]


def test_changing_a_loaded_request_keeps_its_token(session: Session) -> None:
    saved(session, request(token="t"))
    digest = raw(session, "approval_requests.token")
    session.expunge_all()
    loaded = session.scalars(select(ApprovalRequest)).one()
    loaded.approver_note = "looked at"
    session.commit()
    session.merge(loaded.model_copy(update={"approver_note": "merged"}))
    session.commit()

    assert raw(session, "approval_requests.token") == digest
    assert raw(session, "approval_requests.approver_note") == "merged"


def test_from_row_is_detached_and_merges(session: Session) -> None:
    """What our queries return is a whole, detached object, which a session takes back."""
    made = saved(session, event(redaction_flags=[RedactionFlag(field="a", reason="PII")]))
    row = session.execute(select(AuditEvent.__table__)).mappings().one()
    session.expunge_all()
    found = AuditEvent.from_row(row)
    found.tool_name = "changed"
    merged = session.merge(found)
    session.commit()

    assert inspect(found).detached
    assert AuditEvent.model_validate(found) == found
    assert found.model_fields_set == set(AuditEvent.model_fields)
    assert merged is not found
    assert merged.id == made.id
    assert stored(session, made).tool_name == "changed"
    assert stored(session, made).model_dump(exclude_unset=True) == merged.model_dump()


def test_enums_are_text_and_levels_are_numbers(session: Session) -> None:
    """A StrEnum is stored by value; a trust level as a number, so that SQL compares it."""
    for level in TrustLevel:
        session.add(make_key(key_id=level.name, caller_id=level.name, trust_level=level))
    session.add(event(decision="SANITIZE_AND_ALLOW"))
    session.commit()
    trusted = session.scalars(select(ApiKey.caller_id).where(ApiKey.trust_level >= TrustLevel.HIGH))  # type: ignore[arg-type]

    assert set(trusted) == {"HIGH", "ADMIN"}
    assert raw(session, "audit_events.decision") == "SANITIZE_AND_ALLOW"
