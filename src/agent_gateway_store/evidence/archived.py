"""What archives hold of the log: every event in them is recomputed, and compared with its leaf."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from sqlalchemy import BigInteger, select

from agent_gateway_store.archive.manifest import Positions, runs_of
from agent_gateway_store.archive.reader import ArchiveWalk
from agent_gateway_store.models.evidence import AuditLeaf, FindingKind
from agent_gateway_store.storage.statements import Statement, is_one_of
from agent_gateway_store.storage.streaming import Snapshot

_leaves = AuditLeaf.__table__


@dataclass
class Archived:
    """What the archives hold.

    Attributes:
        intact: Events that fit their leaf.
        erased: Events that are blanked, as a sealed event says.
        expected: Events that must be there, as sealed events say; none where no archive is looked at.
        altered: Events that are there, and fit nothing.
        remarks: What else lies there, for people.
    """

    intact: Positions = field(default_factory=Positions)
    erased: Positions = field(default_factory=Positions)
    expected: Positions = field(default_factory=Positions)
    altered: set[int] = field(default_factory=set)
    remarks: tuple[str, ...] = ()


_LEAVES_AT = Statement(
    lambda dialect: select(_leaves.c.position, _leaves.c.leaf_hash).where(
        is_one_of(dialect, _leaves.c.position, "p_positions", BigInteger())
    )
)


async def read_archives(
    reader: Snapshot,
    folders: Sequence[Path],
    expected: list[list[int]],
    blanked: Mapping[int, set[str]],
    note: Callable[..., None],
) -> Archived:
    """Check every event of the archives, and hand each finding to `note`.

    Sealed events say which runs are `expected` there, and the hashes of `blanked` events, by position.
    """
    altered: set[int] = set()
    remarks: list[str] = []
    intact: list[list[int]] = []
    erased: list[list[int]] = []
    for folder in folders:
        archive = ArchiveWalk(folder)
        batches = archive.checked_rows()
        while (rows := await asyncio.to_thread(next, batches, None)) is not None:
            wanted = [position for position, _, _ in rows]
            leaves = dict(map(tuple, await reader.fetched(_LEAVES_AT, {"p_positions": wanted})))
            fitting: list[int] = []
            blank: list[int] = []
            for position, leaf, left in rows:
                is_ours = leaves.get(position, b"").hex() == leaf
                if is_ours and left is None:
                    fitting.append(position)
                elif is_ours and left in blanked.get(position, ()):
                    blank.append(position)
                else:
                    text = "The archived event is not that of this log, or was blanked and no sealed event says so."
                    altered.add(position)
                    note(FindingKind.ALTERED, text, position=position)
            intact += runs_of(fitting)
            erased += runs_of(blank)
        for each in archive.findings:
            if each.position is not None:
                altered.add(each.position)
            note(each.kind, each.text, position=each.position, request_id=each.request_id)
        remarks += await asyncio.to_thread(list, archive.remarks())
    held = Positions(expected if folders else ())
    return Archived(Positions(intact), Positions(erased), held, altered, tuple(remarks))
