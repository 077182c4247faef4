"""Consistency proofs, by which a monitor or a witness sees that one checkpoint goes on from another."""

from __future__ import annotations

from collections.abc import Sequence

from agent_gateway_store.evidence.tree import HASH_BYTES, TileHashes, node_hash


def consistency_path(tiles: TileHashes, old: int, new: int) -> list[bytes]:
    """Return the proof that the tree of `new` leaves begins with the tree of `old` (RFC 9162, 2.1.4.1).

    It is empty where `old` is 0 or `new`.

    Raises:
        ValueError: `old` is larger than `new`.
        LookupError: The tiles lack a hash.
    """
    return [tiles.over(*each) for each in _ranges(old, new)]


def verify_consistency(old: int, old_root: bytes, new: int, new_root: bytes, path: Sequence[bytes]) -> bool:
    """True if `path` proves that the new tree begins with the old one (RFC 9162, 2.1.4.2).

    Every tree begins with the empty one, and with itself: there the path is empty.
    """
    if not 0 <= old <= new:
        return False
    if old in (0, new):
        return not path and (old != new or old_root == new_root)
    if not path or not all(len(each) == HASH_BYTES for each in (old_root, new_root, *path)):
        return False
    node, last = old - 1, new - 1
    while node & 1:
        node, last = node >> 1, last >> 1
    first, *rest = path if node else (old_root, *path)
    old_result = new_result = first
    for sibling in rest:
        if last == 0:
            return False
        if node & 1 or node == last:
            old_result, new_result = node_hash(sibling, old_result), node_hash(sibling, new_result)
            while node and not node & 1:
                node, last = node >> 1, last >> 1
        else:
            new_result = node_hash(new_result, sibling)
        node, last = node >> 1, last >> 1
    return last == 0 and old_result == old_root and new_result == new_root


def _ranges(old: int, new: int) -> list[tuple[int, int]]:
    if not 0 <= old <= new:
        raise ValueError(f"A tree of {new} leaves does not go on from one of {old}.")
    low, high, siblings = 0, new, list[tuple[int, int]]()
    while 0 < old < high:
        middle = low + (1 << (high - low - 1).bit_length() - 1)
        if old <= middle:
            siblings.append((middle, high))
            high = middle
        else:
            siblings.append((low, middle))
            low = middle
    # A verifier knows the old root, which is the last subtree where that begins at the first leaf.
    if low:
        siblings.append((low, high))
    return siblings[::-1]
