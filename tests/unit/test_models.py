"""The models as Pydantic models: what they take, what they refuse, and what they never show."""

from __future__ import annotations

import copy
import pickle
import re
from datetime import UTC, datetime, timedelta, timezone, tzinfo
from typing import Any
from uuid import uuid4

import pytest
from pydantic import SecretStr, TypeAdapter, ValidationError
from sqlalchemy import inspect
from sqlmodel import SQLModel

from agent_gateway_store.integrations.fastapi import Approver
from agent_gateway_store.models.approval import ApprovalRequest, ApprovalResult, ApprovalVote
from agent_gateway_store.models.audit import AuditEvent, Decision, ExecutionStatus, OutputDecision, RedactionFlag
from agent_gateway_store.models.delivery import NotificationDelivery
from agent_gateway_store.models.keys import ApiKey, CallerIdentity, IssuedKey, TrustLevel
from agent_gateway_store.models.tables import metadata
from agent_gateway_store.models.values import ApprovalStatus, Notice, ToolCall
from agent_gateway_store.plugins.slack.api import SlackSettings
from builders import event_fields, make_event, make_key, make_request

pytestmark = pytest.mark.unit

SECRET = "hunter2-do-not-repeat"
TABLES = [ApiKey, AuditEvent, ApprovalRequest, ApprovalVote, NotificationDelivery]
VALUES = [ApprovalResult, CallerIdentity, IssuedKey, Notice, RedactionFlag, ToolCall]


@pytest.mark.parametrize(
    ("field", "wrong"),
    [
        ("request_id", None),
        ("request_id", 5),
        ("timestamp", "yesterday"),
        ("raw_args_hash", "xyz"),
        ("raw_args_hash", "a" * 63),
        ("raw_args_hash", "a" * 64 + "\n"),
        ("raw_args_hash", "g" * 64),
        ("sanitized_args", ["a"]),
        ("sanitized_args", None),
        ("extra", None),
        ("approval_id", "x"),
        ("risk_labels", "pii"),
        ("risk_labels", [1]),
        ("risk_score", "high"),
        ("risk_score", 10**400),
        ("decision", "PERHAPS"),
        ("execution_status", "DONE"),
        ("output_decision", None),
        ("latency_ms", -1),
        ("latency_ms", float("nan")),
        ("latency_ms", float("inf")),
        ("latency_ms", "soon"),
        ("redaction_flags", [{"field": "x"}]),
        ("redaction_flags", [{"field": "x", "reason": "PII", "note": "?"}]),
    ],
)
def test_wrong_values_are_refused_when_constructing_and_when_assigning(field: str, wrong: Any) -> None:
    good = make_event()
    before = good.model_dump()

    with pytest.raises(ValidationError):
        make_event(**{field: wrong})
    with pytest.raises(ValidationError):
        setattr(good, field, wrong)
    assert good.model_dump() == before


def test_missing_and_unknown_fields_are_refused() -> None:
    incomplete = {name: value for name, value in event_fields().items() if name != "caller_id"}

    with pytest.raises(ValidationError, match="caller_id"):
        AuditEvent(**incomplete)
    with pytest.raises(ValueError, match="tool_nmae"):
        make_event().tool_nmae = "x"
    for model in (*TABLES, *VALUES):
        with pytest.raises(ValidationError, match="extra_forbidden"):
            model(no_such_field=1)


def test_events_and_requests_have_the_documented_defaults() -> None:
    """What design leaves optional is None, and the rest starts as documented; a note of None is an empty one."""
    made, asked = make_event(), make_request(approver_note=None)
    result = ApprovalResult(approval_id=uuid4(), status=ApprovalStatus.PENDING)

    absent = ("trace_id", "session_id", "parent_request_id", "key_id", "policy_version", "approver_id")
    absent += ("execution_status", "output_hash", "output_policy_rationale", "llm_explanation", "content_hash", "id")
    assert {getattr(made, name) for name in absent} == {None}
    assert (made.org_id, made.risk_labels, made.redaction_flags, made.output_decision) == ("default", [], [], "ALLOW")
    assert (asked.status, asked.scope, asked.required_approvals, asked.version) == ("PENDING", "EXECUTION", 1, 1)
    assert (asked.expires_at, asked.use_before, asked.tool_call_hash, asked.approver_note) == (None, None, None, "")
    assert len(asked.token or "") >= 43
    assert asked.token != make_request().token
    assert make_key().is_active
    assert (result.token, result.scope, result.approver_id, result.note) == (None, "EXECUTION", None, "")
    assert (result.decided_at, result.expires_at, result.used_at, result.outcome) == (None, None, None, None)
    assert ApprovalResult(**result.model_dump() | {"note": None}) == result
    fields = make_key().model_dump(exclude={"key_id"}) | {"key_hash": "$2b$..."}
    assert all(re.fullmatch("[0-9A-Za-z]{12}", ApiKey(**fields).key_id) for _ in range(3))
    assert ApiKey(**fields).key_id != ApiKey(**fields).key_id


