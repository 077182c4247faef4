"""One plugin: the hooks it implements, the notifiers, sinks and settings it offers, its problems."""

from __future__ import annotations

import inspect
import logging
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING, Any, Literal

import pluggy

from agent_gateway_store._text import MAX_ERROR, describe, escape, mask_tokens, mask_values
from agent_gateway_store.hooks import PROJECT, specs

if TYPE_CHECKING:
    from pydantic_settings import BaseSettings

    from agent_gateway_store.settings import StoreSettings

REGISTER = "gateway_store_register_notifiers"
REGISTER_SINKS = "gateway_store_register_sinks"
SETTINGS = "gateway_store_plugin_settings"

# What is registered by each hook: its name, and the async methods that it must have.
_OFFERED = {REGISTER: ("notifier", ("notify_pending", "notify_decision")), REGISTER_SINKS: ("sink", ("send",))}
# Chosen: fits a line of a log and a cell of a listing.
_MAX_NAME = 100

logger = logging.getLogger("agent_gateway_store.hooks")


@dataclass(frozen=True, slots=True)
class PluginRecord:
    """A plugin as `gateway-store plugins list` shows it.

    Attributes:
        name: Name of its entry point, or of the object given to the store.
        version: Version of its distribution; None if it was given to the store.
        distribution: Name of the package it comes from; None if it was given to the store.
        hooks: Hooks it implements, sorted. Empty for a bare notifier, and for what was not loaded.
        state: `active`; `blocked`: not loaded, on request; `broken`: it has problems, but what works is used.
        error: Why it is blocked or broken; None if active. One line, secrets masked.
        notifiers: Names of the notifiers it gave when it was last asked.
        sinks: Names of the sinks.
    """

    name: str
    version: str | None
    distribution: str | None
    hooks: tuple[str, ...]
    state: Literal["active", "blocked", "broken"]
    error: str | None
    notifiers: tuple[str, ...] = ()
    sinks: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class SettingsState:
    """The state of a plugin's settings.

    Attributes:
        prefix: What its variables begin with.
        state: `configured`; `defaults`: nothing is set, and nothing needs to be; `missing`: nothing is set, and
            something needs to be; `wrong`: a value is not accepted.
        problems: What is missing or wrong, by variable; holds no value.
    """

    prefix: str
    state: Literal["configured", "defaults", "missing", "wrong"]
    problems: tuple[str, ...] = ()


class Plugin:
    """A plugin and its problems.

    Args:
        name: Unique among the loaded plugins.
        origin: Name and version of its distribution; None if it was given to the store.
    """

    def __init__(self, name: str, *, origin: tuple[str, str] | None = None) -> None:
        self.name = name
        self.origin = origin
        self.blocked: str | None = None
        self.offered: dict[str, list[str]] = {REGISTER: [], REGISTER_SINKS: []}
        self._object: object = None
        self._is_bare = False
        self._problems: list[str] = []
        self._offer_problems: dict[str, list[str]] = {REGISTER: [], REGISTER_SINKS: []}
        # One manager for each plugin, so that none can see, wrap or stop another.
        self._manager = pluggy.PluginManager(PROJECT)
        self._manager.add_hookspecs(specs)
        self._specs = frozenset(vars(self._manager.hook))

    @property
    def record(self) -> PluginRecord:
        """The plugin as it is now."""
        problems = [*self._problems, *chain(*self._offer_problems.values())]
        distribution, version = self.origin or (None, None)
        return PluginRecord(
            name=self.name,
            version=version,
            distribution=distribution,
            hooks=tuple(sorted(name for name in self._specs if self.caller(name) is not None)),
            state="blocked" if self.blocked else "broken" if problems else "active",
            error=self.blocked or "; ".join(problems) or None,
            notifiers=tuple(self.offered[REGISTER]),
            sinks=tuple(self.offered[REGISTER_SINKS]),
        )

    def offers(self, hook: str) -> bool:
        """Return True if it registers something by this hook, or is itself a notifier."""
        return (self._is_bare and hook == REGISTER) or self.caller(hook) is not None

    def caller(self, hook: str) -> Callable[..., list[object]] | None:
        """Return the function that calls this plugin's implementations of `hook`; None if it has none."""
        caller: pluggy.HookCaller = getattr(self._manager.hook, hook)
        return caller if caller.get_hookimpls() else None

    def add_problem(self, text: str, *, of: str | None = None) -> None:
        """Record and log a problem, perhaps of what it registers by the hook `of`; the same one once."""
        problems = self._problems if of is None else self._offer_problems[of]
        if text in problems:
            return
        problems.append(text)
        logger.warning("Plugin %s is broken: %s", escape(self.name), text)

    def adopt(self, load: Callable[[], object]) -> None:
        """Load it and register its hook implementations; a class is called without arguments first.

        Raises nothing but KeyboardInterrupt: every other error, `SystemExit` included, becomes a problem.
        """
        try:
            loaded = load()
            self._object = loaded() if inspect.isclass(loaded) else loaded
            self._manager.register(self._object, name=self.name)
            is_notifier = hasattr(self._object, "notify_pending") or hasattr(self._object, "notify_decision")
            self._is_bare = is_notifier and self.caller(REGISTER) is None
            if unknown := self._unknown_hooks():
                self.add_problem(f"this version knows no hook {', '.join(map(escape, unknown))}")
            elif not self._is_bare and not self.record.hooks:
                self.add_problem("nothing in it is marked with @hookimpl, and it is not a notifier")
        except KeyboardInterrupt:
            raise
        except BaseException as exc:
            self.add_problem(describe(exc))

    def offer(self, settings: StoreSettings, hook: str) -> tuple[list[tuple[str, Any]], list[str]]:
        """Ask it for notifiers, or for sinks. Raises nothing; may take as long as the plugin likes.

        Returns:
            Those of the right shape, with their names, and what is wrong with the rest.
        """
        # A bare notifier has no such hook, and is asked only because it is one itself.
        register = self.caller(hook)
        try:
            answers = [[self._object]] if register is None else register(settings=settings)
        except BaseException as exc:
            return [], [f"{hook} raised {describe(exc)}"]
        return _examine(answers, hook)

    def settings(self) -> SettingsState | None:
        """Return the state of its settings; None if it declares none. May take as long as the plugin likes.

        Raises:
            TypeError: It declares something else than a settings class. Also whatever the plugin raises.
        """
        caller = self.caller(SETTINGS)
        declared = caller() if caller else []
        return examine_settings(declared[0]) if declared else None

    def forget_offer(self, hook: str) -> None:
        """Forget what it registered by this hook the last time it was asked, and the problems with that."""
        self._offer_problems[hook].clear()
        self.offered[hook].clear()

    def _unknown_hooks(self) -> list[str]:
        relay: dict[str, pluggy.HookCaller] = vars(self._manager.hook)
        others = (name for name in relay if name not in self._specs)
        return sorted(name for name in others if not all(impl.optionalhook for impl in relay[name].get_hookimpls()))


