"""The sealed log: a position for each event, the hashes of the tree above them, and checkpoints; what `verify` says."""

from __future__ import annotations

from datetime import datetime
from enum import StrEnum
from hashlib import sha256

from sqlalchemy import BigInteger, CheckConstraint, Column, Integer, LargeBinary, Table, Text, UniqueConstraint
from sqlmodel import Field

from agent_gateway_store.clock import utc_now
from agent_gateway_store.models.audit import Instant
from agent_gateway_store.models.base import StoreModel, metadata
from agent_gateway_store.models.columns import BigKey, UtcDateTime
from agent_gateway_store.models.values import FrozenModel

identity_table = Table(
    "database_identity",
    metadata,
    Column("id", Integer, primary_key=True, autoincrement=False),
    Column("identity", Text, nullable=False),
    # The highest id of an event from before `db restored`, which followers take for history; None: it never ran.
    Column("history_id", BigInteger),
    CheckConstraint("id = 1", name="one_row"),
)

_GIVEN = {"autoincrement": False}


def leaf_hash(salt: bytes, content_hash: bytes | str) -> bytes:
    """Return the leaf of an event: SHA-256 over a zero byte, the salt, and `content_hash` as 32 bytes.

    Args:
        salt: Keeps a leaf from being guessed by somebody who knows what an event may say.
        content_hash: The event's, as 64 hex digits or as 32 bytes.
    """
    content = bytes.fromhex(content_hash) if isinstance(content_hash, str) else content_hash
    return sha256(b"\0" + salt + content).digest()


class AuditLeaf(StoreModel, table=True):
    """The place of one event in the log. It stays when its event is pruned, so there is no foreign key.

    Attributes:
        position: Dense, from 0.
        event_id: The event's id.
        salt: 16 random bytes, without which nobody can guess the event from its leaf; None: it was erased.
        leaf_hash: SHA-256(0x00 || salt || content_hash), 32 bytes.
    """

    __tablename__ = "audit_leaves"
    __table_args__ = (UniqueConstraint("event_id"),)

    position: int = Field(sa_type=BigKey(), primary_key=True, sa_column_kwargs=_GIVEN)
    event_id: int = Field(sa_type=BigInteger)
    salt: bytes | None = Field(sa_type=LargeBinary, nullable=True)
    leaf_hash: bytes = Field(sa_type=LargeBinary)


class AuditTile(StoreModel, table=True):
    """Hashes of up to 256 neighbours of one height in the tree, those of complete subtrees only.

    Attributes:
        level: Tile n of level l holds the nodes 256 n, 256 n + 1, ... of height 8 l. From 1: the tiles of level 0 are
            the leaf hashes, which the leaves hold.
        index: The number of the tile in its level.
        hashes: 32 bytes for each node, one after the other.
    """

    __tablename__ = "audit_tiles"

    level: int = Field(sa_type=Integer, primary_key=True, sa_column_kwargs=_GIVEN)
    index: int = Field(sa_type=BigInteger, primary_key=True, sa_column_kwargs=_GIVEN)
    hashes: bytes = Field(sa_type=LargeBinary)


class AuditCheckpoint(StoreModel, table=True):
    """What the log was at one size.

    Attributes:
        size: Number of leaves.
        root_hash: 64 hex digits.
        origin: The name of the log, which holds the database's identity of then.
        note: The C2SP signed note.
    """

    __tablename__ = "audit_checkpoints"
    __table_args__ = (CheckConstraint("length(root_hash) = 64", name="root_hash"),)

    size: int = Field(sa_type=BigKey(), primary_key=True, sa_column_kwargs=_GIVEN)
    root_hash: str = Field(sa_type=Text)
    origin: str = Field(sa_type=Text)
    note: str = Field(sa_type=Text)
    created_at: Instant = Field(default_factory=utc_now, sa_type=UtcDateTime)


# Names the transaction that may change rows of the log: a role that may write here may open the door.
door_table = Table("audit_door", metadata, Column("transaction_id", BigInteger, primary_key=True, autoincrement=False))


class Checkpoint(FrozenModel):
    """What a log was at one size. A copy that is kept elsewhere proves later that the log was rewritten.

    Attributes:
        origin: The name of the log: AUDIT_LOG_ORIGIN, a slash, and the database's identity.
        size: How many events were sealed.
        root_hash: 64 hex digits; stands for every one of them, and for their order.
        note: The same as a C2SP signed note, the form in which witnesses keep it.
        created_at: When it was made (UTC).
    """

    origin: str
    size: int
    root_hash: str
    note: str
    created_at: datetime


class FindingKind(StrEnum):
    """What does not fit.

    ALTERED: an event, or its leaf, is not what was sealed, or a table is not as this package made it. MISSING: it is
    gone, and nothing sealed says that it was pruned. MOVED: it stands at another position. TRUNCATED: the log is
    shorter than it was. FORKED: it is not the log of which a checkpoint was kept, or not the one that was named.
    BAD_TREE: hashes between the leaves and the root are wrong. BAD_SIGNATURE: no expected key has signed.
    """

    ALTERED = "ALTERED"
    MISSING = "MISSING"
    MOVED = "MOVED"
    TRUNCATED = "TRUNCATED"
    FORKED = "FORKED"
    BAD_TREE = "BAD_TREE"
    BAD_SIGNATURE = "BAD_SIGNATURE"


class Finding(FrozenModel):
    """One thing that does not fit.

    Attributes:
        position: Of the leaf, or of the first one it is about; None where it is about none.
        event_id: Of the event; None where it is about none.
        request_id: Of the event, where that can still be read.
        text: What is wrong, for people.
    """

    kind: FindingKind
    position: int | None = None
    event_id: int | None = None
    request_id: str | None = None
    text: str


class Verification(FrozenModel):
    """What was found: integrity (`ok`), anchoring (`anchored`) and completeness (`unsealed`) are three statements.

    Attributes:
        ok: True if nothing was found that does not fit.
        size: How many events are sealed.
        root_hash: Of the tree over them, as recomputed.
        origin: The name of the log, as its last checkpoint or the evidence says; "": there is none.
        checked: How many events were recomputed from their columns and fit their leaf.
        unsealed: How many events are committed and not sealed yet: nothing protects those.
        erased: How many events were erased, as sealed events say.
        pruned: How many were pruned, as sealed events say.
        archived: How many of the pruned ones were found in the archive.
        anchored: The largest size that a checkpoint kept elsewhere vouches for; 0: none does, so that the owner of the
            database may have sealed everything anew.
        findings: What does not fit.
        remarks: What is true all the same and must not be read over, for people: what nothing proves or vouches for.
    """

    ok: bool
    size: int
    root_hash: str
    origin: str = ""
    checked: int = 0
    unsealed: int = 0
    erased: int = 0
    pruned: int = 0
    archived: int = 0
    anchored: int = 0
    findings: tuple[Finding, ...] = ()
    remarks: tuple[str, ...] = ()
