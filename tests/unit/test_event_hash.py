"""The content hash: the bytes it is taken over are those of the standard library, and never change."""

from __future__ import annotations

import math
from datetime import UTC, datetime
from typing import Any
from uuid import UUID

import pytest
from hypothesis import given, settings

from agent_gateway_store import AuditEvent, RedactionFlag
from agent_gateway_store.audit import record
from agent_gateway_store.audit.document import COLUMNS, hash_of_stored
from agent_gateway_store.audit.record import encode_event, hash_of, to_values, with_derived_id, without_payload
from builders import make_event, rehash
from oddities import odd_event_fields, odd_text

pytestmark = pytest.mark.unit

NOON = datetime(2026, 11, 28, 12, tzinfo=UTC)
# The hashes of an event, of the same under a derived id, and of the same with arguments and texts withheld, as they
# were when the document was written by hand. Stored events keep them for ever.
GOLDEN: dict[str, tuple[dict[str, Any], tuple[str, str, str]]] = {
    "plain": (
        {"request_id": "r-1", "timestamp": NOON.replace(minute=30, second=15, microsecond=250_000)},
        (
            "e69efc0ecd12b6f1be58954c2bc148b765ad9d5345e9840d29412f4e4476cf97",
            "13b1947c834a01b74006f3b1773e860a7d4bf7ae7655296fc166a29a23c00fb8",
            "4221d447bb6983f5d15fb32b824e63efa363e983e26d7548e91fc956a6551b0b",
        ),
    ),
    "every field": (
        {
            "request_id": "r-2",
            "org_id": "acme",
            "trace_id": "t",
            "session_id": "s",
            "parent_request_id": "r-1",
            "timestamp": NOON.replace(hour=0),
            "key_id": "k",
            "policy_version": "7",
            "approver_id": "anna",
            "execution_status": "TOOL_ERROR",
            "output_hash": "cd" * 32,
            "output_decision": "REDACT",
            "output_policy_rationale": 'why "so"\\',
            "llm_explanation": "\u00fcber\n\t\x7f\u2028\U0001f600",
            "risk_labels": ["pii", "\u00e9"],
            "redaction_flags": [
                RedactionFlag(field="a", reason="PII", original_hash="ef" * 32),
                RedactionFlag(field="b", reason="X"),
            ],
            "risk_score": 1e-07,
            "latency_ms": 2**53 + 1,
            "decision": "SANITIZE_AND_ALLOW",
            "sanitized_args": {"z": [1, 2.5, None, True], "a": {"\u20ac": "\x01"}},
        },
        (
            "d0d3991449896b713c012cbecdf75a939848debd8b59c875b04fb609b070db71",
            "2b71e9935ad319be01ab23dcab49c5ef621cd9de1d0066f3e52fd313bde66eab",
            "cf31150e5fa38b02df24ec8b5a0b5e623388005d83878713e6414aba52c9a5ff",
        ),
    ),
    "unstorable": (
        {
            "request_id": "\0" * 600,
            "timestamp": datetime.max,
            "caller_id": "\ud800",
            "risk_score": math.nan,
            "latency_ms": 2**70,
            "risk_labels": ["\0"],
            "sanitized_args": {"n": 2**60, "f": [math.inf, -0.0, 1e23], 1: "k"},
            "output_policy_rationale": "x" * 70_000,
        },
        (
            "d6d92f1170d9bb6fc90b7f731ea2c1debd5ab98be9247b9605115b0988527890",
            "5cd4b419364da4646de7ec8d1cf0d805bd9f1b418df5176e0e38d13e0be73b0a",
            "85442b792fd39a9866a12b908f5320c04647cd109fd7e777dd69a25fee4cfa15",
        ),
    ),
    "what came later": (
        {
            "request_id": "r-3",
            "timestamp": NOON,
            "approval_id": UUID(int=2**100),
            "extra": {"z": [1, {}], "\u20ac": None},
        },
        (
            "03ea1bef4f6c2263575b7313bd54469b97b49bf3bd73551198b8e7a76938e374",
            "a463b3cb79436f442015e457def1e9c440c3aa56d78f330008634fcd308cc4ce",
            "dbb7b674cd6c524df3e7b1ee377496734c23622f9cadcc47b1f296399ea867e1",
        ),
    ),
    "empty": (
        {
            "request_id": "",
            "timestamp": datetime.min,
            "caller_id": "",
            "sanitized_args": {},
            "risk_score": 0,
            "latency_ms": 0,
            "deterministic_rationale": "",
        },
        (
            "a0abf00b59f997d9a68a48aec8d33504a1f7315310726229e526cbb0e60ee308",
            "260fb4fca5a2bbb578cd084e6a6273d740600fee053a755c2b7fd23661e8141d",
            "a0abf00b59f997d9a68a48aec8d33504a1f7315310726229e526cbb0e60ee308",
        ),
    ),
}