def _examine(answers: Iterable[object], hook: str) -> tuple[list[tuple[str, Any]], list[str]]:
    """Check each notifier, or sink, in the answers to the hook; return as `Plugin.offer`. Raises nothing."""
    fitting: list[tuple[str, Any]] = []
    problems: list[str] = []
    kind, _ = _OFFERED[hook]
    for answer in answers:
        if not isinstance(answer, list | tuple):
            # Closed, or Python warns that it was never awaited.
            if inspect.iscoroutine(answer):
                answer.close()
            problems.append(f"{hook} returned {type(answer).__name__}, not a list of {kind}s")
            continue
        for candidate in answer:
            try:
                fitting.append((name_of(candidate, hook), candidate))
            except BaseException as exc:
                # `name` may be a property of the plugin that raises anything.
                problems.append(f"a {kind} does not fit: {describe(exc)}")
    return fitting, problems


def name_of(candidate: object, hook: str) -> str:
    """Return the name of a notifier, or of a sink.

    Raises:
        TypeError: It has not the shape that the hook asks for. Also whatever its attributes raise.
    """
    kind = type(candidate).__name__
    if inspect.isclass(candidate):
        raise TypeError(f"{candidate.__name__} is a class, not an object")
    name = getattr(candidate, "name", None)
    if not isinstance(name, str) or not name.strip() or not name.isprintable() or len(name) > _MAX_NAME:
        raise TypeError(f"{kind} has no name (printable text of at most {_MAX_NAME} characters)")
    for method in _OFFERED[hook][1]:
        if not _is_async(getattr(candidate, method, None)):
            raise TypeError(f"{kind} has no async method {method}")
    return str(name)


def _is_async(function: object) -> bool:
    # A decorator may return the coroutine without being async itself, so the function that it wraps counts, too.
    if not callable(function):
        return False
    candidates = (function, inspect.unwrap(function), getattr(function, "__call__", None))  # noqa: B004
    return any(inspect.iscoroutinefunction(candidate) for candidate in candidates)


def examine_settings(model: object) -> SettingsState:
    """Build the settings of a plugin from the environment and return their state.

    Raises:
        TypeError: `model` is not a class of pydantic-settings, or has no prefix.
    """
    from pydantic_settings import BaseSettings

    if not isinstance(model, type) or not issubclass(model, BaseSettings):
        raise TypeError(f"{SETTINGS} returned {type(model).__name__}, not a class of pydantic_settings.BaseSettings")
    prefix = model.model_config.get("env_prefix", "")
    if not prefix:
        raise TypeError(f"{model.__name__} has no env_prefix, which sets its variables apart from others")
    variables = _variables(model, prefix)
    names = {name.upper() for name in (prefix, *variables.values())}
    given = {name: value for name, value in os.environ.items() if name.upper().startswith(tuple(names))}
    # A validator of the plugin may quote the value in its message.
    masked = (mask_values(problem, given.values()) for problem in _problems(model, prefix, variables))
    problems = tuple(escape(mask_tokens(problem))[:MAX_ERROR] for problem in masked)
    if problems:
        return SettingsState(prefix, "wrong" if given else "missing", problems)
    return SettingsState(prefix, "configured" if given else "defaults")


def _variables(model: type[BaseSettings], prefix: str) -> dict[str, str]:
    """Return the variable of each field, by the field's name and by each of its aliases."""
    found: dict[str, str] = {}
    for name, field_info in model.model_fields.items():
        alias: Any = field_info.validation_alias or field_info.alias
        texts = [choice for choice in getattr(alias, "choices", [alias]) if isinstance(choice, str)]
        # The first of several is the one that the plugin's page names.
        found[name] = texts[0] if texts else f"{prefix}{name}"
        found.update((text, text) for text in texts)
    if model.model_config.get("case_sensitive"):
        return found
    return {key: variable.upper() for key, variable in found.items()}


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
