"""Checkpoints as text that others can verify: C2SP signed-note and tlog-checkpoint, signed with Ed25519."""

from __future__ import annotations

import base64
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from hashlib import sha256
from types import ModuleType
from typing import Self

from agent_gateway_store.errors import InvalidEvidenceError, needs_extra
from agent_gateway_store.evidence.tree import HASH_BYTES

# C2SP signed-note: the identifier byte of Ed25519 signatures.
_ED25519 = b"\1"
# Of SHA-256, as a short name of a key.
_KEY_ID_BYTES = 4
_SKEY = "PRIVATE+KEY+"
# What a BIGINT holds, and with it the size of any log.
_LARGEST_SIZE = 2**63 - 1
_NUMBER = re.compile(r"0|[1-9][0-9]{0,18}", re.ASCII)
# Chosen: C2SP asks for 16 at least and for some limit.
_MOST_SIGNATURES = 64


def _ed25519() -> ModuleType:
    with needs_extra("To sign checkpoints and to check their signatures", extra="signing"):
        from cryptography.hazmat.primitives.asymmetric import ed25519
    return ed25519


def _is_name(text: str) -> bool:
    return bool(text) and "+" not in text and not any(map(str.isspace, text))


def encode64(data: bytes) -> str:
    """Return `data` in base64."""
    return base64.b64encode(data).decode()


def decode64(text: str) -> bytes:
    """Return what this base64 stands for.

    Raises:
        ValueError: It is not base64, or another spelling than `encode64` gives.
    """
    data = base64.b64decode(text, validate=True)
    if encode64(data) != text:
        raise ValueError("another spelling of the same bytes")
    return data


def _parse_key(text: str, kind: str) -> tuple[str, bytes, bytes]:
    """Return name, key id and the 32 bytes of a key spelt `name+hash+base64`."""
    name, _, rest = text.strip().partition("+")
    key_id, _, data = rest.partition("+")
    try:
        algorithm_and_key = decode64(data)
        found = bytes.fromhex(key_id)
    except ValueError:
        algorithm_and_key = found = b""
    if (
        not _is_name(name)
        or not name.isprintable()
        or len(found) != _KEY_ID_BYTES
        or len(algorithm_and_key) != 1 + HASH_BYTES
    ):
        raise ValueError(f"This is not a {kind}: `gateway-store evidence keygen` makes a pair of keys.")
    if algorithm_and_key[:1] != _ED25519:
        raise ValueError(f"This {kind} is not one of Ed25519: `gateway-store evidence keygen` makes a pair of keys.")
    return name, found, algorithm_and_key[1:]


@dataclass(frozen=True)
class VerifierKey:
    """The public half, by which anyone can tell who signed. Its text (a vkey) is `name+hash+base64`."""

    name: str
    public: bytes

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read a vkey.

        Raises:
            ValueError: It is not the vkey of an Ed25519 key, or it was mistyped.
        """
        name, key_id, public = _parse_key(text, "verifier key")
        key = cls(name, public)
        if key.key_id != key_id:
            raise ValueError("The verifier key does not fit its own hash: copy it again, whole.")
        return key

    @property
    def key_id(self) -> bytes:
        """The four bytes by which a signature names its key."""
        return sha256(self.name.encode() + b"\n" + _ED25519 + self.public).digest()[:_KEY_ID_BYTES]

    def __str__(self) -> str:
        return f"{self.name}+{self.key_id.hex()}+{encode64(_ED25519 + self.public)}"


class SigningKey:
    """The secret half, which signs checkpoints. Its repr shows the name only.

    Raises:
        ValueError: The name is empty, or has a space or a plus in it.
        MissingExtraError: The extra `signing` is not installed.
    """

    def __init__(self, name: str, seed: bytes) -> None:
        if not _is_name(name) or not name.isprintable():
            raise ValueError("The name of a key is visible text without spaces and plus signs, such as a domain.")
        self._seed = seed
        self._private = _ed25519().Ed25519PrivateKey.from_private_bytes(seed)
        self.verifier = VerifierKey(name, self._private.public_key().public_bytes_raw())

    @classmethod
    def generate(cls, name: str) -> Self:
        """Make a new key."""
        return cls(name, _ed25519().Ed25519PrivateKey.generate().private_bytes_raw())

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read the text of `to_text`, the form of Go's `note` package: `PRIVATE+KEY+name+hash+base64`.

        Raises:
            ValueError: It is not the secret half of an Ed25519 key, or it was mistyped.
        """
        before, _, rest = text.strip().partition(_SKEY)
        name, key_id, seed = _parse_key("" if before else rest, "signing key")
        key = cls(name, seed)
        if key.verifier.key_id != key_id:
            raise ValueError("The signing key does not fit its own hash: copy it again, whole.")
        return key

    def to_text(self) -> str:
        """Return the secret, as the setting AUDIT_SIGNING_KEY takes it."""
        key = self.verifier
        return f"{_SKEY}{key.name}+{key.key_id.hex()}+{encode64(_ED25519 + self._seed)}"

    def __repr__(self) -> str:
        return f"SigningKey(name={self.verifier.name!r})"

    def signature_line(self, body: str) -> str:
        """Return the line that signs `body`."""
        return f"— {self.verifier.name} {encode64(self.verifier.key_id + self._private.sign(body.encode()))}\n"


