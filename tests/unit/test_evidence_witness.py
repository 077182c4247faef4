"""A witness written from the text of C2SP tlog-witness: it signs what goes on, and catches a fork."""

from __future__ import annotations

import base64
from dataclasses import dataclass, field
from itertools import pairwise

import pytest
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from agent_gateway_store.evidence.notes import SigningKey, parse_note
from consistency import verify_consistency
from sealed_log import KEY, ORIGIN, SealedLog, events

pytestmark = pytest.mark.unit


@dataclass
class Witness:
    """The call `add-checkpoint` of C2SP tlog-witness. Reads the text by itself; returns an HTTP status and a body.

    Attributes:
        trusted: Origin to the raw public key and the name of its log.
        seen: Origin to size and root of the latest checkpoint that was cosigned.
    """

    trusted: dict[str, tuple[str, bytes]]
    seen: dict[str, tuple[int, bytes]] = field(default_factory=dict)

    def add_checkpoint(self, body: str) -> tuple[int, str]:
        head, _, checkpoint = body.partition("\n\n")
        old_line, *proof_lines = head.split("\n")
        old_size, proof = int(old_line.removeprefix("old ")), [base64.b64decode(line) for line in proof_lines]
        text, blank_line, signatures = checkpoint.rpartition("\n\n")
        if not blank_line:
            return 400, ""
        origin, size_line, root_line = text.split("\n")[:3]
        size, root = int(size_line), base64.b64decode(root_line)
        if origin not in self.trusted:
            return 404, ""
        if not self._is_signed(f"{text}\n", signatures, *self.trusted[origin]):
            return 403, ""
        if old_size > size:
            return 400, ""
        known_size, known_root = self.seen.get(origin, (0, b""))
        if known_size != old_size:
            return 409, f"{known_size}\n"
        if known_size == size and known_root != root:
            return 409, f"{known_size}\n"
        if not verify_consistency(old_size, known_root, size, root, proof):
            return 422, ""
        self.seen[origin] = size, root
        return 200, "— witness.example cosigned\n"

    def _is_signed(self, text: str, signatures: str, name: str, public: bytes) -> bool:
        for line in signatures.splitlines():
            dash, signer, data = line.split(" ")
            if dash == "—" and signer == name:
                try:
                    Ed25519PublicKey.from_public_bytes(public).verify(base64.b64decode(data)[4:], text.encode())
                except InvalidSignature:
                    return False
                return True
        return False


def witness() -> Witness:
    return Witness({ORIGIN: (KEY.verifier.name, KEY.verifier.public)})


def submission(log: SealedLog, old: int, new: int) -> str:
    proof = "".join(f"{base64.b64encode(node).decode()}\n" for node in log.consistency(old, new))
    return f"old {old}\n{proof}\n{log.checkpoint(new).note}"


def test_a_log_that_only_grows_is_cosigned_at_every_step() -> None:
    judge, log = witness(), SealedLog(events(5), leaves=600)
    steps = [0, 1, 5, 5, 256, 300, 512, 605]

    statuses = [judge.add_checkpoint(submission(log, *pair))[0] for pair in pairwise(steps)]
    assert statuses == [200] * 7
    assert judge.seen[ORIGIN] == (605, bytes.fromhex(log.checkpoint().root_hash))


def test_a_restored_copy_that_went_on_under_the_old_identity_is_caught() -> None:
    """A backup of 200 events came up elsewhere; both copies sealed others since, and both can sign."""
    original, copy = SealedLog(leaves=300), SealedLog(leaves=300)
    copy.leaves[200:] = [bytes([at % 256]) * 32 for at in range(200, 400)]
    judge = witness()
    judge.add_checkpoint(submission(original, 0, 300))

    assert judge.add_checkpoint(submission(copy, 300, 400)) == (422, "")
    assert judge.add_checkpoint(submission(copy, 200, 400)) == (409, "300\n")
    assert judge.add_checkpoint(submission(copy, 300, 300)) == (409, "300\n")
    assert judge.seen[ORIGIN][1].hex() == original.checkpoint().root_hash


def test_a_log_that_was_cut_is_caught() -> None:
    log, judge = SealedLog(leaves=300), witness()
    judge.add_checkpoint(submission(log, 0, 300))

    assert judge.add_checkpoint(f"old 300\n\n{log.checkpoint(299).note}")[0] == 400


def test_a_log_of_which_one_event_was_altered_and_sealed_anew_is_caught() -> None:
    log, judge = SealedLog(leaves=300), witness()
    judge.add_checkpoint(submission(log, 0, 300))
    log.leaves[17] = bytes(32)
    log.leaves.append(bytes(32))

    assert judge.add_checkpoint(submission(log, 300, 301))[0] == 422


@pytest.mark.parametrize(
    ("key", "status"),
    [(None, 400), (SigningKey("log.example", bytes([1]) * 32), 403)],
    ids=["unsigned", "another-key"],
)
def test_what_the_logs_key_did_not_sign_is_not_cosigned(key: SigningKey | None, status: int) -> None:
    assert witness().add_checkpoint(submission(SealedLog(leaves=3, key=key), 0, 3))[0] == status


def test_a_cosigned_checkpoint_is_still_signed_by_the_log() -> None:
    """The line of the witness is added below, under a key that we need not know."""
    line = f"— witness.example {base64.b64encode(bytes(76)).decode()}\n"

    assert parse_note(SealedLog(leaves=3).checkpoint().note + line).signed_by([KEY.verifier])
