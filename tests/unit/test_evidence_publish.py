"""The published log: C2SP tlog-tiles in a folder, whole at every moment, and nothing else in it."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from hashlib import sha256
from pathlib import Path

import pytest

from agent_gateway_store.errors import InvalidEvidenceError, LogMismatchError
from agent_gateway_store.evidence.notes import parse_note
from agent_gateway_store.evidence.publish import publish, tile_path
from agent_gateway_store.evidence.tree import EMPTY_ROOT, TileHashes
from sealed_log import KEY, SealedLog, events

pytestmark = pytest.mark.unit


class Reader:
    """Reads tiles of a log; counts them, and fails when told to."""

    def __init__(self, log: SealedLog, *, failing_after: int | None = None) -> None:
        self.tiles, self.failing_after, self.read = dict(log.tiles), failing_after, 0

    async def __call__(self, names: Sequence[tuple[int, int]]) -> TileHashes:
        if self.failing_after is not None and self.read >= self.failing_after:
            raise ConnectionError
        self.read += len(names)
        return TileHashes({name: self.tiles[name] for name in names})


def published(folder: Path) -> list[str]:
    return sorted(str(each.relative_to(folder)) for each in folder.rglob("*") if each.is_file())


def monitor(folder: Path) -> tuple[int, bytes]:
    """A monitor written from C2SP tlog-tiles: reads every leaf and hashes the tree anew; returns what it verified."""
    note = parse_note((folder / "checkpoint").read_text())
    assert note.signed_by([KEY.verifier])
    leaves: list[bytes] = []
    for index in range(-(-note.size // 256)):
        width = min(256, note.size - index * 256)
        tile = folder / f"tile/0/{index:03}" if width == 256 else folder / f"tile/0/{index:03}.p/{width}"
        # C2SP: where a partial tile is gone, the full one is there.
        data = tile.read_bytes() if tile.exists() else (folder / f"tile/0/{index:03}").read_bytes()[: width * 32]
        leaves += [data[at : at + 32] for at in range(0, len(data), 32)]
    assert len(leaves) == note.size
    assert root_of(leaves) == note.root
    return note.size, note.root


def root_of(leaves: list[bytes]) -> bytes:
    if len(leaves) < 2:
        return leaves[0] if leaves else EMPTY_ROOT
    split = 1 << (len(leaves) - 1).bit_length() - 1
    return sha256(b"\1" + root_of(leaves[:split]) + root_of(leaves[split:])).digest()


@pytest.mark.parametrize(
    ("index", "width", "path"),
    [
        (0, 256, "tile/3/000"),
        (999, 256, "tile/3/999"),
        (1000, 256, "tile/3/x001/000"),
        (1234067, 256, "tile/3/x001/x234/067"),
        (1234067, 7, "tile/3/x001/x234/067.p/7"),
    ],
)
def test_paths_are_those_of_the_specification(index: int, width: int, path: str) -> None:
    assert tile_path(3, index, width) == path


async def test_the_tiles_of_70_000_events_are_those_of_the_specification(tmp_path: Path) -> None:
    """C2SP tlog-tiles gives this example."""
    log = SealedLog(leaves=70_000)
    count = await publish(tmp_path, log.checkpoint(), Reader(log))

    level_0 = [f"tile/0/{index:03}" for index in range(273)]
    assert published(tmp_path) == sorted(
        ["checkpoint", *level_0, "tile/0/273.p/112", "tile/1/000", "tile/1/001.p/17", "tile/2/000.p/1"]
    )
    assert count == 277
    assert monitor(tmp_path) == (70_000, bytes.fromhex(log.checkpoint().root_hash))
    # A large log is published every minute.
    log.leaves += log.leaves[:50]
    reader = Reader(log)
    await publish(tmp_path, log.checkpoint(), reader)
    assert reader.read < 20


@pytest.mark.parametrize("size", [0, 1, 255, 256, 257, 512, 600])
async def test_a_monitor_verifies_what_is_published(tmp_path: Path, size: int) -> None:
    log = SealedLog(leaves=size)
    await publish(tmp_path / "new" / "folder", log.checkpoint(), Reader(log))

    assert monitor(tmp_path / "new" / "folder")[0] == size


async def test_a_log_that_grew_is_published_by_its_new_tiles(tmp_path: Path) -> None:
    log = SealedLog(leaves=700)
    await publish(tmp_path, log.checkpoint(300), Reader(log))
    assert await publish(tmp_path, log.checkpoint(700), Reader(log)) == 3
    assert await publish(tmp_path, log.checkpoint(700), Reader(log)) == 0

    assert monitor(tmp_path)[0] == 700
    assert published(tmp_path) == [
        *("checkpoint", "tile/0/000", "tile/0/001", "tile/0/002.p/188", "tile/1/000.p/1", "tile/1/000.p/2"),
    ]


async def test_the_folder_is_whole_wherever_publishing_stops(tmp_path: Path) -> None:
    """The checkpoint comes last; what an older one needs stays until the full tile is there."""
    log = SealedLog(leaves=700)
    for failing_after in range(0, 12, 3):
        folder = tmp_path / str(failing_after)
        await publish(folder, log.checkpoint(300), Reader(log))
        with suppress(ConnectionError):
            await publish(folder, log.checkpoint(700), Reader(log, failing_after=failing_after))
        assert monitor(folder)[0] in (300, 700)

        await publish(folder, log.checkpoint(700), Reader(log))
        assert monitor(folder)[0] == 700


async def test_a_tile_that_was_cut_is_written_again(tmp_path: Path) -> None:
    """As a full disk or a copying tool leaves it."""
    log = SealedLog(leaves=300)
    await publish(tmp_path, log.checkpoint(), Reader(log))
    (tmp_path / "tile/0/000").write_bytes(b"cut")

    assert await publish(tmp_path, log.checkpoint(), Reader(log)) == 1
    assert monitor(tmp_path)[0] == 300


@pytest.mark.parametrize("last", [310, 900], ids=["shorter", "longer"])
@pytest.mark.parametrize("first", [300, None], ids=["published before", "never published"])
async def test_tiles_of_a_log_that_lost_its_end_are_written_again(tmp_path: Path, first: int | None, last: int) -> None:
    """Publishing was killed before its checkpoint, and then the database was restored from a backup and went on."""
    lost, log = SealedLog(leaves=900), SealedLog(leaves=300)
    log.leaves += [sha256(leaf).digest() for leaf in lost.leaves[300:last]]
    if first:
        await publish(tmp_path, lost.checkpoint(first), Reader(lost))
        before = (tmp_path / "checkpoint").read_bytes()
    await publish(tmp_path, lost.checkpoint(), Reader(lost))
    (tmp_path / "checkpoint").unlink()
    if first:
        (tmp_path / "checkpoint").write_bytes(before)
        assert monitor(tmp_path)[0] == first

    await publish(tmp_path, log.checkpoint(), Reader(log))
    assert monitor(tmp_path)[0] == last


async def test_a_wrong_tile_beyond_the_published_checkpoint_is_written_again(tmp_path: Path) -> None:
    """Of the right size, as a bad disk or a stranger leaves it; and so are the last tiles of the checkpoint."""
    log = SealedLog(leaves=700)
    await publish(tmp_path, log.checkpoint(300), Reader(log))
    (tmp_path / "tile/0/001").write_bytes(bytes(256 * 32))
    (tmp_path / "tile/0/001.p/44").write_bytes(bytes(44 * 32))

    assert await publish(tmp_path, log.checkpoint(300), Reader(log)) == 1
    assert monitor(tmp_path)[0] == 300
    assert await publish(tmp_path, log.checkpoint(), Reader(log)) == 3
    assert monitor(tmp_path)[0] == 700


async def test_a_tile_that_is_not_that_of_the_tree_gets_no_checkpoint(tmp_path: Path) -> None:
    """A leaf was changed in the database, and the hashes above it were not."""
    log = SealedLog(leaves=700)
    reader = Reader(log)
    reader.tiles[0, 1] = bytes(8192)

    with pytest.raises(LogMismatchError, match="evidence verify"):
        await publish(tmp_path, log.checkpoint(), reader)
    assert not (tmp_path / "checkpoint").exists()
    await publish(tmp_path, log.checkpoint(), Reader(log))
    assert monitor(tmp_path)[0] == 700


async def test_a_log_that_changes_while_it_is_published_gets_no_checkpoint(tmp_path: Path) -> None:
    log = SealedLog(leaves=300)
    reader = Reader(log)

    async def read(names: Sequence[tuple[int, int]]) -> TileHashes:
        found = await reader(names)
        reader.tiles[0, 1] = bytes(len(reader.tiles[0, 1]))
        return found

    with pytest.raises(LogMismatchError, match="evidence verify"):
        await publish(tmp_path, log.checkpoint(), read)
    assert not (tmp_path / "checkpoint").exists()


async def test_no_salt_and_no_event_is_published(tmp_path: Path) -> None:
    log = SealedLog(events(300))
    await publish(tmp_path, log.checkpoint(), Reader(log))
    everything = b"".join((tmp_path / name).read_bytes() for name in published(tmp_path))

    assert not any(salt in everything for salt in log.salts)
    assert not any(bytes.fromhex(event.content_hash or "") in everything for event in log.events)
    assert {name.split("/")[0] for name in published(tmp_path)} == {"checkpoint", "tile"}
    assert not (tmp_path / "tile/entries").exists()


async def test_a_log_with_another_past_is_not_published_over_it(tmp_path: Path) -> None:
    """A restored copy that went on, or another log: the folder keeps the evidence against it."""
    log = SealedLog(leaves=300)
    await publish(tmp_path, log.checkpoint(), Reader(log))
    for other in (SealedLog(leaves=200), SealedLog(events(9), leaves=400)):
        with pytest.raises(LogMismatchError):
            await publish(tmp_path, other.checkpoint(), Reader(other))
    with pytest.raises(LogMismatchError, match="a folder of its own"):
        await publish(tmp_path, log.checkpoint().model_copy(update={"origin": "another"}), Reader(log))

    assert monitor(tmp_path) == (300, bytes.fromhex(log.checkpoint().root_hash))


async def test_a_folder_with_another_file_of_that_name_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "checkpoint").write_bytes(b"\xff of something else")

    with pytest.raises(InvalidEvidenceError):
        await publish(tmp_path, SealedLog(leaves=1).checkpoint(), Reader(SealedLog(leaves=1)))
    assert (tmp_path / "checkpoint").read_bytes() == b"\xff of something else"


async def test_a_link_in_the_folder_is_replaced_and_what_it_leads_to_stays(tmp_path: Path) -> None:
    """Whoever can write to the folder names no file of the gateway's user for it to overwrite."""
    folder, other = tmp_path / "public", tmp_path / "other"
    other.write_text("mine")
    log = SealedLog(leaves=5)
    (folder / "tile/0/000.p").mkdir(parents=True)
    for name in ("tile/0/000.p/5", "checkpoint"):
        (folder / name).symlink_to(other if "tile" in name else tmp_path / "none")

    await publish(folder, log.checkpoint(), Reader(log))

    assert other.read_text() == "mine"
    assert not (tmp_path / "none").exists()
    assert not any(path.is_symlink() for path in folder.rglob("*"))
    assert monitor(folder)[0] == 5


async def test_nothing_is_published_through_a_linked_folder(tmp_path: Path) -> None:
    folder, other = tmp_path / "public", tmp_path / "other/000.p"
    other.mkdir(parents=True)
    (other / "5").write_text("mine")
    (folder / "tile").mkdir(parents=True)
    (folder / "tile/0").symlink_to(tmp_path / "other")
    log = SealedLog(leaves=256)

    for size in (5, 256):
        with pytest.raises(OSError, match="it is a link"):
            await publish(folder, log.checkpoint(size), Reader(log))

    assert (other / "5").read_text() == "mine"
    assert published(tmp_path / "other") == ["000.p/5"]
