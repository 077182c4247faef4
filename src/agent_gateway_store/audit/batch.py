"""Commit a batch in which the same request_id may stand several times."""

from __future__ import annotations

from collections.abc import Sequence

from agent_gateway_store.audit.backends import RowResult, Sink
from agent_gateway_store.audit.outcomes import WriteOutcome
from agent_gateway_store.audit.record import EncodedRow, hash_of, key_of

__all__ = ["store_batch"]


async def store_batch(sink: Sink, rows: Sequence[EncodedRow]) -> list[RowResult]:
    """Commit `rows` and return what became of each, in order. Raises what the sink raises.

    The same event twice is stored once; different events under one id go one after the other, as if each had come in
    a batch of its own.
    """
    first: dict[tuple[str, str], int] = {}
    repeats: dict[int, int] = {}
    others: list[int] = []
    for index, row in enumerate(rows):
        seen = first.setdefault(key_of(row), index)
        if seen == index:
            continue
        if hash_of(rows[seen]) == hash_of(row):
            repeats[index] = seen
        else:
            others.append(index)
    if not repeats and not others:
        return await sink.store(rows)
    outcomes = dict(zip(first.values(), await sink.store([rows[index] for index in first.values()]), strict=True))
    if others:
        outcomes |= dict(zip(others, await store_batch(sink, [rows[index] for index in others]), strict=True))
    for index, seen in repeats.items():
        outcomes[index] = WriteOutcome.DUPLICATE if outcomes[seen] is WriteOutcome.STORED else outcomes[seen]
    return [outcomes[index] for index in range(len(rows))]
