"""Parts of a notice for a message of limited size. What is cut is cut visibly."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from itertools import islice
from typing import Any

from agent_gateway_store._text import escape, mask_tokens

MARK = "…"
# How deep arguments are shown. Deeper ones cannot be read by a human, and come near the recursion limits of receivers.
MAX_DEPTH = 20
# Characters that one text of the arguments keeps, from many to few: the first that makes all of them fit is taken.
_LIMITS = (2000, 400, 80, 20)


def cut(text: str, limit: int) -> str:
    """Return at most `limit` characters of `text`; what was cut ends in an ellipsis."""
    return text if len(text) <= limit else f"{text[: limit - 1]}{MARK}"


def safe_text(text: str, limit: int) -> str:
    """Return at most `limit` characters of `text` on one line, with tokens masked and hidden characters escaped."""
    return cut(escape(mask_tokens(text)), limit)


def fit_arguments(arguments: Mapping[str, Any], max_bytes: int) -> tuple[dict[str, Any], bool]:
    """Return arguments whose JSON is at most `max_bytes` long, and whether anything was cut.

    Texts, lists and objects that are longer than a limit are cut, with ever smaller limits; at the end, everything is.
    """
    # A text, list or object longer than all the room cannot fit whole.
    for limit in (max_bytes, *_LIMITS):
        shown: dict[str, Any] = _shown(arguments, limit, 0)
        if len(json.dumps(shown)) <= max_bytes:
            return shown, shown != arguments
    return {MARK: "too long to be shown"}, True


def _shown(value: Any, limit: int, depth: int) -> Any:
    if depth > MAX_DEPTH:
        return MARK
    if isinstance(value, str):
        return cut(value, limit)
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, int):
        # Python refuses to write out integers of more than 4300 digits, and JSON readers round long before.
        return value if abs(value) < 2**63 else cut(hex(value), limit)
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    if isinstance(value, Mapping):
        kept = list(islice(value.items(), limit))
        shown = {cut(str(key), limit): _shown(each, limit, depth + 1) for key, each in kept}
        return shown if len(kept) == len(value) else shown | {MARK: f"{len(value) - len(kept)} more"}
    if isinstance(value, list | tuple):
        items = [_shown(each, limit, depth + 1) for each in value[:limit]]
        return items if len(items) == len(value) else [*items, f"{MARK} {len(value) - len(items)} more"]
    return cut(str(value), limit)
