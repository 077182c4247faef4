"""The gateway's own settings; those of the store are `agent_gateway_store.StoreSettings`."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field
from pydantic_settings import BaseSettings, SettingsConfigDict

__all__ = ["GatewaySettings"]


class GatewaySettings(BaseSettings):
    """Read from the environment, each name with the prefix `GATEWAY_`.

    Attributes:
        policies: YAML file that says which role may call what.
        sandbox: Folder that the tools work in; made at start-up if it is missing.
        tool_timeout_seconds: Longest run of one tool.
        host: Address to listen on.
        port: Port to listen on; 0 takes a free one.
    """

    model_config = SettingsConfigDict(env_prefix="GATEWAY_", extra="ignore", hide_input_in_errors=True)

    policies: Path = Path(__file__).resolve().parents[1] / "policies" / "default.yaml"
    sandbox: Path = Path("sandbox")
    tool_timeout_seconds: float = Field(default=10, gt=0)
    host: str = "127.0.0.1"
    port: int = Field(default=8000, ge=0, le=65535)
