"""The hashes of the tree in the database: those of the leaves stand in the leaves, those above in tiles."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from sqlalchemy import BigInteger, Integer, LargeBinary
from sqlalchemy.sql.selectable import TextualSelect

from agent_gateway_store.evidence.tree import HASH_BYTES, TILE_WIDTH, TileHashes, row_root
from agent_gateway_store.storage.asyncpg_pool import RawConnection
from agent_gateway_store.storage.database import AnyConnection, dialect_of
from agent_gateway_store.storage.statements import RowsParameter, Statement, text_statement, typed_text

# Of a leaf that is not the database's own: none comes behind it.
_LARGEST_POSITION = 2**63 - 1
_TILE_BYTES = TILE_WIDTH * HASH_BYTES
_TILE_KEY = {"level": Integer(), "first": BigInteger(), "behind": BigInteger()}
_WANTED = RowsParameter("wanted", _TILE_KEY)
_TYPES: dict[str, Any] = {
    "p_level": Integer(),
    "p_index": BigInteger(),
    "p_hashes": LargeBinary(),
    **_WANTED.types,
}


def _hashes(dialect: str) -> TextualSelect:
    """Select the hashes of all tiles that are wanted, in one round trip: level, first place and hashes, in order."""
    wanted = _WANTED.sql(dialect)
    leaf, within = "audit_leaves", "position >= wanted.first AND position < wanted.behind"
    if dialect == "postgresql":
        # Without a LIMIT it plans for a ninth of all leaves: of millions, enough to compile the statement (JIT).
        leaf = f"LATERAL (SELECT * FROM {leaf} WHERE {within} ORDER BY position LIMIT {TILE_WIDTH})"  # noqa: S608  our own
    # CROSS JOIN: SQLite keeps the order of such tables.
    return typed_text(
        f"""
        SELECT tile.level, tile."index", tile.hashes FROM {wanted} AS wanted
        CROSS JOIN audit_tiles AS tile
        WHERE wanted.level > 0 AND tile.level = wanted.level AND tile."index" = wanted.first
        UNION ALL
        SELECT 0, leaf.position, leaf.leaf_hash FROM {wanted} AS wanted
        CROSS JOIN {leaf} AS leaf
        WHERE wanted.level = 0 AND {within}
        ORDER BY 1, 2
        """,  # noqa: S608  names of our own
        _TYPES,
    )


_HASHES = Statement(_hashes)
_PUT = text_statement(
    """
    INSERT INTO audit_tiles (level, "index", hashes) VALUES (:p_level, :p_index, :p_hashes)
    ON CONFLICT (level, "index") DO UPDATE SET hashes = :p_hashes
    RETURNING level
    """,
    _TYPES,
    level=Integer(),
)


async def read_tiles(connection: AnyConnection, wanted: Collection[tuple[int, int]]) -> TileHashes:
    """Return the tiles of these levels and indexes, as far as they are there, in one read."""
    found: dict[tuple[int, int], list[bytes]] = {tile: [] for tile in wanted}
    rows = await _HASHES.tuples(connection, _WANTED.values(dialect_of(connection), [_key(*tile) for tile in found]))
    for level, place, hashes in rows:
        tile = found[level, place if level else place // TILE_WIDTH]
        # A gap ends the tile: what follows it stands at another place than its position.
        tile.append(hashes if len(tile) == (0 if level else place % TILE_WIDTH) else b"")
    return TileHashes({tile: b"".join(hashes) for tile, hashes in found.items()})


def _key(level: int, index: int) -> dict[str, int]:
    first, width = (index, 1) if level else (index * TILE_WIDTH, TILE_WIDTH)
    return {"level": level, "first": first, "behind": min(first + width, _LARGEST_POSITION)}


def grown(edge: TileHashes, size: int, leaves: Sequence[bytes]) -> dict[tuple[int, int], bytes]:
    """Return the tiles that `leaves` change, which follow the first `size` ones; `edge`: those of `tiles_for_root`."""
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
