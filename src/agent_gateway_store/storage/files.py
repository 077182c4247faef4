"""Files that nobody but their owner may read, and those of exports: formats, how they take their name, progress bar.

An export is written under another name in the same folder, forced to disk, and only then renamed.
"""

from __future__ import annotations

import gzip
import os
import secrets
import shutil
import stat
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from errno import EACCES, EINVAL, EISDIR, ENOENT, ENOTDIR
from pathlib import Path
from tempfile import TemporaryFile
from typing import IO, Literal, TypeVar

from agent_gateway_store._text import code_text
from agent_gateway_store.results.arrow import arrow

FILE_MODE, FOLDER_MODE = 0o600, 0o700
PUBLIC_FILE_MODE = 0o666
"""What other programs give a new file: the umask says who may do what with it."""


def create_file(path: Path, mode: int = FILE_MODE) -> None:
    """Create an empty file for its owner alone, or with another mode, of which the umask takes away."""
    # Exclusive: closing a file that SQLite has open in this process would end the locks on it.
    os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, mode))


def create_database_file(path: Path) -> None:
    """Create the file of a SQLite database, whose mode those beside it get; SQLite says what is wrong with it."""
    with suppress(OSError):
        create_file(path)


def is_empty(path: Path) -> bool:
    """True if the file is missing or has no bytes; False if this process may not look at it."""
    try:
        return path.stat().st_size == 0
    except OSError as exc:
        return exc.errno in (ENOENT, ENOTDIR)


def beside(path: Path, suffix: str) -> Path:
    """Return the path of the file that SQLite keeps beside a database, such as its `-wal`; links are followed."""
    real = Path(os.path.realpath(path))
    return real.with_name(real.name + suffix)


def has_log_of_another(path: Path) -> bool:
    """True if the `-wal` of a database is here and the database itself was moved away.

    SQLite would delete it when the next database is made. A new database has its first page before its `-wal`.
    """
    with suppress(OSError):
        return beside(path, "-wal").exists() and is_empty(path)
    return False


def open_regular(path: Path) -> IO[bytes]:
    """Open a file for reading; OSError for anything else, as a pipe, which never answers, or a device without end."""
    # Without O_NONBLOCK, to open a pipe waits for who writes to it. Judged once it is open, so that nobody swaps it.
    file = os.open(path, os.O_RDONLY | getattr(os, "O_BINARY", 0) | getattr(os, "O_NONBLOCK", 0))
    if stat.S_ISREG(os.fstat(file).st_mode):
        return os.fdopen(file, "rb")
    os.close(file)
    raise OSError(EINVAL, "it is not a regular file", str(path))


def check_place(path: Path, beside_it: Iterable[str]) -> None:
    """Raise what is wrong with the place of a SQLite file that is to be written or made; folders may be missing.

    `beside_it` holds what is added to its name for each other file.
    """
    if not path.is_absolute():
        raise FileNotFoundError(ENOENT, "this user has no home folder")
    for each in (path, *(beside(path, suffix) for suffix in beside_it)):
        with suppress(FileNotFoundError):
            if not stat.S_ISREG(each.stat().st_mode):
                raise IsADirectoryError(EISDIR, f"{code_text(each.name)} is not a file")
            if not os.access(each, os.W_OK):
                raise PermissionError(EACCES, f"{code_text(each.name)}: {os.strerror(EACCES)}")
    if not path.exists():
        folder = next(parent for parent in path.parents if parent.exists())
        # To ask for the rights is not enough: a disk may be read-only, and a file stand where a folder should.
        with TemporaryFile(dir=folder):
            pass


def file_id(path: Path) -> tuple[int, int]:
    """Return what tells this file from one that is put in its place."""
    found = path.stat()
    return found.st_dev, found.st_ino


def is_gone(path: Path, opened: tuple[int, int] | None) -> bool:
    """True if the file with this id was removed or replaced; False if it is there, or we have no right to see it."""
    try:
        return file_id(path) != opened
    except OSError as exc:
        return exc.errno in (ENOENT, ENOTDIR)


