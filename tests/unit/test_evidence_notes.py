"""Signed notes: the published examples, keys, and text that is no note."""

from __future__ import annotations

import base64
import contextlib
import sys

import pytest
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from hypothesis import given, settings
from hypothesis import strategies as st

from agent_gateway_store.errors import InvalidEvidenceError, MissingExtraError
from agent_gateway_store.evidence.notes import ParsedNote, SigningKey, VerifierKey, checkpoint_note, parse_note

pytestmark = pytest.mark.unit

# The pair and the signature in the documentation of Go's golang.org/x/mod/sumdb/note.
GO_SKEY = "PRIVATE+KEY+PeterNeumann+c74f20a3+AYEKFALVFGyNhPJEMzD1QIDr+Y7hfZx09iUvxdXHKDFz"
GO_VKEY = "PeterNeumann+c74f20a3+ARpc2QcUPDhMQegwxbzhKqiBfsVkmqq/LDE4izWy10TW"
GO_TEXT = "If you think cryptography is the answer to your problem,\nthen you don't know what your problem is.\n"
GO_LINE = (
    "— PeterNeumann x08go/ZJkuBS9UG/SffcvIAQxVBtiFupLLr8pAcElZInNIuGUgYN1FFYC2pZSNXgKvqfqdngotpRZb6KE6RyyBwJnAM=\n"
)
# The example in C2SP tlog-checkpoint.
C2SP_CHECKPOINT = (
    "example.com/behind-the-sofa\n"
    "20852163\n"
    "CsUYapGGPo4dkMgIAUqom/Xajj7h2fB2MPA3j2jxq2I=\n"
    "\n"
    "— example.com/behind-the-sofa "
    "Az3grlgtzPICa5OS8npVmf1Myq/5IZniMp+ZJurmRDeOoRDe4URYN7u5/Zhcyv2q1gGzGku9nTo+zyWE+xeMcTOAYQ8=\n"
)
ORIGIN = "log.example/4f0c"
ROOT = bytes(range(32))
KEY = SigningKey("log.example", bytes(32))
OTHER = SigningKey("log.example", bytes([1]) * 32)
SIGNED = checkpoint_note(ORIGIN, 7, ROOT, KEY)
BODY = checkpoint_note(ORIGIN, 7, ROOT)


def test_the_published_keys_sign_the_published_text() -> None:
    key = SigningKey.parse(GO_SKEY)

    assert key.to_text() == GO_SKEY
    assert str(key.verifier) == GO_VKEY
    assert key.signature_line(GO_TEXT) == GO_LINE


def test_the_published_checkpoint_is_read() -> None:
    note = parse_note(C2SP_CHECKPOINT)

    assert (note.origin, note.size) == ("example.com/behind-the-sofa", 20852163)
    assert base64.b64encode(note.root) == b"CsUYapGGPo4dkMgIAUqom/Xajj7h2fB2MPA3j2jxq2I="
    assert [each.name for each in note.signatures] == ["example.com/behind-the-sofa"]


def test_a_checkpoint_reads_back_and_is_signed_by_its_key() -> None:
    note = parse_note(SIGNED)

    assert (note.origin, note.size, note.root) == (ORIGIN, 7, ROOT)
    assert note.signed_by([KEY.verifier])
    assert note.signed_by([OTHER.verifier, KEY.verifier])
    assert not note.signed_by([OTHER.verifier])
    assert not note.signed_by([])
    assert SIGNED.startswith(BODY)
    assert not parse_note(BODY).signed_by([KEY.verifier])


def test_bare_cryptography_verifies_a_checkpoint() -> None:
    """By the text of C2SP signed-note alone, without a line of ours."""
    body, _, lines = SIGNED.rpartition("\n\n")
    dash, name, data = lines.strip().split(" ")
    vkey_name, _, public = str(KEY.verifier).split("+", 2)
    signature = base64.b64decode(data)[4:]
    key = Ed25519PublicKey.from_public_bytes(base64.b64decode(public)[1:])

    assert (dash, name) == ("—", vkey_name)
    key.verify(signature, f"{body}\n".encode())
    with pytest.raises(InvalidSignature):
        key.verify(signature, body.encode())


@pytest.mark.parametrize(
    "line",
    [
        OTHER.signature_line(BODY).replace(OTHER.verifier.name, "another.example"),
        "— witness.example " + base64.b64encode(b"any bytes at all").decode() + "\n",
    ],
    ids=["another-key", "unknown"],
)
def test_signatures_of_unknown_keys_are_ignored(line: str) -> None:
    """As the lines of witnesses are, whose keys are other ones."""
    assert parse_note(SIGNED + line).signed_by([KEY.verifier])


def test_a_wrong_signature_under_a_known_key_spoils_the_note() -> None:
    wrong = KEY.signature_line("another body\n")

    assert not parse_note(SIGNED + wrong).signed_by([KEY.verifier])
    assert not parse_note(f"{BODY}\n{wrong}").signed_by([KEY.verifier])


def test_extension_lines_are_part_of_what_is_signed() -> None:
    body = f"{BODY}more\n"
    note = parse_note(f"{body}\n{KEY.signature_line(body)}")

    assert note.signed_by([KEY.verifier])
    assert not parse_note(f"{body}\n{KEY.signature_line(BODY)}").signed_by([KEY.verifier])


def test_sixteen_signatures_are_taken_and_a_thousand_are_not() -> None:
    """C2SP asks for sixteen at least."""
    assert len(parse_note(SIGNED + 15 * OTHER.signature_line(BODY)).signatures) == 16
    with pytest.raises(InvalidEvidenceError):
        parse_note(SIGNED + 999 * OTHER.signature_line(BODY))


