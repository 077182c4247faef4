"""Looks at what plugins offer as notifiers."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import cast

from agent_gateway_store.hooks.specs import Notifier
from agent_gateway_store.hooks.text import describe

__all__ = ["REGISTER", "Offer", "examine"]

REGISTER = "gateway_store_register_notifiers"
MAX_NAME = 100


@dataclass
class Offer:
    """What one plugin offers.

    Attributes:
        fitting: Names and notifiers of the right shape.
        faults: What is wrong with the rest.
    """

    fitting: list[tuple[str, Notifier]] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)


def examine(ask: Callable[[], list[object]]) -> Offer:
    """Take the answers of a plugin and look at every candidate alone.

    Args:
        ask: Returns the answers of the plugin's implementations of `gateway_store_register_notifiers`.

    Returns:
        What fits and what does not. Raises nothing.
    """
    offer = Offer()
    try:
        answers = ask()
    except BaseException as exc:
        offer.faults.append(f"{REGISTER} raised {describe(exc)}")
        return offer
    for answer in answers:
        if not isinstance(answer, list | tuple):
            if inspect.iscoroutine(answer):
                answer.close()
            offer.faults.append(f"{REGISTER} returned {type(answer).__name__}, not a list of notifiers")
            continue
        for candidate in answer:
            try:
                offer.fitting.append((_name_of(candidate), cast("Notifier", candidate)))
            except BaseException as exc:
                offer.faults.append(f"a notifier does not fit: {describe(exc)}")
    return offer


def _name_of(candidate: object) -> str:
    kind = type(candidate).__name__
    if inspect.isclass(candidate):
        raise TypeError(f"{candidate.__name__} is a class, not an object")
    name = getattr(candidate, "name", None)
    if not isinstance(name, str) or not name.strip() or not name.isprintable() or len(name) > MAX_NAME:
        raise TypeError(f"{kind} has no name (printable text of at most {MAX_NAME} characters)")
    for method in ("notify_pending", "notify_decision"):
        if not _is_async(getattr(candidate, method, None)):
            raise TypeError(f"{kind} has no async method {method}")
    return str(name)


def _is_async(function: object) -> bool:
    # A decorated method counts as what it wraps: the decorator may return the coroutine without being async itself.
    if not callable(function):
        return False
    candidates = (function, inspect.unwrap(function), getattr(function, "__call__", None))  # noqa: B004
    return any(inspect.iscoroutinefunction(candidate) for candidate in candidates)
