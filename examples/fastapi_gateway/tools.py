"""The tools: real work on the files of one sandbox folder."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from agent_gateway_store import ToolCall

__all__ = ["BoundTool", "InvalidArgumentsError", "SandboxError", "ToolError", "UnknownToolError", "bind", "risk_of"]

_MAX_FILE_BYTES = 1_000_000
_MAX_ENTRIES = 1_000


class ToolError(Exception):
    """The tool ran and could not do its work; the text is one sentence."""


class UnknownToolError(ToolError):
    """There is no such tool."""


class InvalidArgumentsError(ToolError):
    """The arguments do not fit the tool."""


class SandboxError(ToolError):
    """The path leads out of the sandbox."""


class PathArguments(BaseModel):
    """A file, by its path in the sandbox."""

    model_config = ConfigDict(extra="forbid", strict=True, hide_input_in_errors=True)
    path: str = Field(min_length=1, max_length=1_000)


class FolderArguments(PathArguments):
    """A folder; by default the sandbox itself."""

    path: str = Field(default=".", min_length=1, max_length=1_000)


class WriteArguments(PathArguments):
    """A file and what to put there."""

    content: str = Field(max_length=_MAX_FILE_BYTES)


def _list_files(path: Path, _: FolderArguments) -> list[dict[str, Any]]:
    entries = sorted(path.iterdir())[:_MAX_ENTRIES]
    return [
        {
            "name": entry.name.encode("utf-8", "replace").decode(),
            "kind": "folder" if entry.is_dir() else "file",
            "bytes": entry.lstat().st_size,
        }
        for entry in entries
    ]


def _read_file(path: Path, _: PathArguments) -> str:
    if _size(path) > _MAX_FILE_BYTES:
        raise ToolError(f"The file is larger than {_MAX_FILE_BYTES} bytes.")
    return path.read_text(encoding="utf-8", errors="replace")


def _hash_file(path: Path, _: PathArguments) -> dict[str, Any]:
    size = _size(path)
    with path.open("rb") as file:
        return {"sha256": hashlib.file_digest(file, "sha256").hexdigest(), "bytes": size}


def _write_file(path: Path, arguments: WriteArguments) -> dict[str, Any]:
    return {"bytes": path.write_bytes(arguments.content.encode())}


def _delete_file(path: Path, _: PathArguments) -> dict[str, Any]:
    size = _size(path)
    path.unlink()
    return {"deleted": True, "bytes": size}


def _size(path: Path) -> int:
    if not path.is_file():
        raise ToolError("There is no such file.")
    return path.stat().st_size


A = TypeVar("A", bound=PathArguments)


@dataclass(frozen=True)
class Tool(Generic[A]):
    """One tool: what it takes, what it does, and how much harm it can do (0 to 1)."""

    arguments: type[A]
    run: Callable[[Path, A], Any]
    risk: float
    labels: tuple[str, ...]


_TOOLS: dict[tuple[str, str], Tool[Any]] = {
    ("files", "list_files"): Tool(FolderArguments, _list_files, 0.1, ("READ",)),
    ("files", "read_file"): Tool(PathArguments, _read_file, 0.2, ("READ",)),
    ("files", "hash_file"): Tool(PathArguments, _hash_file, 0.1, ("READ",)),
    ("files", "write_file"): Tool(WriteArguments, _write_file, 0.6, ("WRITE",)),
    ("files", "delete_file"): Tool(PathArguments, _delete_file, 0.9, ("WRITE", "DESTRUCTIVE")),
}


def risk_of(call: ToolCall) -> tuple[float, tuple[str, ...]]:
    """Return the score and the labels of a call; what is not known counts as the worst."""
    tool = _TOOLS.get((call.server, call.tool))
    return (tool.risk, tool.labels) if tool else (1.0, ("UNKNOWN_TOOL",))


@dataclass(frozen=True)
class BoundTool:
    """A tool with checked arguments, ready to run. Blocking: call `run` in a thread."""

    tool: Tool[Any]
    path: Path
    arguments: PathArguments

    def run(self) -> Any:
        """Do the work.

        Raises:
            ToolError: It could not be done.
        """
        try:
            return self.tool.run(self.path, self.arguments)
        except OSError as exc:
            raise ToolError(f"The tool failed: {exc.strerror or type(exc).__name__}.") from exc


def bind(sandbox: Path, call: ToolCall) -> BoundTool:
    """Find the tool of `call` and check its arguments. Runs nothing.

    Raises:
        UnknownToolError: There is none.
        InvalidArgumentsError: They do not fit.
        SandboxError: The path leads out of `sandbox`.
    """
    tool = _TOOLS.get((call.server, call.tool))
    if tool is None:
        raise UnknownToolError(f"There is no tool {call.server}/{call.tool}.")
    try:
        arguments = tool.arguments.model_validate(call.arguments)
    except ValidationError as exc:
        error = exc.errors()[0]
        where = ".".join(map(str, error["loc"]))
        raise InvalidArgumentsError(f"The argument {where} does not fit: {error['msg']}.") from None
    return BoundTool(tool, _inside(sandbox, arguments.path), arguments)


def _inside(sandbox: Path, path: str) -> Path:
    root = sandbox.resolve()
    try:
        resolved = (root / path).resolve()
    except (OSError, RuntimeError, ValueError):
        raise SandboxError("The path cannot be followed: name a file in the sandbox.") from None
    if not resolved.is_relative_to(root):
        raise SandboxError("The path leads out of the sandbox: name a file in it.")
    return resolved
