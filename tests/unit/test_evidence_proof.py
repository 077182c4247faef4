"""Evidence of one event: what its check says, and that it never says more than is proved."""

from __future__ import annotations

import base64
import contextlib
import json
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from hashlib import sha256
from typing import Any

import pytest
import rfc8785
from hypothesis import given, settings
from hypothesis import strategies as st

from agent_gateway_store import RedactionFlag
from agent_gateway_store.errors import InvalidEvidenceError
from agent_gateway_store.evidence import Evidence, check
from agent_gateway_store.evidence.notes import SigningKey
from agent_gateway_store.models.approval import ApprovalRequest, ApprovalVote, hash_approval
from agent_gateway_store.models.evidence import FindingKind
from builders import make_event, make_request, rehash
from sealed_log import KEY, ORIGIN, SealedLog, events

pytestmark = pytest.mark.unit

VKEY = str(KEY.verifier)
OTHER_VKEY = str(SigningKey("log.example", bytes([1]) * 32).verifier)
NOON = datetime(2026, 11, 28, 12, tzinfo=UTC)
# Every kind of value that the hashed document can hold.
RICH = make_event(
    request_id="rich",
    trace_id="t",
    parent_request_id="r-0",
    execution_status="TOOL_ERROR",
    risk_labels=["pii", "é"],
    redaction_flags=[RedactionFlag(field="a", reason="PII", original_hash="ef" * 32)],
    risk_score=1e-07,
    latency_ms=2**53 + 1,
    sanitized_args={"z": [1, 2.5, None, True, -0.0], "a": {"€": "\x01"}},
    deterministic_rationale='why "so"\\ \u2028\U0001f600',
    extra={"tokens": 12, "work": {"ticket": "A-1"}},
)
LOG = SealedLog([*events(3), RICH], leaves=9)


def decided(**fields: Any) -> tuple[ApprovalRequest, tuple[ApprovalVote, ...]]:
    request = make_request(
        request_id="r-9",
        tool_call_hash="ab" * 32,
        expires_at=NOON,
        status="USED",
        approver_id="anna",
        decision_at=NOON,
        used_at=NOON,
        **fields,
    )
    vote = {"approval_id": request.approval_id, "decision": "APPROVED", "voted_at": NOON}
    return request, (ApprovalVote(approver_id="anna", note="ok", **vote), ApprovalVote(approver_id="ben", **vote))


APPROVAL, VOTES = decided()
NAMING = make_event(
    request_id="r-9", approval_id=APPROVAL.approval_id, extra={"approval_sha256": hash_approval(APPROVAL, VOTES)}
)
APPROVED_LOG = SealedLog([NAMING], leaves=2)
APPROVED = APPROVED_LOG.evidence(0, approval=APPROVAL, votes=VOTES)
UNSEALED = Evidence(event=LOG.events[0])
ERASED = LOG.evidence(1, salt=None)


def kinds(text: str, **options: Any) -> set[FindingKind]:
    return {finding.kind for finding in check(text, **options).findings}


@pytest.mark.parametrize("evidence", [LOG.evidence(3), APPROVED, UNSEALED, ERASED])
def test_evidence_as_json_of_pydantic_is_the_document(evidence: Evidence) -> None:
    """Its hashes are bytes, which are no text; what others make of the model is what `check` takes."""
    document = json.loads(evidence.to_json())

    assert evidence.model_dump(mode="json") == document
    assert json.loads(evidence.model_dump_json()) == document
    assert check(evidence.model_dump_json(), keys=[VKEY]) == check(evidence.to_json(), keys=[VKEY])
    assert evidence.model_dump()["path"] == evidence.path


@pytest.mark.parametrize("position", range(4))
@pytest.mark.parametrize("form", [Evidence.to_json, Evidence.to_tlog_proof])
def test_evidence_of_a_sealed_event_is_ok(position: int, form: Callable[[Evidence], str]) -> None:
    found = check(form(LOG.evidence(position)), keys=[OTHER_VKEY, VKEY])

    assert found.ok
    assert (found.size, found.anchored, found.unsealed, found.erased) == (13, 13, 0, 0)
    assert found.root_hash == LOG.checkpoint().root_hash
    assert found.checked == (1 if form is Evidence.to_json else 0)


