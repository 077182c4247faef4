"""The models as ORM rows: what is assigned or changed in place reaches the database, what is refused does not."""

from __future__ import annotations

import copy
import hashlib
import json
import pickle
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from typing import Any
from uuid import uuid4

import pytest
from pydantic import ValidationError
from sqlalchemy import Engine, create_engine, inspect, select, text
from sqlalchemy.orm import Session

from agent_gateway_store.models import (
    ApiKey,
    ApprovalRequest,
    AuditEvent,
    NotificationDelivery,
    RedactionFlag,
    ToolCall,
    TrustLevel,
    metadata,
)
from builders import make_event

pytestmark = pytest.mark.unit


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
    given: dict[str, Any] = {
        "request_id": uuid4().hex,
        "caller_id": "dev-agent",
        "tool_call": ToolCall(server="files", tool="delete", arguments={"path": "/tmp/x", "more": {"a": [1]}}),
        "tool_call_hash": "cd" * 32,
        "risk_explanation": "deletes a file",
        "expires_at": datetime(2030, 1, 1, tzinfo=UTC),
    }
    return ApprovalRequest(**(given | fields))


def stored(session: Session, row: Any) -> Any:
    """The row as a session of its own reads it."""
    with Session(session.get_bind(), expire_on_commit=False) as other:
        return other.get(type(row), row.id)


def raw(session: Session, column: str) -> Any:
    table, _, name = column.partition(".")
    return session.connection().execute(text(f"SELECT {name} FROM {table}")).scalar_one()


def test_constructing_does_not_attach(session: Session) -> None:
    """An object is in no session until it is added."""
    made = event()

    assert inspect(made).transient
    assert list(session) == []


def test_assigned_values_reach_the_database(session: Session) -> None:
    """An accepted value is on the object at once, and in the database after the commit."""
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
    """After a refused assignment the commit writes what was there before, and nothing more."""
    made = event()
    session.add(made)
    session.commit()
    for name, wrong in (("latency_ms", -3), ("decision", "MAYBE"), ("sanitized_args", "x"), ("raw_args_hash", "y")):
        with pytest.raises(ValidationError):
            setattr(made, name, wrong)

    assert not session.dirty
    session.commit()
    assert (made.latency_ms, stored(session, made).latency_ms) == (12, 12)
    assert stored(session, made) == made


def test_assigning_the_same_value_writes_nothing(session: Session) -> None:
    """The ORM's history compares what was accepted, not what was typed."""
    made = event(decision="DENY")
    session.add(made)
    session.commit()
    made.decision = "DENY"  # type: ignore[assignment]
    made.latency_ms = 12.2  # type: ignore[assignment]

    assert not session.is_modified(made)


def test_loaded_rows_know_all_their_fields(session: Session) -> None:
    """`model_fields_set` of a row read is full, so that exclude_unset leaves nothing out."""
    made = event()
    session.add(made)
    session.commit()
    loaded = stored(session, made)

    assert loaded.model_fields_set == set(AuditEvent.model_fields)
    assert loaded.model_dump(exclude_unset=True) == made.model_dump()


def test_rows_are_readable_after_their_session(session: Session) -> None:
    """With expire_on_commit off, as our sessions have it, every attribute outlives the session."""
    made = event(redaction_flags=[RedactionFlag(field="a", reason="PII")])
    session.add(made)
    session.commit()
    session.close()
    loaded = stored(session, made)

    assert inspect(made).detached
    assert inspect(loaded).detached
    assert loaded == made
    assert loaded.redaction_flags == [RedactionFlag(field="a", reason="PII")]
    assert loaded.timestamp.tzinfo is UTC