def create_folder(path: Path) -> None:
    """Create a folder and those above it, as far as they are missing, for its owner alone."""
    missing = [each for each in (path, *path.parents) if not each.exists()]
    for each in reversed(missing):
        each.mkdir(FOLDER_MODE, exist_ok=True)


def is_of_another_user(path: Path) -> bool:
    """True if a file is there and belongs to another user; False also where files have no owner, as on Windows."""
    try:
        return os.name != "nt" and path.stat().st_uid != os.geteuid()
    except OSError:
        return False


def open_to_others(path: Path) -> str | None:
    """Return the mode of a file or folder of this user, as in `0644`, if others may do anything with it; else None."""
    try:
        found = path.stat()
    except OSError:
        return None
    # Windows has no such modes; what belongs to the system is not ours to judge.
    if os.name == "nt" or found.st_uid != os.geteuid() or not found.st_mode & (stat.S_IRWXG | stat.S_IRWXO):
        return None
    return f"{stat.S_IMODE(found.st_mode):04o}"


T = TypeVar("T")

Format = Literal["jsonl", "csv", "parquet"]
Compression = Literal["gzip", "zstd"]

_FORMATS: dict[str, Format] = {".jsonl": "jsonl", ".ndjson": "jsonl", ".csv": "csv", ".parquet": "parquet"}
COMPRESSIONS: dict[str, Compression] = {".gz": "gzip", ".zst": "zstd"}
"""By the suffix of a file."""

# The default of the gzip command.
_GZIP_LEVEL = 6
# Chosen: rows between two reports of progress.
_REPORT_ROWS = 100
# The limit of most file systems for one name is 255 bytes; the rest is for what `_beside` adds.
_NAME_BYTES = 200


def format_of(
    path: Path, given: str | None, compression: str | None, *, default: Format | None = None
) -> tuple[Format, Compression | None]:
    """Return the format and compression that the arguments, else the suffixes of `path`, name; else `default`."""
    packed = COMPRESSIONS.get(path.suffix.lower())
    if compression is not None and compression not in COMPRESSIONS.values():
        raise ValueError(f'compression must be "gzip" or "zstd", not {compression!r}.')
    if given is None:
        unpacked = path.with_suffix("") if packed else path
        given = _FORMATS.get(unpacked.suffix.lower(), default)
        if given is None:
            raise ValueError(
                f"The name {path.name!r} does not say the format: let it end in .jsonl, .csv or .parquet (and .gz or "
                '.zst), or give the format, "jsonl", "csv" or "parquet".'
            )
    if given not in ("jsonl", "csv", "parquet"):
        raise ValueError(f'format must be "jsonl", "csv" or "parquet", not {given!r}.')
    return given, compression or packed  # type: ignore[return-value]


def export_format(
    path: Path, given: str | None, compression: str | None, *, partition_by: str | None, raw: bool
) -> tuple[Format, Compression | None]:
    """Return the format and compression of an export; raise ValueError where its arguments do not fit together."""
    if partition_by not in (None, "day"):
        raise ValueError(f'partition_by must be "day" or None, not {partition_by!r}.')
    by_day = partition_by == "day"
    kind, packed = format_of(path, given, compression, default="parquet" if by_day else None)
    if by_day and kind != "parquet":
        raise ValueError('partition_by="day" needs format="parquet".')
    if raw and kind != "csv":
        raise ValueError('raw=True is for format="csv": the other formats never alter data.')
    return kind, packed