def test_who_vouches_for_it_is_said() -> None:
    """Nobody without a key; whoever has only the other form knows the hash and place of an event, not what happened."""
    found = check(LOG.evidence(0).to_json())
    assert (found.ok, found.anchored, any("Nothing vouches" in remark for remark in found.remarks)) == (True, 0, True)
    [remark] = check(LOG.evidence(3).to_tlog_proof(), keys=[VKEY]).remarks
    assert "shows no event" in remark
    assert rehash(LOG.events[3]) in remark
    unsigned = SealedLog(events(2), key=None).evidence(0).to_json()
    assert check(unsigned).ok
    for text, key in ((LOG.evidence(0).to_json(), OTHER_VKEY), (unsigned, VKEY)):
        found = check(text, keys=[key])
        assert (found.ok, found.anchored, found.checked) == (False, 0, 0)
        assert {finding.kind for finding in found.findings} == {FindingKind.BAD_SIGNATURE}
    for key in ("", "x", VKEY[:-2]):
        with pytest.raises(ValueError, match="key"):
            check(unsigned, keys=[key])


def test_evidence_of_another_log_that_the_same_key_signs_is_a_finding() -> None:
    """As of a staging store that was given the key of production."""
    text = LOG.evidence(0).to_json()
    own, other = (check(text, keys=[VKEY], origin=name) for name in (ORIGIN, "example.org/staging"))

    assert (own.ok, own.origin, other.origin) == (True, ORIGIN, ORIGIN)
    assert [finding.kind for finding in other.findings] == [FindingKind.FORKED]


def test_an_event_that_was_not_sealed_is_never_ok() -> None:
    found = check(UNSEALED.to_json())

    assert not found.ok
    assert (found.unsealed, found.checked, found.size) == (1, 0, 0)
    assert "not sealed" in found.findings[0].text
    with pytest.raises(ValueError, match="not sealed yet"):
        UNSEALED.to_tlog_proof()


def test_an_erased_event_is_never_ok() -> None:
    found = check(ERASED.to_json(), keys=[VKEY])

    assert not found.ok
    assert (found.erased, found.checked, found.anchored) == (1, 0, 13)
    assert "erased" in found.findings[0].text
    with pytest.raises(ValueError, match="was erased"):
        ERASED.to_tlog_proof()


@pytest.mark.parametrize(
    ("text", "is_ok", "remark"),
    [
        (APPROVED.to_json(), True, "are those that the event names"),
        (LOG.evidence(0, approval=APPROVAL, votes=VOTES).to_json(), True, "the event does not hold their hash"),
        (APPROVED.to_json().replace('"note": "ok"', '"note": "no"'), False, "the event holds another hash."),
    ],
    ids=["same hash", "no hash", "another hash"],
)
def test_the_approval_is_proved_where_the_event_holds_its_hash(text: str, is_ok: bool, remark: str) -> None:
    found = check(text, keys=[VKEY])

    assert found.ok is is_ok
    assert [remark in each for each in found.remarks] == [True]


def test_an_approval_is_not_proved_by_an_event_that_is_not() -> None:
    """It holds the hash, and the remark does not say otherwise."""
    unsealed = Evidence(event=APPROVED_LOG.events[0], approval=APPROVAL, votes=VOTES).to_json()
    other = str(SigningKey.generate("other.example").verifier)
    for found in (
        check(unsealed),
        check(APPROVED.to_json(), keys=[other]),
    ):
        assert not found.ok
        assert found.remarks[-1] == (
            "Nothing proves the approval and its votes: the event holds their hash, and is not proved itself."
        )


@pytest.mark.parametrize(
    ("votes", "count"), [(VOTES[:1], 1), (VOTES[:1] * 2, 1), ((), 0)], ids=["one", "one twice", "none"]
)
def test_an_approval_with_too_few_votes_is_reported(votes: tuple[ApprovalVote, ...], count: int) -> None:
    """Whoever can write to the database set its status, and the event holds the hash of what was there then."""
    approval = APPROVAL.model_copy(update={"required_approvals": 2})
    event = make_event(extra={"approval_sha256": hash_approval(approval, votes)})
    found = check(SealedLog([event]).evidence(0, approval=approval, votes=votes).to_json(), keys=[VKEY])

    assert found.ok
    assert f"The approval is USED with fewer votes for it than it needs: {count} of 2." in found.remarks


def test_an_approval_that_the_event_names_and_that_is_left_out_is_reported() -> None:
    """By its id or by its hash."""
    by_id = SealedLog([make_event(approval_id=APPROVAL.approval_id)], leaves=1)
    for log in (APPROVED_LOG, by_id):
        found = check(log.evidence(0).to_json(), keys=[VKEY])

        assert found.ok
        assert any("which is not in this text" in remark for remark in found.remarks)