@pytest.mark.parametrize(("fields", "hashes"), GOLDEN.values(), ids=GOLDEN)
def test_known_events_keep_their_hashes(fields: dict[str, Any], hashes: tuple[str, str, str]) -> None:
    """What is stored already goes on to verify, and a repeat of it to be known as one."""
    record = encode_event(make_event(**fields))

    assert (hash_of(record), hash_of(with_derived_id(record)), hash_of(without_payload(record))) == hashes


@settings(max_examples=10, deadline=None)
@given(odd_event_fields, odd_text)
def test_any_event_hashes_as_documented(fields: dict[str, Any], request_id: str) -> None:
    """SHA-256 over `json.dumps` of the stored event: sorted keys, compact, text not escaped to ASCII."""
    record = encode_event(make_event(request_id=request_id, **fields))
    kept = [record, with_derived_id(record), without_payload(record)]

    assert [hash_of(each) for each in kept] == [rehash(AuditEvent(**to_values(each))) for each in kept]


@settings(max_examples=10, deadline=None)
@given(odd_event_fields)
def test_a_stored_event_has_the_hash_that_it_was_written_with(fields: dict[str, Any]) -> None:
    """However a driver gives its time; another spelling, or one of another zone, is no such time."""
    row = encode_event(make_event(**fields))
    place = COLUMNS.index("timestamp")
    naive = row[place].replace(tzinfo=None)
    text = naive.isoformat(" ", "microseconds")

    for stamp in (row[place], naive, text):
        assert hash_of_stored((*row[:place], stamp, *row[place + 1 :])) == row[-1]
    for stamp in (f"{text}+02:00", text.replace(" ", "T"), f"{text}0"):
        with pytest.raises(ValueError, match="not as it was written"):
            hash_of_stored((*row[:place], stamp, *row[place + 1 :]))


@pytest.mark.parametrize(
    ("column", "altered"),
    [
        ("sanitized_args", '{"amount": 7, "amount": 1}'),
        ("sanitized_args", '{"amount":7,"amount":1}'),
        # An escape has the colon that the second name would have.
        ("sanitized_args", r'{"amount":1,"at":"C","at":"C\u003a"}'),
        ("sanitized_args", r'{"at":"\u0043:"}'),
        ("sanitized_args", r'{"at":"C:\/"}'),
        ("sanitized_args", '{"amount" : 1}'),
        ("sanitized_args", ' {"amount":1}'),
        ("sanitized_args", '{"amount":1} '),
        ("sanitized_args", '{"amount":-0}'),
        ("extra", '{"n":9007199254740992.00}'),
        ("extra", '{"n":9.007199254740992e15}'),
        ("extra", '{"n": 9007199254740993.0}'),
        ("risk_labels", r'["\u0041"]'),
        ("redaction_flags", "[ ]"),
        ("redaction_flags", "{}"),
        ("redaction_flags", '""'),
        ("approval_id", "0000000000000000000000000000000A"),
        ("approval_id", "00000000-0000-0000-0000-00000000000A"),
        ("approval_id", "00000000-0000-0000-0000-00000000000aff"),
    ],
)
def test_what_says_the_same_in_other_words_is_no_stored_event(column: str, altered: str) -> None:
    """Else a row could be changed for whoever reads it by SQL, and keep its hash."""
    fields: dict[str, Any] = {"sanitized_args": {"amount": 1}, "extra": {"n": 9007199254740992.0}}
    row = encode_event(make_event(approval_id=UUID(int=10), **fields))
    place = COLUMNS.index(column)
    assert hash_of_stored(row) == row[-1]

    with pytest.raises((TypeError, ValueError, StopIteration)):
        hash_of_stored((*row[:place], altered, *row[place + 1 :]))


# Each is one step from an event in which nothing needs to be replaced.
NEARLY_PLAIN: list[dict[str, Any]] = [
    *({name: text} for name in ("caller_id", "output_hash") for text in ('"', "\\", "\n", "\x7f", "\u00e9", "x" * 600)),
    *({name: value} for name in ("sanitized_args", "extra") for value in ({}, {"a": '"'}, {"a": [float("nan")]})),
    *({"risk_labels": labels} for labels in ([], ['"', "b"], ["\u00e9"])),
    *({"risk_score": score} for score in (0.0, -1.0, 1e300, 1e-7)),
    {"redaction_flags": [RedactionFlag(field="a", reason="PII")]},
    {"latency_ms": 2**63},
    {"timestamp": datetime.max},
    {"approval_id": UUID(int=7), "execution_status": None, "org_id": ""},
]


@pytest.mark.parametrize("fields", NEARLY_PLAIN, ids=repr)
def test_the_quick_way_gives_the_same_rows(monkeypatch: pytest.MonkeyPatch, fields: dict[str, Any]) -> None:
    event, plain = make_event(**fields), make_event()
    quick = [encode_event(each, org_id=org_id) for each in (event, plain) for org_id in (None, "acme")]
    assert record._plain_row(record._values_of(plain), None) == quick[2]
    monkeypatch.setattr(record, "_plain_row", lambda *_: None)

    assert [encode_event(each, org_id=org_id) for each in (event, plain) for org_id in (None, "acme")] == quick