@pytest.mark.parametrize(
    "refused",
    [
        lambda: make_event(decision=SECRET),
        lambda: make_event(raw_args_hash=SECRET),
        lambda: make_event(sanitized_args=SECRET),
        lambda: make_event(latency_ms=SECRET),
        lambda: make_event(timestamp=SECRET),
        lambda: make_event(risk_labels=[{"label": SECRET}]),
        lambda: make_event(redaction_flags=[{"field": SECRET}]),
        lambda: setattr(make_event(), "decision", SECRET),
        lambda: make_key(trust_level=SECRET),
        lambda: make_request(tool_call=SECRET),
        lambda: make_request(tool_call={"server": "s", "tool": "t", "arguments": SECRET}),
        lambda: make_request(token=[SECRET]),
        lambda: AuditEvent.model_validate({"request_id": SECRET}),
        lambda: AuditEvent.model_validate_json(f'{{"request_id": "{SECRET}"}}'),
        lambda: AuditEvent.model_validate_json(f'["{SECRET}"]'),
        lambda: TypeAdapter(AuditEvent).validate_python({"decision": SECRET}),
        lambda: ToolCall(server=SECRET, tool=None),  # type: ignore[arg-type]
        lambda: CallerIdentity(caller_id=SECRET),  # type: ignore[call-arg]
    ],
)
def test_errors_never_repeat_the_input(refused: Any) -> None:
    with pytest.raises(ValidationError) as caught:
        refused()

    assert SECRET not in str(caught.value)
    assert SECRET not in repr(caught.value)


@pytest.mark.parametrize(("given", "kept"), [(12, 12), (12.4, 12), (12.6, 13), (-0.4, 0), ("7", 7), (2**70, 2**70)])
def test_latency_is_rounded_to_whole_milliseconds(given: Any, kept: int) -> None:
    made = make_event(latency_ms=given)

    assert made.latency_ms == kept
    assert type(made.latency_ms) is int


class _Undecided(tzinfo):
    def utcoffset(self, when: datetime | None) -> timedelta | None:
        return None


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        (datetime(2024, 5, 1, 12), datetime(2024, 5, 1, 12, tzinfo=UTC)),
        (datetime(2024, 5, 1, 12, tzinfo=UTC), datetime(2024, 5, 1, 12, tzinfo=UTC)),
        (datetime(2024, 5, 1, 12, tzinfo=timezone(timedelta(hours=14))), datetime(2024, 4, 30, 22, tzinfo=UTC)),
        (datetime(2024, 5, 1, 12, tzinfo=_Undecided()), datetime(2024, 5, 1, 12, tzinfo=UTC)),
        ("2024-05-01T12:00:00", datetime(2024, 5, 1, 12, tzinfo=UTC)),
        ("2024-05-01T12:00:00-02:00", datetime(2024, 5, 1, 14, tzinfo=UTC)),
        (datetime.min, datetime.min.replace(tzinfo=UTC)),
        (datetime.max, datetime.max.replace(tzinfo=UTC)),
        (datetime.min.replace(tzinfo=timezone(timedelta(hours=14))), datetime.min.replace(tzinfo=UTC)),
        (datetime.max.replace(tzinfo=timezone(timedelta(hours=-14))), datetime.max.replace(tzinfo=UTC)),
    ],
)
def test_times_are_aware_utc_and_clamped(given: Any, kept: datetime) -> None:
    """Naive is taken as UTC, every zone is turned into UTC, and what UTC cannot hold becomes its end."""
    made = make_event()
    made.timestamp = given

    assert make_event(timestamp=given).timestamp == made.timestamp == kept
    assert make_event(timestamp=given).timestamp.tzinfo is made.timestamp.tzinfo is UTC


def test_enums_come_from_their_text() -> None:
    """When constructing and when assigning; a hash in upper case is the same one."""
    made = make_event(decision="DENY", execution_status="TIMEOUT", output_decision="REDACT")
    made.decision = "SANITIZE_AND_ALLOW"  # type: ignore[assignment]
    made.raw_args_hash = "AB" * 32

    assert made.raw_args_hash == "ab" * 32
    assert made.decision is Decision.SANITIZE_AND_ALLOW
    assert made.execution_status is ExecutionStatus.TIMEOUT
    assert made.output_decision is OutputDecision.REDACT
    assert make_key(trust_level=3).trust_level is TrustLevel.HIGH
    assert make_request(status="DENIED").status is ApprovalStatus.DENIED
    assert [level.name for level in sorted(TrustLevel)] == ["UNTRUSTED", "LOW", "MEDIUM", "HIGH", "ADMIN"]
    assert [status for status in ApprovalStatus if not status.is_final] == ["PENDING", "APPROVED"]


