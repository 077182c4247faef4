"""The log as files that any web server or bucket serves to monitors: C2SP tlog-tiles, without the entries."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager
from errno import ELOOP
from itertools import islice
from pathlib import Path

from agent_gateway_store.errors import LogMismatchError
from agent_gateway_store.evidence.notes import ParsedNote, parse_note
from agent_gateway_store.evidence.tree import (
    HASH_BYTES,
    TILE_HEIGHT,
    TILE_WIDTH,
    ReadTiles,
    TileHashes,
    root_from,
    row_root,
    tiles_for_root,
)
from agent_gateway_store.models.evidence import Checkpoint
from agent_gateway_store.storage.exclusive import folder_lock
from agent_gateway_store.storage.files import PUBLIC_FILE_MODE, open_regular, partial, sync

# Chosen: 512 KiB of hashes in memory.
_TILES_AT_ONCE = 64
# Chosen: a log that grew by some 100,000 events is published in less.
_WAIT_S = 20.0


@asynccontextmanager
async def publish_lock(folder: Path) -> AsyncIterator[None]:
    """Let those who publish to this folder, which is made, write one after the other."""
    await asyncio.to_thread(_make_folder, folder)
    busy = "Another process publishes to this folder"
    async with folder_lock(folder, wait_s=_WAIT_S, busy=busy, mode=PUBLIC_FILE_MODE):
        yield


def tile_path(level: int, index: int, width: int = TILE_WIDTH) -> str:
    """Return where C2SP tlog-tiles has a tile: `tile/0/x001/x234/067`, and `.p/WIDTH` below that for a partial one."""
    name, rest = f"{index % 1000:03}", index // 1000
    while rest:
        name, rest = f"x{rest % 1000:03}/{name}", rest // 1000
    return f"tile/{level}/{name}" + ("" if width == TILE_WIDTH else f".p/{width}")


async def publish(folder: Path, checkpoint: Checkpoint, read: ReadTiles) -> int:
    """Write the tiles that `folder` lacks, then the checkpoint; return how many; errors as of `EvidenceManager`.

    Full tiles under the checkpoint that is there never change: of them only those of another size are written again. Of
    all others the content is compared, since a publish that was killed may have left tiles of another log.
    """
    size, old, count = checkpoint.size, await asyncio.to_thread(_published, folder), 0
    await _require_same_log(old, checkpoint, read)
    unsure = _unsure(folder, old.size if old else 0, size)
    while batch := await asyncio.to_thread(lambda: list(islice(unsure, _TILES_AT_ONCE))):
        above = {(level + 1, index // TILE_WIDTH) for level, index, width in batch if width == TILE_WIDTH}
        tiles = await read([*((level, index) for level, index, _ in batch), *above])
        count += await asyncio.to_thread(_write_tiles, folder, batch, tiles)
    await asyncio.to_thread(_write_checkpoint, folder, checkpoint)
    return count


def _published(folder: Path) -> ParsedNote | None:
    try:
        return parse_note(_read(folder / "checkpoint").decode("utf-8", errors="replace"))
    except FileNotFoundError:
        return None


async def _require_same_log(old: ParsedNote | None, new: Checkpoint, read: ReadTiles) -> None:
    sizes = {new.size: new.root_hash}
    if old is not None:
        if old.origin != new.origin or old.size > new.size:
            raise LogMismatchError(
                f"The folder has {old.origin} at {old.size} events, and this log is {new.origin} at {new.size}: "
                "publish it to a folder of its own."
            )
        sizes[old.size] = old.root.hex()
    for size, root in sizes.items():
        if root_from(await read(tiles_for_root(size)), size).hex() != root:
            raise _does_not_agree(size)


def _does_not_agree(size: int) -> LogMismatchError:
    return LogMismatchError(
        f"The log at {size} events is not the one of its checkpoint: run `gateway-store evidence verify`."
    )


def _width(level: int, index: int, size: int) -> int:
    return min((size >> TILE_HEIGHT * level) - index * TILE_WIDTH, TILE_WIDTH)


def _unsure(folder: Path, published: int, size: int) -> Iterator[tuple[int, int, int]]:
    """Yield level, index and width of the tiles of a tree that are not full under what is published, or not whole."""
    level = 0
    while count := size >> TILE_HEIGHT * level:
        for index in range(-(-count // TILE_WIDTH)):
            width = _width(level, index, size)
            is_kept = index < published >> TILE_HEIGHT * (level + 1)
            if not is_kept or not _is_whole(folder / tile_path(level, index, width), width):
                yield level, index, width
        level += 1


def _is_whole(path: Path, width: int) -> bool:
    return path.is_file() and not path.is_symlink() and path.stat().st_size == width * HASH_BYTES


def _write_tiles(folder: Path, batch: Sequence[tuple[int, int, int]], tiles: TileHashes) -> int:
    """Write the tiles that differ, and return how many."""
    count = 0
    for level, index, width in batch:
        path, hashes = folder / tile_path(level, index, width), tiles.tile(level, index, width)
        _require_own(folder, path.parent)
        if width == TILE_WIDTH and row_root(hashes) != tiles.node(TILE_HEIGHT * (level + 1), index):
            raise LogMismatchError(
                f"Tile {index} of level {level} is not that of the tree: run `gateway-store evidence verify`."
            )
        if not _is_whole(path, width) or _read(path) != hashes:
            _write(path, hashes)
            count += 1
        if width == TILE_WIDTH:
            # Readers of an older checkpoint take the full tile in place of its first hashes.
            shutil.rmtree(path.with_name(f"{path.name}.p"), ignore_errors=True)
    return count


def _write_checkpoint(folder: Path, checkpoint: Checkpoint) -> None:
    size, edge = checkpoint.size, dict[tuple[int, int], bytes]()
    for level, index in tiles_for_root(size):
        edge[level, index] = _read(folder / tile_path(level, index, _width(level, index, size)))
    if root_from(TileHashes(edge), size).hex() != checkpoint.root_hash:
        raise _does_not_agree(size)
    _write(folder / "checkpoint", checkpoint.note.encode())


def _require_own(folder: Path, below: Path) -> None:
    # Who can write to the published folder may have put it there, to have another file of ours replaced or removed.
    for each in (below, *below.parents):
        if each == folder:
            return
        if each.is_symlink():
            raise OSError(ELOOP, "it is a link, which the log is not published through", str(each))


def _read(path: Path) -> bytes:
    with open_regular(path) as file:
        return file.read()


def _write(path: Path, data: bytes) -> None:
    _make_folder(path.parent)
    with partial(path, overwrite=True, follows=False) as written:
        written.write_bytes(data)


def _make_folder(folder: Path) -> None:
    if not folder.is_dir():
        _make_folder(folder.parent)
        folder.mkdir(exist_ok=True)
        sync(folder.parent)
