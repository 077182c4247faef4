"""Evidence of one event, and its check, which needs neither the store nor this package: the formats are open."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Iterable, Mapping
from decimal import Decimal
from hashlib import sha256
from typing import Any, NamedTuple
from uuid import UUID

from pydantic import model_serializer
from sqlalchemy import BigInteger, Select, Uuid, bindparam, select, true

from agent_gateway_store._text import escape
from agent_gateway_store.approval.filters import criteria
from agent_gateway_store.approval.queries import ApprovalRef, get
from agent_gateway_store.approval.reports import search
from agent_gateway_store.audit.document import encode
from agent_gateway_store.audit.query import AuditQuery
from agent_gateway_store.encoding.canonical import members_once
from agent_gateway_store.errors import (
    ApprovalNotFoundError,
    AuditEventNotFoundError,
    InvalidEvidenceError,
    LogMismatchError,
    UnreadableRowError,
)
from agent_gateway_store.evidence.notes import ParsedNote, VerifierKey, decode64, encode64, parse_note
from agent_gateway_store.evidence.sealer import readable_log
from agent_gateway_store.evidence.tree import (
    EMPTY_ROOT,
    HASH_BYTES,
    ReadTiles,
    inclusion_path,
    tiles_for_inclusion,
    verify_inclusion,
)
from agent_gateway_store.models.approval import (
    APPROVAL_HASH,
    ApprovalRequest,
    ApprovalVote,
    VoteDecision,
    hash_approval,
    is_blank_approval,
    is_of_call,
)
from agent_gateway_store.models.audit import AuditEvent
from agent_gateway_store.models.evidence import (
    AuditCheckpoint,
    AuditLeaf,
    Checkpoint,
    Finding,
    FindingKind,
    Verification,
    leaf_hash,
)
from agent_gateway_store.models.values import ApprovalStatus, FrozenModel
from agent_gateway_store.storage.database import Database
from agent_gateway_store.storage.statements import Statement, literal_number

_leaves = AuditLeaf.__table__
_checkpoints = AuditCheckpoint.__table__
_votes = ApprovalVote.__table__


def _place() -> Select[Any]:
    """Select in one row the leaf of an event and the last checkpoint."""
    event, one = bindparam("p_event", type_=BigInteger()), literal_number(1)
    newest = select(_checkpoints).order_by(_checkpoints.c.size.desc()).limit(one).subquery()
    once = select(event.label("event")).subquery()
    joined = once.outerjoin(_leaves, _leaves.c.event_id == once.c.event).outerjoin(newest, true())
    leaf = (_leaves.c.position, _leaves.c.salt, _leaves.c.leaf_hash)
    return select(*leaf, *newest.c).select_from(joined)


_PLACE = Statement(_place())
_VOTES = Statement(
    select(_votes).where(_votes.c.approval_id == bindparam("p_approval", type_=Uuid())).order_by(_votes.c.voted_at)
)

# Chosen: of a call that was asked for more often than this under one request id, the latest.
_ASKED = 20
_logger = logging.getLogger("agent_gateway_store.evidence")
_FORMAT = "agent-gateway-store evidence 1"
# C2SP tlog-proof.
_TLOG_PROOF = "c2sp.org/tlog-proof@v1\n"
_PROOF = re.compile(
    f"{re.escape(_TLOG_PROOF)}"
    r"extra (?P<entry>[^\n]+)\nindex (?P<index>0|[1-9][0-9]{0,18})\n(?P<path>(?:[^\n]+\n)*)\n(?P<note>.+)",
    re.DOTALL,
)
_UNPROVED = "Nothing proves the approval and its votes: "
_NO_HASH = "the event does not hold their hash. They are what the database said."
_OTHER_HASH = "the event holds another hash."
_HASH_OF_UNPROVED = "the event holds their hash, and is not proved itself."
_PROVED = "The approval and its votes are those that the event names. Its status, use and outcome are not proved."
_NO_KEY = "Nothing vouches for the checkpoint: no key was given, and the maker of this text can have made it up."
# What reading hostile JSON into our models may raise.
_UNREADABLE = (ValueError, TypeError, KeyError, AttributeError, RecursionError, ArithmeticError)


class Evidence(FrozenModel):
    """What is kept, or handed on, to show later what happened in one call.

    As JSON it is the whole document of `to_json`, whatever `include` and `exclude` say.

    Attributes:
        event: As it is stored.
        approval: The approval that the event names. Where it names none: one that was asked for under its request id
            by the same caller, for the same server and tool, and, where that can be compared, the same arguments. None
            without, and where it was erased.
        votes: Who voted on it, and how.
        position: The event's in the log; None: it was not sealed yet, and nothing proves it.
        salt: What the leaf was hashed with; None: not sealed yet, or erased.
        leaf_hash: The leaf at that position.
        path: The inclusion proof, from the leaf's sibling to the root.
        checkpoint: Of the log that the proof leads to.
    """

    event: AuditEvent
    approval: ApprovalRequest | None = None
    votes: tuple[ApprovalVote, ...] = ()
    position: int | None = None
    salt: bytes | None = None
    leaf_hash: bytes | None = None
    path: tuple[bytes, ...] = ()
    checkpoint: Checkpoint | None = None

    def to_json(self) -> str:
        """Return everything as JSON, which `check` takes. Holds no approval token, and no output that waits."""
        return json.dumps(self._document(), indent=2, ensure_ascii=False) + "\n"

    @model_serializer(when_used="json")
    def _document(self) -> dict[str, Any]:
        return {
            "format": _FORMAT,
            "event": self.event.model_dump(mode="json", exclude={"id"}),
            "approval": self.approval and _approval_json(self.approval, self.votes),
            "position": self.position,
            "salt": _hex(self.salt),
            "leaf_hash": _hex(self.leaf_hash),
            "path": [node.hex() for node in self.path],
            "checkpoint": self.checkpoint and self.checkpoint.note,
        }

    def to_tlog_proof(self) -> str:
        """Return the proof alone as C2SP tlog-proof, for the tools of others.

        Its extra data is what the leaf is hashed from: the salt, then `content_hash` as 32 bytes.

        Raises:
            ValueError: The event was not sealed yet, or was erased.
        """
        if self.checkpoint is None:
            raise ValueError("The event is not sealed yet, so there is no proof: run `gateway-store evidence seal`.")
        if self.salt is None:
            raise ValueError("The event was erased, and with it what its leaf was hashed from.")
        entry = encode64(self.salt + bytes.fromhex(self.event.content_hash or ""))
        path = "".join(f"{encode64(node)}\n" for node in self.path)
        return f"{_TLOG_PROOF}extra {entry}\nindex {self.position}\n{path}\n{self.checkpoint.note}"


async def prove(
    database: Database, read: ReadTiles, request_id: str, *, org_id: str | None, hash_key: str | None = None
) -> Evidence:
    """Collect the evidence of the newest event with this request id; errors as of `EvidenceManager.prove`."""
    event = await AuditQuery(database, org_id=org_id).get_by_request_id(request_id)
    if event is None:
        raise AuditEventNotFoundError(request_id)
    async with database.connection("read") as connection:
        with readable_log():
            found = await _PLACE.one(connection, {"p_event": event.id})
            position, size = found["position"], found["size"]
    approval, votes = await _approval_of(database, event, hash_key)
    if position is None or size is None or size <= position:
        return Evidence(event=event, approval=approval, votes=votes)
    try:
        with readable_log():
            path = inclusion_path(await read(tiles_for_inclusion(position, size)), position, size)
            return Evidence(
                event=event,
                approval=approval,
                votes=votes,
                position=position,
                salt=found["salt"],
                leaf_hash=found["leaf_hash"],
                path=tuple(path),
                checkpoint=Checkpoint(**{name: found[name] for name in Checkpoint.model_fields}),
            )
    except LookupError as exc:
        raise LogMismatchError("A hash of the log is missing: run `gateway-store evidence verify`.") from exc


async def _approval_of(
    database: Database, event: AuditEvent, hash_key: str | None
) -> tuple[ApprovalRequest | None, tuple[ApprovalVote, ...]]:
    if (approval_id := event.approval_id or await _asked_for(database, event, hash_key)) is None:
        return None, ()
    try:
        approval = (await get(database, ApprovalRef.by_id(approval_id, event.org_id))).request
        if is_blank_approval(approval.tool_call_hash, approval.risk_explanation):
            # It is not the one that the event names any more, and nobody has forged it.
            return None, ()
        async with database.connection("read") as connection:
            rows = await _VOTES.rows(connection, {"p_approval": approval.approval_id})
        return approval, tuple(map(ApprovalVote.from_row, rows))
    except UnreadableRowError as exc:
        _logger.warning("The evidence of %s is without its approval: %s", event.request_id, exc)
    except ApprovalNotFoundError:
        pass
    return None, ()


async def _asked_for(database: Database, event: AuditEvent, hash_key: str | None) -> UUID | None:
    """Return the newest approval under the request id of an event that is proved to be of its call, else may be."""
    filters = {
        "request_id": event.request_id,
        "caller_id": event.caller_id,
        "mcp_server": event.mcp_server,
        "tool_name": event.tool_name,
    }
    asked = await search(database, criteria(filters, org_id=event.org_id), limit=_ASKED, cursor=None)
    fits = {each.approval_id: is_of_call(each, event, key=hash_key) for each in asked}
    return next((each for wanted in (True, None) for each, fit in fits.items() if fit is wanted), None)


def _approval_json(request: ApprovalRequest, votes: Iterable[ApprovalVote]) -> dict[str, Any]:
    ballots = [vote.model_dump(mode="json", exclude={"id", "approval_id", "org_id"}) for vote in votes]
    return request.model_dump(mode="json", exclude={"id", "version"}) | {"votes": ballots}


def check(text: str, *, keys: Iterable[str] = (), origin: str | None = None) -> Verification:
    """Check evidence of either form, JSON or C2SP tlog-proof. Needs no store.

    `ok` means that the text fits together: the event gives the leaf, and the leaf is in the tree of the checkpoint. An
    event that was not sealed yet, or that was erased, is never ok. Without `keys` nobody vouches for the checkpoint,
    and the remarks say so. They say as well whether the approval is proved.

    Args:
        text: As `to_json` or `to_tlog_proof` returned it.
        keys: vkey texts, of which one must have signed the checkpoint; not taken from whom the evidence came from.
        origin: The name of the log that it must be of, as its checkpoints say; None: of any. Stores that share a
            signing key have logs of different names.

    Returns:
        `checked` is 1 where the event was recomputed; `anchored` is the checkpoint's size where a key has signed it.

    Raises:
        InvalidEvidenceError: The text is not evidence.
        ValueError: A key is not a vkey.
        MissingExtraError: There are keys, and the extra `signing` is not installed.
    """
    trusted = [VerifierKey.parse(key) for key in keys]
    try:
        claim = _read_tlog_proof(text) if text.startswith(_TLOG_PROOF) else _read_json(text)
    except InvalidEvidenceError:
        raise
    except _UNREADABLE as exc:
        raise InvalidEvidenceError(
            "This is not evidence: it must be the whole text that `gateway-store evidence prove` wrote."
        ) from exc
    wrong, remarks, proof = [*claim.wrong], [*claim.remarks], claim.proof
    if proof is None:
        wrong.append((FindingKind.MISSING, "The event was not sealed when this was made: nothing proves it."))
    elif not verify_inclusion(proof.leaf, proof.position, proof.note.size, proof.path, proof.note.root):
        wrong.append((FindingKind.BAD_TREE, "The proof does not lead from the event's leaf to the checkpoint's root."))
    is_signed = proof is not None and bool(trusted) and bool(proof.note.signed_by(trusted))
    if trusted and not is_signed:
        wrong.append((FindingKind.BAD_SIGNATURE, "None of the given keys has signed a checkpoint of the event."))
    elif not trusted:
        remarks.append(_NO_KEY)
    if origin is not None and proof is not None and proof.note.origin != origin:
        said = f"This is evidence of the log {escape(proof.note.origin)}, and not of {escape(origin)}."
        wrong.append((FindingKind.FORKED, said))
    if claim.approval is not None:
        why = claim.approval or (_HASH_OF_UNPROVED if wrong else "")
        remarks.append(_UNPROVED + why if why else _PROVED)
    position, size, root = (proof.position, proof.note.size, proof.note.root) if proof else (None, 0, EMPTY_ROOT)
    return Verification(
        ok=not wrong,
        size=size,
        root_hash=root.hex(),
        origin=proof.note.origin if proof else "",
        checked=int(claim.has_event and not wrong),
        unsealed=int(proof is None),
        erased=int(claim.is_erased),
        anchored=size if is_signed else 0,
        findings=tuple(
            Finding(kind=kind, position=position, request_id=claim.request_id, text=said) for kind, said in wrong
        ),
        remarks=tuple(remarks),
    )


class _Proof(NamedTuple):
    """That a leaf is in the tree of a checkpoint, as somebody says."""

    position: int
    leaf: bytes
    path: list[bytes]
    note: ParsedNote


class _Claim(NamedTuple):
    """What a text says, the proof still to be checked: there is none where the event was not sealed."""

    proof: _Proof | None
    wrong: list[tuple[FindingKind, str]]
    remarks: list[str]
    request_id: str | None = None
    has_event: bool = True
    is_erased: bool = False
    # Why the event does not prove the approval that is shown; "": it holds its hash; None: none is shown.
    approval: str | None = None


def _read_json(text: str) -> _Claim:
    document = json.loads(text, object_pairs_hook=members_once, parse_float=_exact_float, parse_constant=_refuse)
    _require(document.keys() == {"format", *Evidence.model_fields} - {"votes"} and document["format"] == _FORMAT)
    position, salt, leaf = document["position"], _bytes(document["salt"]), _bytes(document["leaf_hash"])
    path, note = [_bytes(node) or b"" for node in document["path"]], document["checkpoint"]
    # A proof is whole, or not there at all.
    is_sealed = note is not None
    _require(type(position) is int and leaf is not None if is_sealed else not any((position, salt, leaf, path)))
    proof = _Proof(position, leaf, path, parse_note(note)) if is_sealed and leaf is not None else None
    held = AuditEvent.model_validate(document["event"])
    content_hash = _content_hash(document["event"])
    wrong, remarks = [], []
    if is_sealed and salt is None:
        wrong.append((FindingKind.ALTERED, "The event was erased: what is left of it is not proved, only its place."))
    elif content_hash != held.content_hash or (salt is not None and leaf_hash(salt, content_hash) != leaf):
        wrong.append((FindingKind.ALTERED, "The event is not the one that was sealed."))
    named, approval = held.extra.get(APPROVAL_HASH), None
    if document["approval"] is not None:
        request, votes = _read_approval(document["approval"])
        fits = named == hash_approval(request, votes)
        if fits:
            approval = ""
        elif named is None:
            approval = _NO_HASH
        else:
            approval = _OTHER_HASH
            wrong.append((FindingKind.ALTERED, "The approval or a vote on it is not the one that the event names."))
        remarks += _too_few_votes(request, votes)
    elif named is not None or held.approval_id is not None:
        remarks.append("The event names an approval, which is not in this text.")
    return _Claim(proof, wrong, remarks, held.request_id, is_erased=is_sealed and salt is None, approval=approval)


def _too_few_votes(request: ApprovalRequest, votes: Iterable[ApprovalVote]) -> list[str]:
    count = len({vote.approver_id for vote in votes if vote.decision == VoteDecision.APPROVED})
    if request.status not in (ApprovalStatus.APPROVED, ApprovalStatus.USED) or count >= request.required_approvals:
        return []
    said = f"{count} of {request.required_approvals}"
    return [f"The approval is {request.status} with fewer votes for it than it needs: {said}."]


def _read_approval(shown: Mapping[str, Any]) -> tuple[ApprovalRequest, list[ApprovalVote]]:
    request = ApprovalRequest.model_validate({name: value for name, value in shown.items() if name != "votes"})
    both = {"approval_id": request.approval_id, "org_id": request.org_id}
    votes = [ApprovalVote.model_validate(vote | both) for vote in shown["votes"]]
    # What is shown is what is hashed: a value in another spelling, or left to its default, is not.
    _require(encode(_approval_json(request, votes)) == encode(shown))
    return request, votes


def _read_tlog_proof(text: str) -> _Claim:
    found = _PROOF.fullmatch(text)
    if found is None:
        raise ValueError("it has another form")
    entry, path = decode64(found["entry"]), [decode64(line) for line in found["path"].split("\n")[:-1]]
    salt, content = entry[:-HASH_BYTES], entry[-HASH_BYTES:]
    proof = _Proof(int(found["index"]), leaf_hash(salt, content), path, parse_note(found["note"]))
    remark = f"This form shows no event: it proves that one whose content_hash is {content.hex()} is in the log."
    return _Claim(proof, [], [remark], has_event=False)


def _content_hash(event: Mapping[str, Any]) -> str:
    """Return SHA-256 of the event as the reference says it is taken, from its JSON alone."""
    document = {name: value for name, value in event.items() if name != "content_hash"}
    if document.get("approval_id") is None:
        document.pop("approval_id", None)
    if not document.get("extra"):
        document.pop("extra", None)
    text = json.dumps(document, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    return sha256(text.encode()).hexdigest()


def _exact_float(text: str) -> float:
    """Return a number in any spelling; ValueError for one with more digits than a float has, of which none is held."""
    value = float(text)
    if Decimal(text) != Decimal(repr(value)):
        raise ValueError("more digits than a float has")
    return value


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is not JSON")


def _require(fits: bool) -> None:
    if not fits:
        raise ValueError("it has another form")


def _bytes(digits: str | None) -> bytes | None:
    data = None if digits is None else bytes.fromhex(digits)
    _require(_hex(data) == digits)
    return data


def _hex(data: bytes | None) -> str | None:
    return None if data is None else data.hex()
