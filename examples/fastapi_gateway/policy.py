"""Who may call what: a YAML file of roles. deny beats require_approval beats allow; the rest is denied."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PrivateAttr, ValidationError

from agent_gateway_store import Decision, ToolCall, TrustLevel

__all__ = ["Policy", "PolicyError", "Verdict", "load_policy"]


class PolicyError(ValueError):
    """The policy file cannot be used; the text is one sentence."""


@dataclass(frozen=True)
class Verdict:
    """What the policy says about one call, and by which rule."""

    decision: Decision
    rule: str
    reason: str


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, hide_input_in_errors=True)


class Rule(_Strict):
    """Calls that a rule speaks of; `*`, `?` and `[abc]` are wildcards."""

    server: str
    tool: str
    reason: str = ""

    def matches(self, call: ToolCall) -> bool:
        """Tell whether the rule speaks of `call`."""
        return fnmatchcase(call.server, self.server) and fnmatchcase(call.tool, self.tool)


def _level(value: Any) -> Any:
    if not isinstance(value, str) or value not in TrustLevel.__members__:
        raise ValueError(f"must be one of {', '.join(TrustLevel.__members__)}")
    return TrustLevel[value]


Rules = Annotated[tuple[Rule, ...], BeforeValidator(lambda value: value or ())]


class Role(_Strict):
    """What one role may do. `trust_level` is what `gateway-store seed` gives to the keys of this role."""

    trust_level: Annotated[TrustLevel, BeforeValidator(_level)]
    deny: Rules = ()
    require_approval: Rules = ()
    allow: Rules = ()


_DECISIONS = {
    "deny": Decision.DENY,
    "require_approval": Decision.APPROVAL_REQUIRED,
    "allow": Decision.ALLOW,
}


class Policy(_Strict):
    """The whole file."""

    version: Annotated[str, BeforeValidator(str)]
    roles: dict[str, Role] = Field(min_length=1)
    _digest: str = PrivateAttr(default="")

    @property
    def label(self) -> str:
        """The version with the beginning of the file's SHA-256, so that an audit row names the exact rules."""
        return f"{self.version}@{self._digest[:12]}"

    def decide(self, role: str, call: ToolCall) -> Verdict:
        """Return the first matching rule's verdict, in the order deny, require_approval, allow; else DENY."""
        rules = self.roles.get(role)
        if rules is None:
            return Verdict(Decision.DENY, "default-deny", f"The policy does not know the role {role}.")
        for kind, decision in _DECISIONS.items():
            for number, rule in enumerate(getattr(rules, kind), 1):
                if rule.matches(call):
                    name = f"{role}.{kind}.{number} {rule.server}/{rule.tool}"
                    return Verdict(decision, name, rule.reason or f"The rule {name} says so.")
        return Verdict(Decision.DENY, "default-deny", f"No rule lets the role {role} call {call.server}/{call.tool}.")


def load_policy(path: Path) -> Policy:
    """Read and check a policy file.

    Raises:
        PolicyError: It cannot be read, is not YAML, or does not have the shape of a policy.
    """
    try:
        data = path.read_bytes()
        policy = Policy.model_validate(yaml.safe_load(data))
    except OSError as exc:
        raise PolicyError(f"The policy file {path} cannot be read ({exc.strerror}): set GATEWAY_POLICIES.") from exc
    except ValidationError as exc:
        error = exc.errors()[0]
        where = ".".join(map(str, error["loc"])) or "the top"
        raise PolicyError(f"The policy file {path} is wrong at {where} ({error['msg']}): correct it.") from exc
    except (yaml.YAMLError, RecursionError, ValueError) as exc:
        mark = getattr(exc, "problem_mark", None)
        where = f" at line {mark.line + 1}" if mark else ""
        raise PolicyError(f"The policy file {path} is not YAML{where}: correct it.") from exc
    policy._digest = hashlib.sha256(data).hexdigest()
    return policy
