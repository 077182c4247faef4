"""The Merkle tree: the vectors of transparency-dev/merkle, and a second implementation written from RFC 9162."""

from __future__ import annotations

import json
from functools import cache
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent_gateway_store.evidence.tree import (
    EMPTY_ROOT,
    GrowingTree,
    TileHashes,
    inclusion_path,
    node_hash,
    root_from,
    tiles_for_inclusion,
    tiles_for_root,
    verify_inclusion,
)
from agent_gateway_store.models.evidence import leaf_hash
from consistency import consistency_path, verify_consistency

pytestmark = pytest.mark.unit

VECTORS = json.loads((Path(__file__).parents[1] / "corpus/merkle_vectors.json").read_text())
ROOTS = [bytes.fromhex(root) for root in VECTORS["roots"]]
SOME = bytes.fromhex(VECTORS["some_hash"])
NAMED = {"some": b"don't care 1", "other": b"don't care 2", "empty": EMPTY_ROOT}
# Two full tiles and a ragged third.
LARGEST = 600


def leaf(index: int) -> bytes:
    return sha256(b"\0" + index.to_bytes(4)).digest()


@cache
def naive_root(low: int, high: int) -> bytes:
    """MTH(D[low:high]) as RFC 9162, 2.1.1, defines it."""
    match high - low:
        case 0:
            return sha256(b"").digest()
        case 1:
            return leaf(low)
    middle = low + split(high - low)
    return sha256(b"\1" + naive_root(low, middle) + naive_root(middle, high)).digest()


def split(count: int) -> int:
    power = 1
    while power * 2 < count:
        power *= 2
    return power


def naive_inclusion(index: int, low: int, high: int) -> list[bytes]:
    """PATH of RFC 9162, 2.1.3.1."""
    if high - low == 1:
        return []
    middle = low + split(high - low)
    if index < middle:
        return [*naive_inclusion(index, low, middle), naive_root(middle, high)]
    return [*naive_inclusion(index, middle, high), naive_root(low, middle)]


def naive_consistency(old: int, low: int, high: int, *, whole: bool) -> list[bytes]:
    """SUBPROOF of RFC 9162, 2.1.4.1; `old` counts from the first leaf of the tree."""
    if old == high:
        return [] if whole else [naive_root(low, high)]
    middle = low + split(high - low)
    if old <= middle:
        return [*naive_consistency(old, low, middle, whole=whole), naive_root(middle, high)]
    return [*naive_consistency(old, middle, high, whole=False), naive_root(low, middle)]