def checkpoint_note(origin: str, size: int, root: bytes, signer: SigningKey | None = None) -> str:
    """Return the checkpoint of a log as text: signed, or without a signer its body alone.

    Raises:
        ValueError: `origin` is not visible text on one line.
    """
    if not origin or not origin.isprintable():
        raise ValueError("The origin of a log is visible text on one line, such as a domain and a path.")
    body = f"{origin}\n{size}\n{encode64(root)}\n"
    return body if signer is None else f"{body}\n{signer.signature_line(body)}"


@dataclass(frozen=True)
class Signature:
    """One line below a note: who says to have signed, and the bytes that must show it."""

    name: str
    key_id: bytes
    data: bytes


@dataclass(frozen=True)
class ParsedNote:
    """A checkpoint as it was read. Nothing in it is true because it stands there: see `signed_by`."""

    origin: str
    size: int
    root: bytes
    signatures: tuple[Signature, ...]
    body: str = field(repr=False)

    def signed_by(self, keys: Iterable[VerifierKey]) -> bool | None:
        """True if one of these keys has signed, and no signature under the name and id of one of them is wrong.

        None: there is no signature under the name and id of one of them.

        Raises:
            MissingExtraError: The extra `signing` is not installed.
        """
        ed25519, known = _ed25519(), {(key.name, key.key_id): key for key in keys}
        ours = [(known[name], each.data) for each in self.signatures if (name := (each.name, each.key_id)) in known]
        return all(_is_signed(ed25519, key, data, self.body.encode()) for key, data in ours) if ours else None


def _is_signed(ed25519: ModuleType, key: VerifierKey, data: bytes, body: bytes) -> bool:
    from cryptography.exceptions import InvalidSignature

    try:
        ed25519.Ed25519PublicKey.from_public_bytes(key.public).verify(data, body)
    except (InvalidSignature, ValueError):
        return False
    return True


def parse_note(text: str) -> ParsedNote:
    """Read a checkpoint, signed or not.

    Raises:
        InvalidEvidenceError: It is not one.
    """
    before, separator, after = text.rpartition("\n\n")
    body, lines = (f"{before}\n", after.removesuffix("\n").split("\n")) if separator else (text, [])
    origin, size, root, *others = body.removesuffix("\n").split("\n") if body.count("\n") > 2 else ("", "", "")
    try:
        # A lone surrogate has no UTF-8, and a signature is over that.
        body.encode()
        hashed = decode64(root)
    except ValueError:
        hashed = b""
    if (
        not text.endswith("\n")
        or any(ord(letter) < ord(" ") and letter != "\n" for letter in text)
        or not all((origin, *others))
        or not _NUMBER.fullmatch(size)
        or int(size) > _LARGEST_SIZE
        or len(hashed) != HASH_BYTES
        or len(lines) > _MOST_SIGNATURES
    ):
        raise InvalidEvidenceError("This is not a checkpoint: its text must be kept as it was written, byte by byte.")
    return ParsedNote(origin, int(size), hashed, tuple(map(_signature, lines)), body)


def _signature(line: str) -> Signature:
    match line.split(" "):
        case ["—", name, encoded] if _is_name(name):
            try:
                data = decode64(encoded)
            except ValueError:
                data = b""
            if len(data) > _KEY_ID_BYTES:
                return Signature(name, data[:_KEY_ID_BYTES], data[_KEY_ID_BYTES:])
    raise InvalidEvidenceError("A signature of this checkpoint is not one: its text must be kept as it was written.")


def split_notes(text: str) -> list[str]:
    """Return the checkpoints of a file that holds several, one behind the other, as the plugin `witness-file` writes.

    Each is still to be read by `parse_note`: what stands between two checkpoints comes with one of them.
    """
    blocks = [block.strip("\n") for block in text.split("\n\n") if block.strip("\n")]
    notes: list[str] = []
    for block in blocks:
        if block.startswith("— ") and notes and "\n\n" not in notes[-1]:
            notes[-1] += f"\n{block}\n"
        else:
            notes.append(f"{block}\n")
    return notes