@pytest.mark.parametrize("blank", ["", " \t\u3000", "\u200b\u2060", "\u3164"])
def test_a_nameless_approver_is_refused_wherever_one_is_named(blank: str) -> None:
    """In a vote, as the approver of a request to the router, and in the settings of Slack."""
    with pytest.raises(ValidationError, match="must not be blank"):
        ApprovalVote(approval_id=uuid4(), approver_id=blank, decision="APPROVED")
    with pytest.raises(ValidationError, match="must not be blank"):
        Approver(approver_id=blank, org_id="acme")
    with pytest.raises(ValidationError, match="must not be blank"):
        SlackSettings(approvers={"U1": blank})


def test_reprs_show_no_secret() -> None:
    api_key = make_key(key_hash=SECRET, previous_key_hash=SECRET)
    shown = [
        api_key,
        make_request(token=SECRET),
        ApprovalResult(approval_id=uuid4(), token=SECRET, status=ApprovalStatus.APPROVED),
        IssuedKey(plaintext=SecretStr(SECRET), api_key=api_key),
    ]

    for thing in shown:
        assert SECRET not in f"{thing!r}{thing}{[thing]}"


@pytest.mark.parametrize(
    "copied",
    [
        lambda made: made.model_copy(),
        lambda made: made.model_copy(deep=True),
        copy.copy,
        copy.deepcopy,
        lambda made: pickle.loads(pickle.dumps(made)),
        lambda made: AuditEvent.model_validate(made),
        lambda made: AuditEvent.model_construct(made.model_fields_set, **dict(made)),
    ],
)
def test_copies_share_no_orm_state(copied: Any) -> None:
    """A copy is equal, is a transient of its own, and assigning to it leaves the original alone."""
    made = make_event()
    twin = copied(made)
    before = made.tool_name
    twin.tool_name = "other"

    assert inspect(twin) is not inspect(made)
    assert inspect(twin).obj() is twin
    assert inspect(twin).transient
    assert made.tool_name == before
    changed = twin.model_copy(update={"tool_name": before, "approver_id": "anna"})
    assert changed.model_copy(update={"approver_id": None}) == made
    assert changed.model_fields_set >= made.model_fields_set | {"approver_id"}


def test_validate_takes_mappings_instances_and_objects() -> None:
    made = make_event()
    assert made != make_request()

    class Row:
        def __init__(self) -> None:
            vars(self).update(dict(made))

    assert AuditEvent.model_validate(dict(made)) == made
    assert AuditEvent.model_validate(made, update={"tool_name": "x"}).tool_name == "x"
    assert AuditEvent.model_validate(Row(), from_attributes=True) == made
    assert AuditEvent.model_validate(Row(), update={"tool_name": "x"}).tool_name == "x"
    with pytest.raises(ValidationError):
        AuditEvent.model_validate(made, update={"latency_ms": -1})
    with pytest.raises(ValidationError):
        AuditEvent.model_validate(dict(made) | {"latency_ms": "12"}, strict=True)


def test_json_and_type_adapters_build_whole_instances() -> None:
    made = make_event(redaction_flags=[RedactionFlag(field="a", reason="PII")])
    from_json = AuditEvent.model_validate_json(made.model_dump_json())
    adapted = TypeAdapter(list[AuditEvent]).validate_python([made.model_dump()])[0]
    adapted.tool_name = made.tool_name

    assert from_json == adapted == made
    assert inspect(from_json).transient
    assert inspect(adapted).transient
    with pytest.raises(ValidationError):
        AuditEvent.model_validate_json(made.model_dump_json().replace('"ALLOW"', '"NEVER"'))


@pytest.mark.parametrize("mode", ["validation", "serialization"])
def test_every_model_has_a_json_schema(mode: Any) -> None:
    """FastAPI can document every model, as body and as response, of which some fields are no part."""
    secret = {"key_hash", "previous_key_hash", "token", "output_payload", "acquire_key"}
    for model in (*TABLES, *VALUES):
        schema = model.model_json_schema(mode=mode)
        assert schema["type"] == "object"
        assert set(schema["properties"]) == set(model.model_fields) - (secret if mode == "serialization" else set())


def test_values_are_frozen() -> None:
    """What notifiers and callers are handed cannot be changed."""
    with pytest.raises(ValidationError):
        ToolCall(server="s", tool="t").server = "other"  # type: ignore[misc]


def test_our_tables_are_not_in_the_global_metadata() -> None:
    """And every constraint and index of theirs has a name."""
    tables = metadata.tables.values()
    assert all(each.name for table in tables for each in (*table.constraints, *table.indexes))
    assert set(metadata.tables) == {
        "api_keys",
        "approval_requests",
        "approval_votes",
        "audit_checkpoints",
        "audit_door",
        "audit_events",
        "audit_holds",
        "audit_leaves",
        "audit_prunes",
        "audit_dead_letters",
        "audit_sinks",
        "audit_tiles",
        "database_identity",
        "notification_deliveries",
    }
    assert not set(metadata.tables) & set(SQLModel.metadata.tables)
