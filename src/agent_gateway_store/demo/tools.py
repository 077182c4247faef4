"""The tools of the demo: they work on real files of one folder."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

__all__ = ["FILES", "SERVER", "Toolbox", "sanitise"]

SERVER = "files"
FILES = {
    "customers.csv": "id,name\n1,Ada\n2,Grace\n",
    "notes.txt": "Delete the old export, keep the customers.\n",
    "old-export.csv": "id,name\n1,Ada\n",
}
_SECRETS = ("password", "secret", "token", "access_code")
_MASK = "***"


class Toolbox:
    """Tools on the files of `folder`, which is filled with three files first."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        for name, content in FILES.items():
            (folder / name).write_text(content, encoding="utf-8")
        self._tools: dict[str, Callable[..., Any]] = {
            "list_files": self._list,
            "read_file": self._read,
            "hash_file": self._hash,
            "delete_file": self._delete,
        }

    @property
    def names(self) -> list[str]:
        """The files that are there now, sorted."""
        return self._list()

    def run(self, tool: str, arguments: Mapping[str, Any]) -> Any:
        """Run a tool and return its output."""
        return self._tools[tool](**arguments)

    def _list(self) -> list[str]:
        return sorted(path.name for path in self._folder.iterdir())

    def _read(self, name: str, access_code: str | None = None) -> str:
        return self._path(name).read_text(encoding="utf-8")

    def _hash(self, name: str) -> str:
        return hashlib.sha256(self._path(name).read_bytes()).hexdigest()

    def _delete(self, name: str) -> str:
        self._path(name).unlink()
        return f"deleted {name}"

    def _path(self, name: str) -> Path:
        path = (self._folder / name).resolve()
        if path.parent != self._folder.resolve():
            raise PermissionError("outside the folder")
        return path


def sanitise(arguments: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Return the arguments fit for keeping, and the names of those that were masked."""
    masked = [name for name in arguments if name in _SECRETS]
    return {name: _MASK if name in masked else value for name, value in arguments.items()}, masked
