"""The Merkle tree of the sealed log, hashed as in RFC 9162 and kept in tiles 256 hashes wide. Nothing here does I/O.

A node is named by its level (0: the leaves) and its index within the level. Only nodes over 2^level leaves, all there,
are kept; the hashes at the ragged right edge of a tree are made of those.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from functools import reduce
from hashlib import sha256
from typing import TypeAlias

# Bytes of SHA-256.
HASH_BYTES = 32
# C2SP tlog-tiles: a tile is a subtree of height 8, so 256 hashes wide.
TILE_HEIGHT = 8
TILE_WIDTH = 1 << TILE_HEIGHT
EMPTY_ROOT = sha256(b"").digest()


def node_hash(left: bytes, right: bytes) -> bytes:
    """Return the hash of the node above two others."""
    return sha256(b"\1" + left + right).digest()


def _merge(hashes: Sequence[bytes]) -> bytes:
    """Return the hash over complete subtrees that shrink from left to right."""
    return reduce(lambda right, left: node_hash(left, right), reversed(hashes))


def row_root(hashes: bytes) -> bytes:
    """Return the root over a row of hashes, of which there are a power of two."""
    row = [hashes[at : at + HASH_BYTES] for at in range(0, len(hashes), HASH_BYTES)]
    while len(row) > 1:
        pairs = iter(row)
        row = [node_hash(left, right) for left, right in zip(pairs, pairs, strict=True)]
    return row[0]


class GrowingTree:
    """A tree that grows leaf by leaf, of which only the roots of its complete subtrees are kept.

    Args:
        completed: Receives each hash that a tile above the leaves holds, as soon as its subtree is complete: the level
            of the tile, the index of the hash within that level, and the hash.

    Attributes:
        size: How many leaves.
        peaks: Those roots, from the largest subtree to the smallest.
    """

    def __init__(self, completed: Callable[[int, int, bytes], None] = lambda _level, _index, _node: None) -> None:
        self._completed = completed
        self.size = 0
        self.peaks: list[bytes] = []

    def append(self, leaf: bytes) -> None:
        """Add the hash of the next leaf."""
        node, height, index = leaf, 0, self.size
        # An odd node completes the subtree above it, with the last peak as its left half.
        while index & 1:
            node, height, index = node_hash(self.peaks.pop(), node), height + 1, index >> 1
            if height % TILE_HEIGHT == 0:
                self._completed(height // TILE_HEIGHT, index, node)
        self.peaks.append(node)
        self.size += 1

    def root(self) -> bytes:
        """Return the hash of the whole tree."""
        return _merge(self.peaks) if self.peaks else EMPTY_ROOT


_Range = tuple[int, int]
"""Leaves from the first to before the second: a whole subtree, or the ragged rest of the tree."""


def _inclusion_ranges(index: int, size: int) -> list[_Range]:
    if not 0 <= index < size:
        raise ValueError(f"A tree of {size} leaves has no leaf {index}.")
    low, high, siblings = 0, size, list[_Range]()
    while high - low > 1:
        # Where the two subtrees below meet.
        middle = low + (1 << (high - low - 1).bit_length() - 1)
        if index < middle:
            siblings.append((middle, high))
            high = middle
        else:
            siblings.append((low, middle))
            low = middle
    return siblings[::-1]


def _nodes(low: int, high: int) -> list[tuple[int, int]]:
    """Return level and index of the complete subtrees over these leaves, from the largest to the smallest."""
    nodes = []
    while low < high:
        level = (high - low).bit_length() - 1
        nodes.append((level, low >> level))
        low += 1 << level
    return nodes


def _tiles(ranges: Iterable[_Range]) -> list[tuple[int, int]]:
    nodes = (node for each in ranges for node in _nodes(*each))
    return sorted({(level // TILE_HEIGHT, index >> TILE_HEIGHT - level % TILE_HEIGHT) for level, index in nodes})


def tiles_for_inclusion(index: int, size: int) -> list[tuple[int, int]]:
    """Return level and index of the tiles that `inclusion_path` reads: a few for each factor of 256 in `size`."""
    return _tiles(_inclusion_ranges(index, size))


def tiles_for_root(size: int) -> list[tuple[int, int]]:
    """Return level and index of the tiles that `root_from` reads."""
    return _tiles([(0, size)])


class TileHashes:
    """Resolves the hashes of complete subtrees from tiles.

    Args:
        tiles: Level and index to the concatenated hashes of that tile; more hashes than a tree needs do no harm.
    """

    def __init__(self, tiles: Mapping[tuple[int, int], bytes]) -> None:
        self._tiles = tiles

    def with_tiles(self, tiles: Mapping[tuple[int, int], bytes]) -> TileHashes:
        """Return these with others added, or in place of them."""
        return TileHashes({**self._tiles, **tiles})

    def tile(self, level: int, index: int, count: int = TILE_WIDTH) -> bytes:
        """Return the first `count` hashes of a tile; LookupError where one of them lacks."""
        hashes = self._tiles[level, index][: count * HASH_BYTES]
        if len(hashes) != count * HASH_BYTES:
            raise LookupError(f"Tile {index} of level {level} has no hash {len(hashes) // HASH_BYTES}.")
        return hashes

    def node(self, level: int, index: int) -> bytes:
        """Return the hash of a complete subtree; LookupError where the tiles lack one of its hashes."""
        tile_level, above = divmod(level, TILE_HEIGHT)
        count = 1 << above
        tile, start = divmod(index * count, TILE_WIDTH)
        return row_root(self.tile(tile_level, tile, start + count)[start * HASH_BYTES :])

    def over(self, low: int, high: int) -> bytes:
        """Return the hash over leaves `low` to before `high`: a whole subtree, or the rest of a tree from one on."""
        return _merge([self.node(*node) for node in _nodes(low, high)])


ReadTiles: TypeAlias = Callable[[Sequence[tuple[int, int]]], Awaitable[TileHashes]]
"""Reads the tiles of these levels and indexes."""


def inclusion_path(tiles: TileHashes, index: int, size: int) -> list[bytes]:
    """Return the proof that leaf `index` is in the tree of the first `size` leaves (RFC 9162, 2.1.3.1).

    ValueError where that tree has no such leaf; LookupError where the tiles lack a hash of `tiles_for_inclusion`.
    """
    return [tiles.over(*each) for each in _inclusion_ranges(index, size)]


def root_from(tiles: TileHashes, size: int) -> bytes:
    """Return the root of the tree of the first `size` leaves; LookupError where a hash of `tiles_for_root` lacks."""
    return tiles.over(0, size) if size else EMPTY_ROOT


def verify_inclusion(leaf: bytes, index: int, size: int, path: Sequence[bytes], root: bytes) -> bool:
    """True if `path` proves that leaf `index` of the tree with this size and root is `leaf` (RFC 9162, 2.1.3.2)."""
    if not 0 <= index < size or any(len(each) != HASH_BYTES for each in (leaf, root, *path)):
        return False
    node, last, result = index, size - 1, leaf
    for sibling in path:
        if last == 0:
            return False
        if node & 1 or node == last:
            result = node_hash(sibling, result)
            while node and not node & 1:
                node, last = node >> 1, last >> 1
        else:
            result = node_hash(result, sibling)
        node, last = node >> 1, last >> 1
    return last == 0 and result == root
