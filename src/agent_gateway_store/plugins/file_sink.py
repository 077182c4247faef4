"""Sink `file-sink`: appends events as lines of JSON to a file, for an agent that reads it."""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic_settings import SettingsConfigDict

from agent_gateway_store.hooks import hookimpl
from agent_gateway_store.settings import EnvironmentSettings

if TYPE_CHECKING:
    from agent_gateway_store.models.audit import AuditEvent
    from agent_gateway_store.settings import StoreSettings

PREFIX = "AGENT_GATEWAY_STORE_FILE_SINK_"
# Bytes read at a time to find the last line end: longer than most events.
_BLOCK = 65_536
# Chosen: longer than a batch takes to be written, and less than a plugin may take.
_WAIT_S = 1.0
_POLL_S = 0.01


class FileSinkSettings(EnvironmentSettings):
    """Settings of the file sink, each from `AGENT_GATEWAY_STORE_FILE_SINK_<NAME>`.

    Attributes:
        path: File to append to; its folder must exist. None: the plugin does nothing.
    """

    model_config = SettingsConfigDict(env_prefix=PREFIX, frozen=True)

    path: Path | None = None


class FileSink:
    """Appends a batch and forces it to disk. The file can be renamed at any time, as logrotate does: the next is new.

    Args:
        path: The file, which nobody else writes. A new one is for its owner alone.

    Attributes:
        name: `file-sink`.
    """

    name = "file-sink"

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self._path = Path(path).expanduser()
        # A disk that hangs longer than a plugin may take: what is written late must not come behind what follows it.
        self._lock = threading.Lock()

    async def send(self, events: Sequence[AuditEvent]) -> None:
        """Append the events, behind the last whole line.

        Raises:
            OSError: The file cannot be written, or another process writes to it; it is as it was.
            ValueError: It is somebody else's file.
        """
        lines = "".join(f"{event.model_dump_json()}\n" for event in events).encode()
        with self._lock:
            append(self._path, lines, _repair)


def _repair(file: int) -> None:
    """Take away the part of a line that a writer left which was killed: its batch was not acknowledged.

    Raises:
        ValueError: The file ends in something else than the beginning of an event.
    """
    end = place = os.lseek(file, 0, os.SEEK_END)
    torn = b""
    while place and b"\n" not in torn:
        place, size = max(0, place - _BLOCK), min(_BLOCK, place)
        os.lseek(file, place, os.SEEK_SET)
        torn = os.read(file, size) + torn
    torn = torn.rpartition(b"\n")[2]
    if not torn:
        return
    if not torn.startswith(b"{"):
        raise ValueError("The file does not end in lines of JSON: name another one.")
    os.ftruncate(file, end - len(torn))
    os.fsync(file)


@hookimpl
def gateway_store_register_sinks(settings: StoreSettings) -> list[FileSink]:
    """Contribute the sink if its path is set."""
    path = FileSinkSettings().path
    return [] if path is None else [FileSink(path)]


@hookimpl
def gateway_store_plugin_settings() -> type[FileSinkSettings]:
    """Return the class of its settings."""
    return FileSinkSettings


def append(path: Path, data: bytes, repair: Callable[[int], None] | None = None) -> None:
    """Append all of `data` to a file and force it to disk, or leave the file as it was and raise OSError.

    A new file is for its owner alone. Other processes that append to it wait for a second, and raise OSError then: one
    that is frozen in the middle keeps its lock, so that it takes nothing of theirs away when it goes on.

    Args:
        repair: Called with the open file before.
    """
    is_new = not path.exists()
    # Windows would write a line end as two characters, which no signature is over.
    flags = (os.O_RDWR if repair else os.O_WRONLY) | os.O_CREAT | os.O_APPEND | getattr(os, "O_BINARY", 0)
    file = os.open(path, flags, 0o600)
    try:
        with _locked(file):
            if repair is not None:
                repair(file)
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


@contextmanager
def _locked(file: int) -> Iterator[None]:
    """Hold the lock of an open file; OSError if another process has it for longer than a second."""
    if sys.platform == "win32":
        yield
        return
    import fcntl

    deadline = time.monotonic() + _WAIT_S
    while True:
        try:
            # Of the file itself: its folder may be one that this user cannot write to.
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() >= deadline:
                raise OSError("Another process writes to the file: wait for it or end it.") from None
            time.sleep(_POLL_S)
            continue
        except OSError:
            pass  # a file system without locks
        break
    try:
        yield
    finally:
        # To close the file is not enough where a child, forked meanwhile, has it open as well.
        with suppress(OSError):
            fcntl.flock(file, fcntl.LOCK_UN)