@contextmanager
def partial(path: Path, *, overwrite: bool, as_folder: bool = False, follows: bool = True) -> Iterator[Path]:
    """Yield a name beside `path` for a file or folder; at the end that becomes `path`, at once and complete.

    If the body raises, the file or folder is removed. If the process is killed it stays as `.<name>.<random>.partial`,
    never under `path`. A link stays, and what it leads to is replaced; without `follows`, the link itself.

    Raises:
        FileExistsError: `path` exists, and `overwrite` is False; or it is not a regular file, nor, with `as_folder`, a
            dataset of days.
        FileNotFoundError: The folder of `path` does not exist.
    """
    if not overwrite and os.path.lexists(path):
        raise _exists(path)
    is_link = not follows and path.is_symlink()
    if not is_link and not _is_replaceable(path, as_folder=as_folder):
        raise FileExistsError(f"{path} is not a file or dataset of an export: choose another name.")
    if follows:
        path = Path(os.path.realpath(path))
    if not path.parent.is_dir():
        raise FileNotFoundError(f"There is no folder {path.parent}: make it first.")
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


def _is_replaceable(path: Path, *, as_folder: bool) -> bool:
    # A device or a pipe would be gone, and so would a folder with all that is in it.
    if as_folder and path.is_dir():
        return all(each.is_dir() and each.name.startswith("day=") for each in path.iterdir())
    return path.is_file() or not path.exists()


def _beside(path: Path, suffix: str) -> Path:
    name = path.name
    # By whole characters, as the locale has them.
    while len(os.fsencode(name)) > _NAME_BYTES:
        name = name[:-1]
    return path.with_name(f".{name}.{secrets.token_hex(6)}.{suffix}")


def _place_file(written: Path, path: Path, *, overwrite: bool) -> None:
    sync(written)
    if overwrite:
        written.replace(path)
        return
    try:
        # Unlike a rename, a link fails if another process has made the file meanwhile.
        path.hardlink_to(written)
    except FileExistsError:
        raise _exists(path) from None
    except OSError:
        # A file system without hard links.
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
    """Force the file at `path` to disk, or the names in a folder where the system can do that."""
    # Windows opens no folders, and forces to disk only what may be written.
    with suppress(OSError) if path.is_dir() else nullcontext():
        descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _exists(path: Path) -> FileExistsError:
    return FileExistsError(
        f"{path} exists already: choose another name, or pass overwrite=True (`--overwrite` on the command line)."
    )


@contextmanager
def opened(path: Path, compression: Compression | None) -> Iterator[Callable[[bytes], object]]:
    """Open a new file, for its owner alone, and yield the function that writes to it."""
    pa = arrow("Compressing by zstd") if compression == "zstd" else None
    create_file(path)
    if pa is not None:
        with pa.OSFile(str(path), "wb") as file, pa.CompressedOutputStream(file, "zstd") as stream:
            yield stream.write
    elif compression == "gzip":
        # No time in the header, so that the same events give the same file.
        with path.open("wb") as file, gzip.GzipFile("", "wb", _GZIP_LEVEL, file, mtime=0) as packed:
            yield packed.write
    else:
        with path.open("wb") as file:
            yield file.write


@contextmanager
def progress_bar(progress: bool | Callable[[int], None], text: str) -> Iterator[Callable[[int], None]]:
    """Yield the function that receives the number of rows done so far, from any thread.

    It moves a progress bar (True), is the caller's own, or does nothing (False).
    """
    if callable(progress) or not progress:
        yield progress if callable(progress) else lambda _rows: None
        return
    from rich.console import Console
    from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}", markup=False),
        TextColumn("{task.completed:,} rows"),
        TextColumn("{task.fields[rate]}", markup=False),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=Console(file=sys.stderr), transient=False) as bar:
        task = bar.add_task(text, total=None, rate="")

        def report(rows: int) -> None:
            elapsed = bar.tasks[0].elapsed or 0.0
            bar.update(task, completed=rows, rate=f"{rows / elapsed:,.0f} rows/s" if elapsed else "")

        yield report


def counted(items: Iterable[T], report: Callable[[int], None]) -> Iterator[T]:
    """Yield `items`, and report their number every hundred items and at the end."""
    number = 0
    for number, item in enumerate(items, start=1):
        yield item
        if not number % _REPORT_ROWS:
            report(number)
    report(number)
