"""Policy files, as far as the store needs them: roles and their trust levels; rules are checked for their shape."""

from __future__ import annotations

from pathlib import Path

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from agent_gateway_store.cli.errors import CommandError, describe_validation
from agent_gateway_store.models.keys import TrustLevel

_EXAMPLE = "see examples/policies/default.yaml"


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", hide_input_in_errors=True)


class _Rule(_Part):
    server: str
    tool: str
    reason: str = ""


class _Role(_Part):
    trust_level: TrustLevel
    allow: list[_Rule] = []
    require_approval: list[_Rule] = []
    deny: list[_Rule] = []

    @field_validator("trust_level", mode="before")
    @classmethod
    def _by_name(cls, value: object) -> object:
        if not isinstance(value, str) or value not in TrustLevel.__members__:
            raise ValueError(f"must be one of {', '.join(TrustLevel.__members__)}")
        return TrustLevel[value]


class PolicyFile(_Part):
    """A policy file: what each role may do, and its trust level."""

    version: str | int
    roles: dict[str, _Role] = Field(min_length=1)


def read_policies(path: Path) -> dict[str, TrustLevel]:
    """Return the trust level of every role in a policy file. Raises CommandError, which says where it is wrong."""
    try:
        document = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as exc:
        raise CommandError(f"{path.name} cannot be read: {exc.strerror or type(exc).__name__}.") from exc
    except UnicodeDecodeError as exc:
        raise CommandError(f"{path.name} is not UTF-8 text: save it as UTF-8 YAML; {_EXAMPLE}.") from exc
    except (yaml.YAMLError, RecursionError, ValueError) as exc:
        mark = getattr(exc, "problem_mark", None)
        where = f" at line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        raise CommandError(f"{path.name} is not YAML{where}: correct it; {_EXAMPLE}.") from exc
    if not isinstance(document, dict):
        raise CommandError(f"{path.name} is not a policy file: it holds no `version` and `roles`; {_EXAMPLE}.")
    try:
        policies = PolicyFile.model_validate(document)
    except ValidationError as exc:
        raise CommandError(f"{path.name} is not a policy file: {describe_validation(exc)}; {_EXAMPLE}.") from exc
    return {name: role.trust_level for name, role in policies.roles.items()}
