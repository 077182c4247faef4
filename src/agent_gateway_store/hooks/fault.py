"""What went wrong in a plugin, as far as the caller needs to know."""

from __future__ import annotations

import math
from dataclasses import dataclass

from agent_gateway_store.errors import NotDeliveredError
from agent_gateway_store.hooks.text import describe

__all__ = ["Fault", "fault_of"]


@dataclass(frozen=True, slots=True)
class Fault:
    """Why a call did not go well.

    Attributes:
        text: One line of at most 500 characters, secrets masked.
        retry_after_s: Seconds that the plugin asks to be left alone; None if it does not say.
        is_permanent: True if the plugin says that trying again cannot help.
    """

    text: str
    retry_after_s: float | None = None
    is_permanent: bool = False


def fault_of(error: BaseException) -> Fault:
    """Return what `error` tells; a `retry_after_s` that is no number of seconds counts as none."""
    if not isinstance(error, NotDeliveredError):
        return Fault(describe(error))
    return Fault(describe(error), _seconds(error.retry_after_s), error.is_permanent is True)


def _seconds(value: object) -> float | None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        seconds = float(value)
    except OverflowError:
        return None
    return seconds if math.isfinite(seconds) and seconds >= 0 else None
