"""Plugin `witness-file`: keeps each checkpoint of the sealed log in a file outside of the database."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import AliasChoices, Field
from pydantic_settings import SettingsConfigDict

from agent_gateway_store.hooks import hookimpl
from agent_gateway_store.plugins.file_sink import append
from agent_gateway_store.settings import EnvironmentSettings

if TYPE_CHECKING:
    from agent_gateway_store.models.evidence import Checkpoint

NAME = "WITNESS_FILE_PATH"
PREFIX = "AGENT_GATEWAY_STORE_"


class WitnessFileSettings(EnvironmentSettings):
    """The setting `WITNESS_FILE_PATH`, also read with the prefix `AGENT_GATEWAY_STORE_`, which wins.

    Attributes:
        path: File to append to; its folder must exist. None: the plugin does nothing.
    """

    model_config = SettingsConfigDict(env_prefix=f"{PREFIX}WITNESS_FILE_", frozen=True)

    path: Path | None = Field(default=None, validation_alias=AliasChoices(f"{PREFIX}{NAME}", NAME))


@hookimpl
def gateway_store_checkpoint(checkpoint: Checkpoint) -> None:
    """Append the note and a blank line to the file, and force it to disk. A new file is for its owner alone."""
    path = WitnessFileSettings().path
    if path is not None:
        append(path.expanduser(), f"{checkpoint.note}\n".encode())


@hookimpl
def gateway_store_plugin_settings() -> type[WitnessFileSettings]:
    """Return the class of its settings."""
    return WitnessFileSettings
