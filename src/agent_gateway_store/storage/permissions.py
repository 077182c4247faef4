"""Files and folders that nobody but their owner may read: databases, spools, lock files and exports."""

from __future__ import annotations

import os
import stat
from contextlib import suppress
from pathlib import Path

FILE_MODE, FOLDER_MODE = 0o600, 0o700


def create_file(path: Path) -> None:
    """Create an empty file for its owner alone.

    Raises:
        FileExistsError: It is there already.
        OSError: Its folder is not there, or cannot be written.
    """
    # Exclusive: closing a file that SQLite has open in this process would end the locks on it.
    os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, FILE_MODE))


def create_database_file(path: Path) -> None:
    """Create the file of a SQLite database unless it is there; SQLite's own files beside it get its mode.

    Where that is not possible SQLite says what is wrong.
    """
    with suppress(OSError):
        create_file(path)


def create_folder(path: Path) -> None:
    """Create a folder and those above it, as far as they are missing, for its owner alone."""
    missing = [each for each in (path, *path.parents) if not each.exists()]
    for each in reversed(missing):
        each.mkdir(FOLDER_MODE, exist_ok=True)


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
