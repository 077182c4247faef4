"""Numbers that callers hand in and that a database must be able to hold."""

from __future__ import annotations

__all__ = ["MOST", "require_between"]

MOST = 2**31 - 1
"""The largest 32-bit integer."""


def require_between(name: str, value: int, least: int, most: int = MOST, *, hint: str) -> None:
    """Raise ValueError unless `value` is from `least` to `most`; its text ends with `hint`, what to do instead."""
    if not least <= value <= most:
        raise ValueError(f"{name} must be {least:,} to {most:,}: {hint}.")