@pytest.mark.parametrize(
    "edit",
    [
        lambda approval: approval.update(approver_id="eve"),
        lambda approval: approval.update(tool_call={"server": "files", "tool": "read", "arguments": {}}),
        lambda approval: approval.update(approver_note="really"),
        lambda approval: approval.update(required_approvals=1 + approval["required_approvals"]),
        lambda approval: approval["votes"].pop(),
        lambda approval: approval["votes"][0].update(decision="DENIED"),
        lambda approval: approval["votes"][0].update(approver_id="eve"),
        lambda approval: approval["votes"][1].update(note="added later"),
        lambda approval: approval["votes"].append(approval["votes"][0] | {"approver_id": "eve"}),
    ],
)
def test_an_edited_approval_is_a_finding(edit: Callable[[dict[str, Any]], Any]) -> None:
    document = json.loads(APPROVED.to_json())
    edit(document["approval"])

    assert kinds(json.dumps(document), keys=[VKEY]) == {FindingKind.ALTERED}


def test_use_and_outcome_of_an_approval_are_not_part_of_its_hash() -> None:
    """An event is written before the outcome is known; the remark says that they are not proved."""
    before = hash_approval(APPROVAL, VOTES)
    after = APPROVAL.model_copy(update={"status": "APPROVED", "used_at": None, "outcome": "SUCCESS", "version": 9})

    assert hash_approval(after, VOTES[::-1]) == before
    assert any("status, use and outcome are not proved" in each for each in check(APPROVED.to_json()).remarks)


def test_the_hash_of_an_approval_is_anybodys_canonical_json() -> None:
    document = json.loads(APPROVED.to_json())["approval"]
    votes = document.pop("votes")
    for late in ("status", "used_at", "outcome"):
        del document[late]
    plain = rfc8785.dumps({"approval": document, "votes": votes})

    assert sha256(plain).hexdigest() == hash_approval(APPROVAL, VOTES)