CHANGES: dict[str, Callable[[dict[str, Any]], object]] = {
    "set": lambda args: args.__setitem__("new", 1),
    "delete": lambda args: args.__delitem__("path"),
    "update": lambda args: args.update(new=1),
    "pop": lambda args: args.pop("path"),
    "popitem": lambda args: args.popitem(),
    "clear": lambda args: args.clear(),
    "or": lambda args: args.__ior__({"new": 1}),
    "setdefault": lambda args: args.setdefault("new", 1),
    "setdefault-then-append": lambda args: args.setdefault("new", []).append(1),
    "nested": lambda args: args["nested"].__setitem__("new", 1),
    "deeper": lambda args: args["nested"]["deep"].__setitem__("new", 1),
    "set-then-inside": lambda args: (args.update(new={"a": {}}), args["new"]["a"].update(b=1)),
    "append": lambda args: args["list"].append(3),
    "extend": lambda args: args["list"].extend([3, 4]),
    "insert": lambda args: args["list"].insert(0, 3),
    "iadd": lambda args: args["list"].__iadd__([3]),
    "imul": lambda args: args["list"].__imul__(2),
    "list-set": lambda args: args["list"].__setitem__(1, 3),
    "list-delete": lambda args: args["list"].__delitem__(0),
    "list-pop": lambda args: args["list"].pop(),
    "list-remove": lambda args: args["list"].remove(2),
    "list-clear": lambda args: args["list"].clear(),
    "list-reverse": lambda args: args["list"].reverse(),
    "list-sort": lambda args: args["list"].sort(key=str),
    "in-list": lambda args: args["list"][0].update(n=2),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
@pytest.mark.parametrize("origin", ["inserted", "loaded", "reattached"])
def test_in_place_changes_reach_the_database(
    session: Session, change: Callable[[dict[str, Any]], object], origin: str
) -> None:
    """Whatever is changed inside a JSON value of a row is written at the next commit."""
    made = event()
    session.add(made)
    session.commit()
    if origin == "loaded":
        session.expunge_all()
        made = session.scalars(select(AuditEvent)).one()
    elif origin == "reattached":
        session.expunge_all()
        made = AuditEvent.from_row(session.execute(select(AuditEvent.__table__)).mappings().one())
        session.add(made)
    expected = copy.deepcopy(made.sanitized_args)
    change(expected)
    change(made.sanitized_args)
    session.commit()

    assert made.sanitized_args == expected
    assert stored(session, made).sanitized_args == expected


def test_references_go_on_working_after_commits(session: Session) -> None:
    """A dict or list taken from a row before a commit still writes to it after the commit, and after the next."""
    made = event()
    session.add(made)
    session.commit()
    top, inner = made.sanitized_args, made.sanitized_args["nested"]["deep"]
    for count in range(3):
        top[f"top-{count}"] = count
        inner[f"inner-{count}"] = count
        session.commit()

    assert stored(session, made).sanitized_args == made.sanitized_args
    assert {"top-0", "top-1", "top-2"} <= made.sanitized_args.keys()
    assert made.sanitized_args["nested"]["deep"] == {"inner-0": 0, "inner-1": 1, "inner-2": 2}


def test_arguments_of_a_tool_call_are_watched(session: Session) -> None:
    """The frozen ToolCall cannot be assigned to, but its arguments can be changed, at any depth."""
    made = request()
    session.add(made)
    session.commit()
    made.tool_call.arguments["more"]["a"].append(2)
    session.commit()
    made.tool_call.arguments["new"] = {}
    session.commit()

    assert stored(session, made).tool_call.arguments == {"path": "/tmp/x", "more": {"a": [1, 2]}, "new": {}}


def test_rows_that_are_given_one_value_do_not_share_it(session: Session) -> None:
    """The caller's ToolCall stays as it was, and a change in one of its rows is not one in the other."""
    call = ToolCall(server="files", tool="delete", arguments={"a": {}})
    first, second = request(tool_call=call), request(tool_call=call)
    session.add_all([first, second])
    session.commit()
    first.tool_call.arguments["a"]["b"] = 1
    session.commit()

    assert type(call.arguments) is dict
    assert call.arguments == {"a": {}}
    assert stored(session, first).tool_call.arguments == {"a": {"b": 1}}
    assert stored(session, second).tool_call.arguments == {"a": {}}


def test_a_value_moved_to_another_row_belongs_to_it(session: Session) -> None:
    """Part of one row's JSON put into another's is a copy there: each change is written to its own row."""
    first, second = event(), event()
    session.add_all([first, second])
    session.commit()
    second.sanitized_args["moved"] = first.sanitized_args["nested"]
    session.commit()
    second.sanitized_args["moved"]["mine"] = 1
    first.sanitized_args["nested"]["yours"] = 2
    session.commit()

    assert stored(session, second).sanitized_args["moved"] == {"deep": {}, "mine": 1}
    assert stored(session, first).sanitized_args["nested"] == {"deep": {}, "yours": 2}


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda value: pickle.loads(pickle.dumps(value))])
def test_copies_of_watched_values_are_plain(session: Session, copied: Any) -> None:
    """Copied out of a row, JSON is ordinary again and its changes are nobody's business."""
    made = event()
    session.add(made)
    session.commit()
    twin = copied(made.sanitized_args)
    twin["nested"]["deep"]["x"] = 1

    assert (type(twin), type(twin["nested"]), type(twin["list"])) == (dict, dict, list)
    assert not session.dirty
    assert json.loads(json.dumps(made.sanitized_args)) == made.sanitized_args


