"""Appends a line of JSON to a file for every notice."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic_settings import BaseSettings, SettingsConfigDict

from agent_gateway_store import Notice, hookimpl

if TYPE_CHECKING:
    import typer


class NotifyFileSettings(BaseSettings):
    """What can be set. `gateway-store plugins list` shows how it stands.

    Attributes:
        path: The file (`NOTIFY_FILE_PATH`); None switches the notifier off.
    """

    model_config = SettingsConfigDict(env_prefix="NOTIFY_FILE_")

    path: Path | None = None


class FileNotifier:
    """Appends to a file. Raises OSError if it cannot; then the store tries again later."""

    name = "notify-file"

    def __init__(self, path: Path) -> None:
        self._path = path

    async def notify_pending(self, notice: Notice) -> None:
        """Somebody must decide."""
        self._append(notice)

    async def notify_decision(self, notice: Notice) -> None:
        """It was decided, cancelled, or has expired."""
        self._append(notice)

    def _append(self, notice: Notice) -> None:
        # Blocking is no harm: every notifier has a thread of its own.
        with self._path.open("a", encoding="utf-8") as file:
            file.write(f"{notice.model_dump_json()}\n")


@hookimpl
def gateway_store_plugin_settings() -> type[NotifyFileSettings]:
    """Tell what can be set."""
    return NotifyFileSettings


@hookimpl
def gateway_store_register_notifiers() -> list[FileNotifier]:
    """Contribute the notifier, if it is switched on."""
    path = NotifyFileSettings().path
    return [FileNotifier(path)] if path else []


@hookimpl
def gateway_store_register_commands(app: typer.Typer) -> None:
    """Add the command `gateway-store notices`."""

    @app.command()
    def notices() -> None:
        """Show what the notifier has written."""
        path = NotifyFileSettings().path
        for line in path.read_text(encoding="utf-8").splitlines() if path else ():
            notice = json.loads(line)
            print(notice["event"], notice["status"], ascii(notice["tool_call"]["tool"]), notice["approval_id"])
