"""Policy files, as far as the store needs them: roles and their trust levels. Rules are left to the gateway."""

from __future__ import annotations

from pathlib import Path

import yaml
from pydantic import BaseModel, Field, ValidationError, field_validator

from agent_gateway_store.cli.errors import CommandError, describe_validation
from agent_gateway_store.models.keys import TrustLevel

_EXAMPLE = "see examples/policies/default.yaml"


class _Role(BaseModel):
    trust_level: TrustLevel

    @field_validator("trust_level", mode="before")
    @classmethod
    def _by_name(cls, value: object) -> object:
        if not isinstance(value, str) or value not in TrustLevel.__members__:
            raise ValueError(f"must be one of {', '.join(TrustLevel.__members__)}")
        return TrustLevel[value]


class _PolicyFile(BaseModel):
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
        policies = _PolicyFile.model_validate(document)
    except ValidationError as exc:
        raise CommandError(f"{path.name} is not a policy file: {describe_validation(exc)}; {_EXAMPLE}.") from exc
    return {name: role.trust_level for name, role in policies.roles.items()}
