"""Appending to a file so that it stays, or not at all."""

from __future__ import annotations

import os
from pathlib import Path


def append(path: Path, data: bytes) -> None:
    """Append all of `data` to a file and force it to disk, or leave the file as it was and raise OSError.

    A new file is for its owner alone.
    """
    is_new = not path.exists()
    # Windows would write a line end as two characters, which no signature is over.
    flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | getattr(os, "O_BINARY", 0)
    file = os.open(path, flags, 0o600)
    try:
        size = os.fstat(file).st_size
        if os.write(file, data) < len(data):
            # A full disk takes a part, behind which the next one could not be read.
            os.ftruncate(file, size)
            raise OSError("The disk is full: nothing was written.")
        os.fsync(file)
    finally:
        os.close(file)
    if is_new and hasattr(os, "O_DIRECTORY"):
        # The file's name is on disk only when its folder is.
        folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
