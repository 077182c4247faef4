"""Looks at the settings of a plugin: which variables it reads, and what is wrong with them. Never at their values."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from agent_gateway_store.hooks.text import MAX_ERROR, describe, mask_tokens, one_line

if TYPE_CHECKING:
    from pydantic_settings import BaseSettings

__all__ = ["SETTINGS", "SettingsState", "examine_settings"]

SETTINGS = "gateway_store_plugin_settings"
_SHORTEST_SECRET = 4


@dataclass(frozen=True, slots=True)
class SettingsState:
    """How the settings of a plugin stand.

    Attributes:
        prefix: What its variables begin with.
        state: `configured`; `defaults`: nothing is set, and nothing must be; `missing`: nothing is set, and something
            must be; `wrong`: what is set does not do.
        problems: What is missing or wrong, by variable. Holds no value.
    """

    prefix: str
    state: Literal["configured", "defaults", "missing", "wrong"]
    problems: tuple[str, ...] = ()


def examine_settings(model: object) -> SettingsState:
    """Build the settings from the environment and say how they stand.

    Raises:
        TypeError: It is no class of pydantic-settings, or has no prefix.
    """
    from pydantic_settings import BaseSettings

    if not isinstance(model, type) or not issubclass(model, BaseSettings):
        raise TypeError(f"{SETTINGS} returned {type(model).__name__}, not a class of pydantic_settings.BaseSettings")
    prefix = model.model_config.get("env_prefix", "")
    if not prefix:
        raise TypeError(f"{model.__name__} has no env_prefix, by which its variables are told from others")
    variables = dict(_variables(model, prefix))
    names = {name.upper() for name in (prefix, *variables.values())}
    given = {name: value for name, value in os.environ.items() if name.upper().startswith(tuple(names))}
    problems = tuple(_hidden(problem, given) for problem in _problems(model, prefix, variables))
    if problems:
        return SettingsState(prefix, "wrong" if given else "missing", problems)
    return SettingsState(prefix, "configured" if given else "defaults")


def _variables(model: type[BaseSettings], prefix: str) -> Iterator[tuple[str, str]]:
    for name, field in model.model_fields.items():
        alias: Any = field.validation_alias or field.alias
        alias = getattr(alias, "choices", [alias])[0]
        variable = alias if isinstance(alias, str) else f"{prefix}{name}"
        variable = variable if model.model_config.get("case_sensitive") else variable.upper()
        yield name, variable
        if isinstance(alias, str):
            yield alias, variable


def _problems(model: type[BaseSettings], prefix: str, variables: Mapping[str, str]) -> Iterator[str]:
    from pydantic import ValidationError

    try:
        model()
    except ValidationError as exc:
        for each in exc.errors(include_url=False, include_context=False, include_input=False):
            place = [str(part) for part in each["loc"]]
            variable = variables.get(place[0], f"{prefix}{place[0]}".upper()) if place else f"{prefix}*"
            yield f"{'.'.join([variable, *place[1:]])}: {each['msg'][:1].lower()}{each['msg'][1:]}"
    except Exception as exc:
        yield describe(exc)


def _hidden(problem: str, given: Mapping[str, str]) -> str:
    # What a validator of the plugin's own says may quote the value.
    for value in sorted(given.values(), key=len, reverse=True):
        if len(value) >= _SHORTEST_SECRET:
            problem = problem.replace(value, "***")
    return one_line(mask_tokens(problem))[:MAX_ERROR]