def test_copies_of_a_row_are_new_rows(session: Session) -> None:
    """`model_copy` of a persistent row is transient: changing it changes nothing stored."""
    made = event()
    session.add(made)
    session.commit()
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
    made = request(output_payload={"a": None} if loaded else None)
    session.add(made)
    session.commit()
    if loaded:
        assert json.loads(raw(session, "approval_requests.output_payload")) == {"a": None}
        made.output_payload = None
        session.commit()

    assert raw(session, "approval_requests.output_payload") is None
    assert stored(session, made).output_payload is None


def test_the_token_column_holds_a_digest(session: Session) -> None:
    """The token itself is nowhere in the row; comparisons hash what they are given; reading gives None."""
    made = request(token="the-secret-token")
    session.add(made)
    session.commit()
    by_token = select(ApprovalRequest).where(ApprovalRequest.token == "the-secret-token")  # type: ignore[arg-type]
    session.expunge_all()
    found = session.scalars(by_token).one()
    digest = hashlib.sha256(b"the-secret-token").hexdigest()

    assert raw(session, "approval_requests.token") == digest
    assert found.id == made.id
    assert found.token is None
    assert session.scalars(select(ApprovalRequest).where(ApprovalRequest.token == digest)).all() == []  # type: ignore[arg-type]


def test_changing_a_loaded_request_keeps_its_token(session: Session) -> None:
    """The None that reading gives is not written back, nor by a merge."""
    made = request(token="t")
    session.add(made)
    session.commit()
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
    made = event(redaction_flags=[RedactionFlag(field="a", reason="PII")])
    session.add(made)
    session.commit()
    row = session.execute(select(AuditEvent.__table__)).mappings().one()
    session.expunge_all()
    found = AuditEvent.from_row(row)
    found.tool_name = "changed"
    merged = session.merge(found)
    session.commit()

    assert inspect(found).detached
    assert found.model_fields_set == set(AuditEvent.model_fields)
    assert merged is not found
    assert merged.id == made.id
    assert stored(session, made).tool_name == "changed"


def test_enums_are_text_and_levels_are_numbers(session: Session) -> None:
    """A StrEnum is stored by value; a trust level as a number, so that SQL compares it."""
    for level in TrustLevel:
        session.add(
            ApiKey(
                key_id=level.name,
                caller_id=level.name,
                key_hash="x",
                role="r",
                trust_level=level,
                environment="dev",
            )
        )
    session.add(event(decision="SANITIZE_AND_ALLOW"))
    session.commit()
    trusted = session.scalars(select(ApiKey.caller_id).where(ApiKey.trust_level >= TrustLevel.HIGH))  # type: ignore[arg-type]

    assert set(trusted) == {"HIGH", "ADMIN"}
    assert raw(session, "audit_events.decision") == "SANITIZE_AND_ALLOW"


def test_a_constructed_row_can_be_added(session: Session) -> None:
    """`model_construct` skips the validation, not the ORM."""
    made = NotificationDelivery.model_construct(
        approval_id=uuid4(), notifier="log", event="pending", payload={"a": {}}, next_attempt_at=datetime.now(UTC)
    )
    session.add(made)
    session.commit()
    made.payload["a"]["b"] = 1
    session.commit()

    assert stored(session, made).payload == {"a": {"b": 1}}


def test_expired_rows_are_read_again(session: Session) -> None:
    """After a rollback a row is read again on use, and its JSON is watched as before."""
    made = event()
    session.add(made)
    session.commit()
    made.tool_name = "never"
    made.sanitized_args["never"] = 1
    session.rollback()
    made.sanitized_args["kept"] = 1
    session.commit()

    assert made.tool_name == stored(session, made).tool_name == "read_file"
    assert "never" not in made.sanitized_args
    assert stored(session, made).sanitized_args["kept"] == 1