def test_the_json_is_checked_by_the_standard_library_alone() -> None:
    """As the reference says: content hash, leaf, and path to the root of the note."""
    document = json.loads(LOG.evidence(3).to_json())
    event = {name: document["event"][name] for name in document["event"] if name not in ("content_hash", "approval_id")}
    text = json.dumps(event, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    node = sha256(b"\0" + bytes.fromhex(document["salt"]) + sha256(text.encode()).digest()).digest()
    origin, size, root = document["checkpoint"].split("\n")[:3]
    position, last = document["position"], int(size) - 1
    for sibling in map(bytes.fromhex, document["path"]):
        if position % 2 or position == last:
            node = sha256(b"\1" + sibling + node).digest()
            while position and not position % 2:
                position, last = position // 2, last // 2
        else:
            node = sha256(b"\1" + node + sibling).digest()
        position, last = position // 2, last // 2

    assert (origin, base64.b64encode(node).decode()) == ("log.example/4f0c", root)


def test_evidence_holds_no_token_and_no_output() -> None:
    request, votes = decided(scope="OUTPUT_RELEASE", output_payload={"secret": "the output"})
    text = LOG.evidence(0, approval=request, votes=votes).to_json()

    assert request.token
    assert request.token not in text
    assert "the output" not in text


def paths(value: Any, at: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Where the leaves of a JSON document are."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    found = False
    for key, each in items:
        found = True
        yield from paths(each, (*at, key))
    if not found:
        yield at


def other(value: Any) -> Any:
    """A different value of the same kind, as far as there is one."""
    match value:
        case bool():
            return not value
        case int() | float():
            return value + 1
        case str() if value:
            return value[:-1] + ("0" if value[-1] != "0" else "1")
        case dict() | list():
            return {"added": 1} if isinstance(value, dict) else ["added"]
    return "x"


PROVED = json.loads(LOG.evidence(3).to_json())


def test_no_altered_and_no_missing_value_is_ok() -> None:
    """Each of the event, the proof and the checkpoint; an empty approval_id is not part of what is hashed."""
    whole = [(name,) for name in PROVED] + [("event", name) for name in PROVED["event"] if name != "approval_id"]
    altered = [at for at in paths(PROVED) if at != ("approval",)]
    for at, is_altered in [*((at, True) for at in altered), *((at, False) for at in whole)]:
        document = json.loads(json.dumps(PROVED))
        place: Any = document
        *parents, name = at
        for parent in parents:
            place = place[parent]
        if is_altered:
            place[name] = other(place[name])
        else:
            del place[name]

        with contextlib.suppress(InvalidEvidenceError):
            assert not check(json.dumps(document), keys=[VKEY]).ok, (at, is_altered)


def test_an_event_of_another_position_is_not_ok() -> None:
    assert kinds(LOG.evidence(0, position=1).to_json(), keys=[VKEY]) == {FindingKind.BAD_TREE}
    assert kinds(LOG.evidence(0, event=LOG.events[1]).to_json(), keys=[VKEY]) == {FindingKind.ALTERED}


def test_a_proof_against_another_log_is_not_ok() -> None:
    other_log = SealedLog([*events(3), RICH], leaves=10)

    text = LOG.evidence(0, checkpoint=other_log.checkpoint()).to_json()

    assert kinds(text, keys=[VKEY]) == {FindingKind.BAD_TREE}


SOURCES = {"json": LOG.evidence(3).to_json(), "approved": APPROVED.to_json(), "proof": LOG.evidence(3).to_tlog_proof()}
NOT_EVIDENCE = {
    "empty": "",
    "null": "null",
    "number": "1",
    "list": "[]",
    "object": "{}",
    "nan": json.dumps(PROVED | {"position": float("nan")}),
    "bool-position": json.dumps(PROVED | {"position": True}),
    "text-position": json.dumps(PROVED | {"position": "3"}),
    "half-a-proof": json.dumps(PROVED | {"position": None}),
    "proof-without-checkpoint": json.dumps(PROVED | {"checkpoint": None}),
    "no-note": json.dumps(PROVED | {"checkpoint": "x"}),
    "event-of-another-kind": json.dumps(PROVED | {"event": []}),
    "event-is-null": json.dumps(PROVED | {"event": None}),
    "more-members": json.dumps(PROVED | {"more": 1}),
    "another-format": json.dumps(PROVED | {"format": "2"}),
    "path-of-numbers": json.dumps(PROVED | {"path": [1]}),
    "path-is-a-number": json.dumps(PROVED | {"path": 1}),
    "salt-is-a-number": json.dumps(PROVED | {"salt": 1}),
    "approval-is-a-list": json.dumps(PROVED | {"approval": []}),
    "approval-without-votes": json.dumps(PROVED | {"approval": {}}),
    "surrogate": json.dumps(PROVED | {"event": PROVED["event"] | {"caller_id": "\ud800"}}),
    "twice": SOURCES["json"].replace('"position": 3', '"position": 3, "position": 3'),
    "deep": "[" * 100_000,
    "deep-arguments": json.dumps(PROVED).replace('"ticket": "A-1"', '"ticket": ' + "[" * 100_000 + "]" * 100_000),
    "endless-number": json.dumps(PROVED).replace('"position": 3', f'"position": {"9" * 10_000}'),
    "infinity": json.dumps(PROVED).replace('"tokens": 12', '"tokens": 1e999'),
    "beyond-any-exponent": json.dumps(PROVED).replace('"tokens": 12', f'"tokens": 1e{"9" * 20}'),
    "only-the-first-line": "c2sp.org/tlog-proof@v1\n",
    "proof-without-extra": "\n".join(line for line in SOURCES["proof"].split("\n") if not line.startswith("extra")),
    "proof-with-a-leading-zero": SOURCES["proof"].replace("index 3", "index 03"),
    "proof-with-another-line-end": SOURCES["proof"].replace("=\n", "=\u2028", 1),
    "proof-without-index": SOURCES["proof"].replace("index 3\n", ""),
    "proof-without-note": SOURCES["proof"].partition("\n\n")[0],
}


@pytest.mark.parametrize("text", [*NOT_EVIDENCE.values(), None, b"{}", 3], ids=[*NOT_EVIDENCE, "none", "bytes", "int"])
def test_text_that_is_no_evidence_is_one_error(text: Any) -> None:
    with pytest.raises(InvalidEvidenceError):
        check(text)


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_no_edited_evidence_is_ok_for_what_it_does_not_show(data: st.DataObject) -> None:
    """Cut out, put in, or replaced anywhere: one error, or not ok, or still the same event, proof and approval."""
    source = data.draw(st.sampled_from(sorted(SOURCES.values())))
    at, count = data.draw(st.integers(0, len(source))), data.draw(st.integers(0, 4))
    pieces = st.sampled_from(['"', "0", "a", "{", "}", "[", ",", "\n", "null", "1", "—", "\\u0000", "e9", "é"])
    edited = source[:at] + data.draw(pieces | st.text(max_size=2)) + source[at + count :]
    try:
        found = check(edited, keys=[VKEY])
    except InvalidEvidenceError:
        return

    if found.ok:
        assert shown(edited) == shown(source)


def shown(text: str) -> Any:
    """What is proved of a text: all of it, but the parts of an approval that still change."""
    if not text.lstrip().startswith("{"):
        return text
    document = json.loads(text)
    for late in ("status", "used_at", "outcome"):
        (document["approval"] or {}).pop(late, None)
    return document


@settings(max_examples=50, deadline=None)
@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
        lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from([*PROVED, "x"]), inner, max_size=9),
        max_leaves=20,
    )
)
def test_any_json_is_judged_or_one_error(value: Any) -> None:
    for document in (value, PROVED | value if isinstance(value, dict) else value):
        with contextlib.suppress(InvalidEvidenceError):
            found = check(json.dumps(document))
            assert not found.ok or document == PROVED