def tiles_of(size: int) -> dict[tuple[int, int], bytes]:
    """Every tile of a tree, partial ones too, straight from the definition of C2SP tlog-tiles."""
    tiles, level = {}, 0
    while count := size // 256**level:
        for tile in range(-(-count // 256)):
            nodes = range(tile * 256, min(count, tile * 256 + 256))
            tiles[level, tile] = b"".join(naive_root(node * 256**level, (node + 1) * 256**level) for node in nodes)
        level += 1
    return tiles


TILES = tiles_of(LARGEST)


def only(names: list[tuple[int, int]]) -> TileHashes:
    """Just the tiles that a proof says it reads."""
    return TileHashes({name: TILES[name] for name in names})


def test_roots_are_the_published_ones() -> None:
    """Their leaves are hashed as ours are, over a zero byte and the data."""
    tree = GrowingTree()
    assert EMPTY_ROOT.hex() == VECTORS["empty_root"] == tree.root().hex()
    for data, root in zip(VECTORS["leaves"], ROOTS, strict=True):
        tree.append(leaf_hash(b"", bytes.fromhex(data)))
        assert tree.root() == root


def test_leaf_takes_the_content_hash_as_digits_or_bytes() -> None:
    content = sha256(b"event")

    assert leaf_hash(b"salt", content.hexdigest()) == sha256(b"\0salt" + content.digest()).digest()
    assert leaf_hash(b"salt", content.digest()) == leaf_hash(b"salt", content.hexdigest())


@pytest.mark.parametrize("each", VECTORS["inclusion"], ids=lambda each: f"{each['index']}-of-{each['size']}")
def test_published_inclusion_proofs_verify_and_their_corruptions_do_not(each: dict[str, Any]) -> None:
    """The corruptions are those of `corruptInclusionProof` there."""
    index, size, path = each["index"], each["size"], [bytes.fromhex(node) for node in each["path"]]
    the_leaf, root = leaf_hash(b"", bytes.fromhex(VECTORS["leaves"][index])), ROOTS[size - 1]
    assert verify_inclusion(the_leaf, index, size, path, root)
    corrupt = [
        *((the_leaf, other, size, path, root) for other in (index - 1, index + 1, index ^ 2)),
        *((the_leaf, index, other, path, root) for other in (size * 2, size // 2)),
        (b"WrongLeaf", index, size, path, root),
        *((the_leaf, index, size, path, other) for other in (EMPTY_ROOT, SOME, b"")),
        *((the_leaf, index, size, [*path, extra], root) for extra in (b"", root)),
        *((the_leaf, index, size, [extra, *path], root) for extra in (b"", root)),
        *((the_leaf, index, size, flipped(path, at, 8), root) for at in range(len(path))),
    ]
    if path:
        corrupt.append((the_leaf, index, size, path[:-1], root))
    if len(path) > 1:
        corrupt.append((the_leaf, index, size, [path[0], SOME, *path[1:]], root))
    for arguments in corrupt:
        assert not verify_inclusion(*arguments), arguments


def test_published_consistency_proofs_are_judged_as_there() -> None:
    """By the verifier that the witness of the tests has."""
    for each in VECTORS["consistency"]:
        path = [bytes.fromhex(node) for node in each["path"]]
        assert verify_consistency(each["old"], ROOTS[each["old"] - 1], each["new"], ROOTS[each["new"] - 1], path)
    for each in VECTORS["consistency_edges"]:
        first, second, path = NAMED[each["old_root"]], NAMED[each["new_root"]], [NAMED[name] for name in each["path"]]
        assert verify_consistency(each["old"], first, each["new"], second, path) is each["ok"]


def flipped(path: list[bytes], at: int, bits: int) -> list[bytes]:
    return [*path[:at], bytes([path[at][0] ^ bits]) + path[at][1:], *path[at + 1 :]]


def test_trees_of_every_size_are_those_of_the_definition() -> None:
    """Appended leaf by leaf, and from tiles."""
    tree = GrowingTree()
    for size in range(LARGEST + 1):
        root = naive_root(0, size)
        assert tree.root() == root
        assert root_from(only(tiles_for_root(size)), size) == root
        tree.append(leaf(size))


def test_a_growing_tree_hands_out_the_hashes_of_its_tiles() -> None:
    """Each once, in the order in which their subtrees are complete."""
    found: list[tuple[int, int, bytes]] = []
    tree = GrowingTree(lambda level, index, node: found.append((level, index, node)))
    for index in range(LARGEST):
        tree.append(leaf(index))

    assert found == [(1, 0, naive_root(0, 256)), (1, 1, naive_root(256, 512))]


def test_inclusion_in_trees_of_every_size() -> None:
    for size in range(1, LARGEST + 1):
        for index in {0, size // 3, size // 2, size - 1}:
            path, root = inclusion_path(only(tiles_for_inclusion(index, size)), index, size), naive_root(0, size)
            assert path == naive_inclusion(index, 0, size)
            assert verify_inclusion(leaf(index), index, size, path, root)
            assert not verify_inclusion(leaf(index + 1), index, size, path, root)
            assert not verify_inclusion(leaf(index), index, size, path, naive_root(0, size + 1))


def test_consistency_of_trees_of_every_size() -> None:
    for size in range(2, LARGEST + 1):
        for old in {1, size // 2, size - 1}:
            check_consistency(old, size)


def check_consistency(old: int, new: int) -> None:
    path = consistency_path(TileHashes(TILES), old, new)
    first, second = naive_root(0, old), naive_root(0, new)

    assert path == (naive_consistency(old, 0, new, whole=True) if old else [])
    assert verify_consistency(old, first, new, second, path)
    if old > 0:
        assert not verify_consistency(old, SOME, new, second, path)
        assert not verify_consistency(old, first, new, SOME, path)


@given(
    st.integers(-1, 9),
    st.integers(-1, 9),
    st.lists(st.sampled_from([*ROOTS, SOME, b"", b"short"]), max_size=5),
    st.sampled_from([*ROOTS, b""]),
    st.sampled_from([*ROOTS, b""]),
)
def test_any_proof_is_judged_without_an_error(
    first: int, second: int, path: list[bytes], root: bytes, other: bytes
) -> None:
    assert verify_consistency(first, root, second, other, path) in (True, False)
    assert verify_inclusion(root, first, second, path, other) in (True, False)


def test_tiles_that_lack_a_hash_are_a_lookup_error() -> None:
    with pytest.raises(LookupError, match="Tile 2 of level 0 has no hash 87"):
        root_from(TileHashes({**TILES, (0, 2): TILES[0, 2][:-1]}), LARGEST)
    with pytest.raises(LookupError):
        inclusion_path(TileHashes({}), 3, 10)


@pytest.mark.parametrize(("index", "size"), [(0, 0), (5, 5), (-1, 5)])
def test_a_leaf_that_the_tree_has_not_is_refused(index: int, size: int) -> None:
    with pytest.raises(ValueError, match="has no leaf"):
        inclusion_path(TileHashes(TILES), index, size)


def test_proofs_of_a_large_tree_read_few_tiles() -> None:
    """Two on each of the four levels of a tree of a billion leaves."""
    size = 10**9 + 12345

    assert len(tiles_for_inclusion(size // 3, size)) <= 8


def test_node_is_told_from_leaf() -> None:
    """RFC 9162 hashes them under different first bytes, so that no node passes for an event."""
    assert node_hash(ROOTS[0], ROOTS[1]) == sha256(b"\1" + ROOTS[0] + ROOTS[1]).digest()
    assert node_hash(ROOTS[0], ROOTS[1]) != leaf_hash(ROOTS[0], ROOTS[1])
