"""The files of exports: what is there already stays, whenever it came."""

from __future__ import annotations

import fcntl
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

import agent_gateway_store
from agent_gateway_store.storage.files import Compression, opened, partial

pytestmark = pytest.mark.unit


def test_a_file_that_came_meanwhile_is_not_replaced(tmp_path: Path) -> None:
    """Not even one that another process put there while the export was written; nothing of the export is left."""
    target = tmp_path / "out.jsonl"

    def export() -> None:
        with partial(target, overwrite=False) as written:
            written.write_text("ours")
            target.write_text("theirs")

    with pytest.raises(FileExistsError, match="choose another name"):
        export()
    assert target.read_text() == "theirs"
    assert list(tmp_path.iterdir()) == [target]


@pytest.mark.skipif(sys.platform in ("darwin", "win32"), reason="names are Unicode there")
def test_a_name_that_is_no_utf_8_is_a_name(tmp_path: Path) -> None:
    """As of a file that came from an older system."""
    target = tmp_path / os.fsdecode(b"caf\xe9.jsonl")
    with partial(target, overwrite=False) as written:
        written.write_text("ours")

    assert [os.fsencode(each.name) for each in tmp_path.iterdir()] == [b"caf\xe9.jsonl"]


@pytest.mark.skipif(sys.platform in ("darwin", "win32"), reason="names are Unicode there")
def test_a_name_that_the_locale_lacks_is_a_name(tmp_path: Path) -> None:
    code = (
        "import pathlib, sys; from agent_gateway_store.storage.files import partial\n"
        "with partial(pathlib.Path(sys.argv[1]), overwrite=False) as written: written.write_text('ours')"
    )
    source = str(Path(agent_gateway_store.__file__).parents[1])
    plain = {"PYTHONPATH": source, "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    target = tmp_path / ("é" * 125 + ".csv")
    subprocess.run([sys.executable, "-c", code, target], env=plain, check=True, timeout=60)

    assert list(tmp_path.iterdir()) == [target]


@pytest.mark.parametrize("kind", ["pipe", "device", "folder"])
@pytest.mark.parametrize("by_link", [False, True])
def test_what_is_no_regular_file_is_not_replaced(tmp_path: Path, kind: str, by_link: bool) -> None:
    """Not even on purpose: `/dev/null` would be a file from then on, and a home folder would be gone."""
    target = tmp_path / "there"
    if kind == "device":
        target = Path(os.devnull)
    elif kind == "pipe":
        os.mkfifo(target)
    else:
        (target / "sub").mkdir(parents=True)
    named = tmp_path / "link" if by_link else target
    if by_link:
        named.symlink_to(target)
    before = target.stat()
    for as_folder in (False, True):
        with (
            pytest.raises(FileExistsError, match="choose another name"),
            partial(named, overwrite=True, as_folder=as_folder),
        ):
            pass

    assert target.stat().st_mode == before.st_mode


def test_a_link_stays_and_its_file_is_replaced(tmp_path: Path) -> None:
    """As a shell does by `>`: whoever reads the other name finds the export."""
    folder, link = tmp_path / "real", tmp_path / "out.jsonl"
    folder.mkdir()
    (folder / "file.jsonl").write_text("old")
    for target in ("real/file.jsonl", "real/new.jsonl"):
        link.unlink(missing_ok=True)
        link.symlink_to(target)
        with partial(link, overwrite=True) as written, opened(written, None) as write:
            write(b"new")

        assert link.is_symlink()
        assert (tmp_path / target).read_text() == "new"
    assert sorted(each.name for each in folder.iterdir()) == ["file.jsonl", "new.jsonl"]


@pytest.mark.parametrize("compression", [None, "gzip", "zstd"])
def test_a_file_is_for_its_owner_alone(tmp_path: Path, compression: Compression | None) -> None:
    """Whatever the umask allows, and from its first moment."""
    umask = os.umask(0)
    try:
        with partial(tmp_path / "out", overwrite=False) as written, opened(written, compression) as write:
            assert stat.S_IMODE(written.stat().st_mode) == 0o600
            write(b"event")
    finally:
        os.umask(umask)

    assert stat.S_IMODE((tmp_path / "out").stat().st_mode) == 0o600


def test_it_works_where_only_a_writable_file_can_be_forced_to_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on Windows, which opens no folders either."""
    forced, fsync = [], os.fsync

    def as_on_windows(descriptor: int) -> None:
        if fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY:
            raise OSError(9, "Bad file descriptor")
        forced.append(descriptor)
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", as_on_windows)
    with partial(tmp_path / "out.jsonl", overwrite=False) as written, opened(written, None) as write:
        write(b"event")

    assert forced
    assert (tmp_path / "out.jsonl").read_bytes() == b"event"
