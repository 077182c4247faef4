"""`gateway-store evidence check` and `keygen`, which need no database."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from agent_gateway_store.evidence import Evidence
from agent_gateway_store.evidence.notes import SigningKey, VerifierKey
from commands import gateway_store
from sealed_log import KEY, ORIGIN, SealedLog, events

pytestmark = pytest.mark.unit

VKEY = str(KEY.verifier)
LOG = SealedLog(events(3))


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "r-1.json"
    path.write_text(LOG.evidence(1).to_json())
    return path


def test_check_says_that_the_evidence_fits_and_who_vouches_for_it(file: Path) -> None:
    alone, vouched = (
        gateway_store("evidence", "check", str(file)),
        gateway_store("evidence", "check", str(file), "--key", VKEY),
    )

    assert (alone.code, vouched.code) == (0, 0)
    assert "Nothing vouches" in alone.out
    assert "vouched for  by nothing outside of the database" in alone.out
    assert "vouched for  up to 3 events" in vouched.out
    assert f"log          {ORIGIN}" in vouched.out
    assert (alone.err, vouched.err) == ("", "")
    found = gateway_store("evidence", "check", str(file), "--key", VKEY, "--json").json
    assert (found["ok"], found["checked"], found["anchored"], found["findings"]) == (True, 1, 3, [])
    file.write_text(LOG.evidence(1).to_tlog_proof())
    assert gateway_store("evidence", "check", str(file), "--key", VKEY).code == 0


@pytest.mark.parametrize(
    ("evidence", "words"),
    [
        (LOG.evidence(1, event=LOG.events[2]), "ALTERED at 1 (r-2)"),
        (LOG.evidence(1, salt=None), "was erased"),
        (Evidence(event=LOG.events[1]), "was not sealed"),
        (SealedLog(events(3), key=None).evidence(1), "BAD_SIGNATURE at 1 (r-1)"),
        (LOG.evidence(1), "FORKED at 1 (r-1)"),
    ],
    ids=["altered", "erased", "unsealed", "unsigned", "of another log"],
)
def test_what_does_not_verify_is_exit_code_3(tmp_path: Path, evidence: Evidence, words: str) -> None:
    """What was found stands on standard output, one sentence on the other."""
    (tmp_path / "e.json").write_text(evidence.to_json())
    origin = "other" if words.startswith("FORKED") else ORIGIN
    ended = gateway_store("evidence", "check", str(tmp_path / "e.json"), "--key", VKEY, "--origin", origin)

    assert ended.code == 3
    assert words in ended.out
    assert ended.err == "The evidence does not verify.\n"


@pytest.mark.parametrize("data", [b"", b"{}", b"\xff\xfe", LOG.checkpoint().note.encode()])
def test_a_file_that_is_no_evidence_is_exit_code_3(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "e.json").write_bytes(data)

    gateway_store("evidence", "check", str(tmp_path / "e.json")).assert_fails(3, "This is not evidence")


def test_a_wrong_key_is_a_usage_error(file: Path) -> None:
    ended = gateway_store("evidence", "check", str(file), "--key", VKEY[:-3])

    assert ended.code == 2
    assert "verifier key" in ended.err


def test_nothing_of_a_file_reaches_the_terminal_as_it_is(tmp_path: Path) -> None:
    """The file is a stranger's."""
    document = json.loads(LOG.evidence(1).to_json())
    document["event"]["request_id"] = "\x1b[2J\u202e"
    (tmp_path / "e.json").write_text(json.dumps(document))
    ended = gateway_store("evidence", "check", str(tmp_path / "e.json"))

    assert ended.code == 3
    assert "\x1b" not in ended.said
    assert "\u202e" not in ended.said


def test_keygen_makes_a_pair() -> None:
    found = gateway_store("evidence", "keygen", "--name", "log.example", "--json").json
    key = SigningKey.parse(found["AUDIT_SIGNING_KEY"])

    assert key.verifier == VerifierKey.parse(found["verifier_key"])
    assert key.verifier.name == "log.example"
    assert gateway_store("evidence", "keygen", "--name", "log.example", "--json").json != found
    [secret, public] = [line.split() for line in gateway_store("evidence", "keygen").out.splitlines()]
    assert SigningKey.parse(secret[1]).verifier == VerifierKey.parse(public[1])
    assert "agent-gateway-store.local" in public[1]
    assert gateway_store("evidence", "keygen", "--name", "a b").code == 2


def test_publishing_an_empty_log_writes_nothing(tmp_path: Path) -> None:
    ended = gateway_store("evidence", "publish", str(tmp_path / "log"), DATABASE_URL=f"sqlite:///{tmp_path}/gateway.db")

    assert ended.code == 0
    assert "Nothing is sealed yet" in ended.said
    assert not (tmp_path / "log").exists()
