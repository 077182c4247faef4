"""The hashes of the tree in the database: those of the leaves stand in the leaves, those above in tiles."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sqlalchemy import BigInteger, Integer, LargeBinary, column

from agent_gateway_store.evidence.tree import HASH_BYTES, TILE_WIDTH, TileHashes, node_hash
from agent_gateway_store.storage.database import AnyConnection
from agent_gateway_store.storage.statements import Statement, typed_text

_TYPES: dict[str, Any] = {
    "p_first": BigInteger(),
    "p_end": BigInteger(),
    "p_level": Integer(),
    "p_index": BigInteger(),
    "p_hashes": LargeBinary(),
}
_LEAVES = Statement(
    typed_text(
        """
        SELECT position, leaf_hash FROM audit_leaves
        WHERE position >= :p_first AND position < :p_end ORDER BY position
        """,
        _TYPES,
        (column("position", BigInteger()), column("leaf_hash", LargeBinary())),
    )
)
_TILE = Statement(
    typed_text(
        'SELECT hashes FROM audit_tiles WHERE level = :p_level AND "index" = :p_index',
        _TYPES,
        (column("hashes", LargeBinary()),),
    )
)
_PUT = Statement(
    typed_text(
        """
        INSERT INTO audit_tiles (level, "index", hashes) VALUES (:p_level, :p_index, :p_hashes)
        ON CONFLICT (level, "index") DO UPDATE SET hashes = :p_hashes
        RETURNING level
        """,
        _TYPES,
        (column("level", Integer()),),
    )
)


async def read_tiles(connection: AnyConnection, wanted: Sequence[tuple[int, int]]) -> TileHashes:
    """Return the tiles of these levels and indexes, as far as they are there; each is one read."""
    return TileHashes({tile: await _read(connection, *tile) for tile in dict.fromkeys(wanted)})


async def _read(connection: AnyConnection, level: int, index: int) -> bytes:
    if level:
        row = await _TILE.first(connection, {"p_level": level, "p_index": index})
        return b"" if row is None else row["hashes"]
    first = index * TILE_WIDTH
    rows = await _LEAVES.rows(connection, {"p_first": first, "p_end": first + TILE_WIDTH})
    # A gap ends the tile: what follows it stands at another place than its position.
    return b"".join(row["leaf_hash"] for place, row in enumerate(rows) if row["position"] == first + place)


async def append(connection: AnyConnection, size: int, leaves: Sequence[bytes]) -> None:
    """Write the nodes that are complete once these leaves follow the first `size` ones; does not commit."""
    level, count, new = 0, size, list(leaves)
    while new:
        tile = await _read(connection, level, count // TILE_WIDTH) if count % TILE_WIDTH else b""
        # Of the leaves, those that are new are in the table already.
        kept = tile[: count % TILE_WIDTH * HASH_BYTES]
        row = [kept[at : at + HASH_BYTES] for at in range(0, len(kept), HASH_BYTES)] + new
        if level:
            await _put(connection, level, count // TILE_WIDTH, row)
        new = [_root(row[at : at + TILE_WIDTH]) for at in range(0, len(row) - TILE_WIDTH + 1, TILE_WIDTH)]
        level, count = level + 1, count // TILE_WIDTH


async def _put(connection: AnyConnection, level: int, index: int, row: Sequence[bytes]) -> None:
    for at in range(0, len(row), TILE_WIDTH):
        hashes = b"".join(row[at : at + TILE_WIDTH])
        await _PUT.rows(connection, {"p_level": level, "p_index": index + at // TILE_WIDTH, "p_hashes": hashes})


def _root(row: Sequence[bytes]) -> bytes:
    while len(row) > 1:
        row = [node_hash(*pair) for pair in zip(row[::2], row[1::2], strict=True)]
    return row[0]
