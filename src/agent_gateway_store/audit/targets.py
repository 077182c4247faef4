"""Where an export is written: under another name in the same folder, on disk, and only then under its own."""

from __future__ import annotations

import gzip
import io
import os
import secrets
import shutil
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any, Literal

from agent_gateway_store.results.arrow import arrow

__all__ = ["Compression", "Format", "format_of", "opened", "partial", "read_opened", "sync"]

Format = Literal["jsonl", "csv", "parquet"]
Compression = Literal["gzip", "zstd"]

_FORMATS: dict[str, Format] = {".jsonl": "jsonl", ".ndjson": "jsonl", ".csv": "csv", ".parquet": "parquet"}
_COMPRESSIONS: dict[str, Compression] = {".gz": "gzip", ".zst": "zstd"}
_GZIP_LEVEL = 6


def format_of(
    path: Path, given: str | None, compression: str | None, *, default: Format | None = None
) -> tuple[Format, Compression | None]:
    """Return the format and compression that the arguments or else the suffixes of `path` name.

    With neither, it is `default`.

    Raises:
        ValueError: Neither names one, or there is no such format or compression.
    """
    suffixes = [suffix.lower() for suffix in path.suffixes]
    packed = _COMPRESSIONS.get(suffixes[-1]) if suffixes else None
    if compression is not None and compression not in _COMPRESSIONS.values():
        raise ValueError(f'compression must be "gzip" or "zstd", not {compression!r}.')
    if given is None:
        last = suffixes[-2:-1] if packed else suffixes[-1:]
        given = _FORMATS.get(last[0], default) if last else default
        if given is None:
            raise ValueError(
                f"The name {path.name!r} tells no format: let it end in .jsonl, .csv or .parquet (and .gz or .zst), "
                'or give format="jsonl", "csv" or "parquet".'
            )
    if given not in ("jsonl", "csv", "parquet"):
        raise ValueError(f'format must be "jsonl", "csv" or "parquet", not {given!r}.')
    return given, compression or packed  # type: ignore[return-value]


@contextmanager
def partial(path: Path, *, overwrite: bool) -> Iterator[Path]:
    """Give a name beside `path` to write a file or a folder under; at the end it becomes `path`, at once and whole.

    If the body raises, what was written is removed. A process that is killed leaves it behind as
    `.<name>.<random>.partial`, never under `path`.

    Raises:
        FileExistsError: There is something at `path`, and `overwrite` is False.
        FileNotFoundError: There is no folder to write to.
    """
    if not path.parent.is_dir():
        raise FileNotFoundError(f"There is no folder {path.parent}: make it first.")
    if not overwrite and os.path.lexists(path):
        raise _exists(path)
    written = _beside(path, "partial")
    try:
        yield written
        if written.is_dir():
            _place_folder(written, path, overwrite=overwrite)
        else:
            _place_file(written, path, overwrite=overwrite)
        sync(path.parent)
    except BaseException:
        if written.is_dir():
            shutil.rmtree(written, ignore_errors=True)
        else:
            written.unlink(missing_ok=True)
        raise


def _beside(path: Path, suffix: str) -> Path:
    # Within what a file system takes for one name, 255 bytes.
    name = path.name.encode()[:200].decode("utf-8", "ignore")
    return path.with_name(f".{name}.{secrets.token_hex(6)}.{suffix}")


def _place_file(written: Path, path: Path, *, overwrite: bool) -> None:
    sync(written)
    if overwrite:
        written.replace(path)
        return
    try:
        # Unlike a rename this fails if somebody else was faster.
        path.hardlink_to(written)
    except FileExistsError:
        raise _exists(path) from None
    except OSError:  # a file system without links
        written.rename(path)
    else:
        written.unlink()


def _place_folder(written: Path, path: Path, *, overwrite: bool) -> None:
    sync(written)
    old = None
    if overwrite and os.path.lexists(path):
        old = _beside(path, "old")
        path.rename(old)
    try:
        written.rename(path)
    except OSError:
        if old is not None:
            old.rename(path)
        raise
    if old is not None:
        shutil.rmtree(old) if old.is_dir() and not old.is_symlink() else old.unlink()


def sync(path: Path) -> None:
    """Have what is at `path` written to disk; a folder's names too, where the system can."""
    if path.is_dir():
        with suppress(OSError):
            _fsync(path)
        return
    _fsync(path)


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _exists(path: Path) -> FileExistsError:
    return FileExistsError(f"{path} is there already: choose another name, or overwrite it on purpose.")


@contextmanager
def opened(path: Path, compression: Compression | None) -> Iterator[Callable[[bytes], object]]:
    """Open a new file and give what writes to it.

    Raises:
        MissingExtraError: zstd, and pyarrow is not installed.
    """
    if compression == "zstd":
        pa = arrow("Compressing by zstd")
        with pa.OSFile(str(path), "wb") as file, pa.CompressedOutputStream(file, "zstd") as stream:
            yield stream.write
    elif compression == "gzip":
        # No time in the head, so that the same events give the same file.
        with path.open("xb") as file, gzip.GzipFile("", "wb", _GZIP_LEVEL, file, mtime=0) as packed:
            yield packed.write
    else:
        with path.open("xb") as file:
            yield file.write


@contextmanager
def read_opened(path: Path) -> Iterator[IO[bytes]]:
    """Open a file for reading, unpacked if its suffix says so.

    Raises:
        ValueError: It cannot be unpacked; also while it is read.
        MissingExtraError: zstd, and pyarrow is not installed.
    """
    packed = _COMPRESSIONS.get(path.suffix.lower())
    if packed is None:
        with path.open("rb") as plain:
            yield plain
        return
    try:
        with _unpacked(path, packed) as file:
            yield file
    except (EOFError, zlib.error, OSError) as exc:
        if getattr(exc, "errno", None) is not None:  # the system's word, not the unpacker's
            raise
        raise ValueError(f"{path} cannot be unpacked to its end: check that the file is whole.") from exc


@contextmanager
def _unpacked(path: Path, packed: Compression) -> Iterator[Any]:
    if packed == "gzip":
        with gzip.open(path, "rb") as file:
            yield file
        return
    pa = arrow("Reading zstd")
    with pa.OSFile(str(path), "rb") as whole, pa.CompressedInputStream(whole, "zstd") as stream:
        yield io.BufferedReader(stream)
