"""The hashes of the tree in the database: those of the leaves stand in the leaves, those above in tiles."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from sqlalchemy import BigInteger, Integer, LargeBinary

from agent_gateway_store.evidence.tree import HASH_BYTES, TILE_WIDTH, TileHashes, row_root
from agent_gateway_store.storage.asyncpg_pool import RawConnection
from agent_gateway_store.storage.database import AnyConnection
from agent_gateway_store.storage.statements import text_statement

_TYPES: dict[str, Any] = {
    "p_first": BigInteger(),
    "p_end": BigInteger(),
    "p_level": Integer(),
    "p_index": BigInteger(),
    "p_hashes": LargeBinary(),
}
# Of a leaf that is not the database's own: none comes behind it.
_LARGEST_POSITION = 2**63 - 1
_TILE_BYTES = TILE_WIDTH * HASH_BYTES
_LEAVES = text_statement(
    """
    SELECT position, leaf_hash FROM audit_leaves
    WHERE position >= :p_first AND position < :p_end ORDER BY position
    """,
    _TYPES,
    position=BigInteger(),
    leaf_hash=LargeBinary(),
)
_TILE = text_statement(
    'SELECT hashes FROM audit_tiles WHERE level = :p_level AND "index" = :p_index', _TYPES, hashes=LargeBinary()
)
_PUT = text_statement(
    """
    INSERT INTO audit_tiles (level, "index", hashes) VALUES (:p_level, :p_index, :p_hashes)
    ON CONFLICT (level, "index") DO UPDATE SET hashes = :p_hashes
    RETURNING level
    """,
    _TYPES,
    level=Integer(),
)


async def read_tiles(connection: AnyConnection, wanted: Sequence[tuple[int, int]]) -> TileHashes:
    """Return the tiles of these levels and indexes, as far as they are there; each is one read."""
    return TileHashes({tile: await _read(connection, *tile) for tile in dict.fromkeys(wanted)})


async def _read(connection: AnyConnection, level: int, index: int) -> bytes:
    if level:
        found = await _TILE.tuples(connection, {"p_level": level, "p_index": index})
        return found[0][0] if found else b""
    first = index * TILE_WIDTH
    rows = await _LEAVES.tuples(connection, {"p_first": first, "p_end": min(first + TILE_WIDTH, _LARGEST_POSITION)})
    # A gap ends the tile: what follows it stands at another place than its position.
    return b"".join(leaf for place, (position, leaf) in enumerate(rows) if position == first + place)


def grown(edge: TileHashes, size: int, leaves: Sequence[bytes]) -> dict[tuple[int, int], bytes]:
    """Return the tiles that leaves change which follow the first `size` ones.

    Args:
        edge: The tiles of `tiles_for_root(size)`.
        size: How many leaves there are.
        leaves: Those to come.
    """
    made: dict[tuple[int, int], bytes] = {}
    level, count, new = 0, size, list(leaves)
    while new:
        index, kept = divmod(count, TILE_WIDTH)
        row = [edge.tile(level, index, kept), *new] if kept else new
        hashes = b"".join(row)
        tiles = [hashes[at : at + _TILE_BYTES] for at in range(0, len(hashes), _TILE_BYTES)]
        made |= {(level, index + place): tile for place, tile in enumerate(tiles)}
        new = [row_root(tile) for tile in tiles if len(tile) == _TILE_BYTES]
        level, count = level + 1, index
    return made


async def put_tiles(connection: AnyConnection, tiles: Mapping[tuple[int, int], bytes]) -> None:
    """Write tiles, those of level 0 excepted; does not commit."""
    rows = [
        {"p_level": level, "p_index": index, "p_hashes": hashes} for (level, index), hashes in tiles.items() if level
    ]
    if isinstance(connection, RawConnection):
        # In one round trip: a batch of the sealer has twenty.
        compiled = _PUT.compiled(connection.dialect)
        await connection.driver.executemany(compiled.text, map(compiled.arguments, rows))
        return
    for row in rows:
        await _PUT.rows(connection, row)