NO_NOTES = {
    "empty": "",
    "one-line": "x",
    "two-lines": f"{ORIGIN}\n7\n",
    "no-origin": BODY.removeprefix(ORIGIN),
    "no-line-end": BODY.removesuffix("\n"),
    "leading-zero": BODY.replace("\n7\n", "\n07\n"),
    "sign": BODY.replace("\n7\n", "\n+7\n"),
    "negative": BODY.replace("\n7\n", "\n-7\n"),
    "other-digits": BODY.replace("\n7\n", "\n\u0667\n"),
    "endless-size": BODY.replace("\n7\n", f"\n{'9' * 5000}\n"),
    "beyond-64-bits": BODY.replace("\n7\n", f"\n{2**63}\n"),
    "short-root": BODY.replace("AAECAwQFBgcICQoLDA0ODxAREhMUFRYXGBkaGxwdHh8=", "AAEC"),
    "spelt-otherwise": BODY.replace("Hh8=", "Hh9="),
    "not-base64": BODY.replace("AAEC", "€€€€"),
    "carriage-returns": SIGNED.replace("\n", "\r\n"),
    "nul": SIGNED.replace(ORIGIN, f"{ORIGIN}\0"),
    "surrogate": SIGNED.replace(ORIGIN, f"{ORIGIN}\ud800"),
    "no-signature-after-the-blank-line": f"{BODY}\n",
    "blank-line-too-many": SIGNED.replace("\n\n", "\n\n\n"),
    "two-bodies": f"{BODY}\n{SIGNED}",
    "no-dash": SIGNED.replace("—", "-"),
    "empty-name": SIGNED.replace("— log.example", "— "),
    "plus-in-name": SIGNED.replace("— log.example", "— log+example"),
    "signature-of-nothing": f"{BODY}\n— log.example AAAAAA==\n",
    "signature-not-base64": f"{BODY}\n— log.example ????\n",
    "one-word-more": SIGNED.removesuffix("\n") + " more\n",
    "text-after-it": f"{SIGNED}more\n",
}


@pytest.mark.parametrize("text", NO_NOTES.values(), ids=NO_NOTES)
def test_text_that_is_no_note_is_one_error(text: str) -> None:
    with pytest.raises(InvalidEvidenceError):
        parse_note(text)


@settings(max_examples=200)
@given(st.one_of(st.text(), st.text(alphabet=sorted(set(SIGNED)))))
def test_any_text_is_a_note_or_one_error(text: str) -> None:
    with contextlib.suppress(InvalidEvidenceError):
        assert isinstance(parse_note(text), ParsedNote)


@settings(max_examples=100)
@given(st.integers(0, len(SIGNED)), st.integers(0, 3), st.text(max_size=3))
def test_no_edited_note_is_signed(at: int, count: int, text: str) -> None:
    """Cut out, put in, or replaced, anywhere in it."""
    edited = SIGNED[:at] + text + SIGNED[at + count :]
    try:
        note = parse_note(edited)
    except InvalidEvidenceError:
        return

    assert edited == SIGNED or not note.signed_by([KEY.verifier])


@pytest.mark.parametrize("kind", [SigningKey, VerifierKey])
@pytest.mark.parametrize(
    "text",
    [
        "",
        "log.example",
        "log.example+deadbeef",
        "log.example+deadbeef+AQ==",
        "log example+deadbeef+" + base64.b64encode(b"\1" + ROOT).decode(),
        "log.example+deadbeef+" + base64.b64encode(b"\1" + ROOT).decode(),
        "log.example+deadbeef+" + base64.b64encode(b"\4" + ROOT).decode(),
        "log.example+nothexad+" + base64.b64encode(b"\1" + ROOT).decode(),
        "PRIVATE+KEY+log.example+deadbeef+" + base64.b64encode(b"\1" + ROOT).decode(),
        "\ud800+deadbeef+" + base64.b64encode(b"\1" + ROOT).decode(),
    ],
)
def test_what_is_no_key_is_refused_without_being_repeated(kind: type[SigningKey | VerifierKey], text: str) -> None:
    with pytest.raises(ValueError) as caught:
        kind.parse(text)
    assert base64.b64encode(ROOT).decode()[4:] not in str(caught.value)


def test_names_and_origins_that_no_verifier_takes_are_refused() -> None:
    for name in ("", "a b", "a+b", "a\nb", "\ud800"):
        with pytest.raises(ValueError, match="name of a key"):
            SigningKey.generate(name)
    for origin in ("", "two\nlines", "\ud800"):
        with pytest.raises(ValueError, match="origin"):
            checkpoint_note(origin, 0, ROOT)


def test_generated_keys_differ_and_read_back() -> None:
    first, second = SigningKey.generate("log.example"), SigningKey.generate("log.example")

    assert first.verifier != second.verifier
    assert SigningKey.parse(f" {first.to_text()}\n").verifier == first.verifier
    assert VerifierKey.parse(f"{first.verifier}\n") == first.verifier
    assert first.to_text().split("+", 4)[4] not in repr(first) + str(first)
    for parse, half in ((VerifierKey.parse, first.to_text()), (SigningKey.parse, str(first.verifier))):
        with pytest.raises(ValueError):
            parse(half)


def test_without_cryptography_the_error_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cryptography.hazmat.primitives.asymmetric", None)

    with pytest.raises(MissingExtraError, match=r"agent-gateway-store\[signing\]"):
        parse_note(SIGNED).signed_by([KEY.verifier])
    assert parse_note(SIGNED).size == 7
    assert VerifierKey.parse(GO_VKEY).name == "PeterNeumann"
