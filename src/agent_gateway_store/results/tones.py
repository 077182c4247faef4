"""Which words of a record are badges, and what they say: yes, no, wait, changed, over."""

from __future__ import annotations

from typing import Any, Literal

__all__ = ["HEX", "RICH", "Tone", "tone_of"]

Tone = Literal["good", "bad", "wait", "info", "off"]
_FIELDS = frozenset({"decision", "execution_status", "output_decision", "status"})
_TONES: dict[str, Tone] = {
    "ALLOW": "good",
    "APPROVED": "good",
    "APPROVED_OUTPUT_RELEASE": "good",
    "DELIVERED": "good",
    "SUCCESS": "good",
    "DEAD": "bad",
    "DENIED": "bad",
    "DENY": "bad",
    "TOOL_ERROR": "bad",
    "APPROVAL_REQUIRED": "wait",
    "DUE": "wait",
    "PENDING": "wait",
    "TIMEOUT": "wait",
    "REDACT": "info",
    "SANITIZE_AND_ALLOW": "info",
    "USED": "info",
    "CANCELLED": "off",
    "EXPIRED": "off",
}
RICH: dict[Tone, str] = {
    "good": "green",
    "bad": "bold red",
    "wait": "yellow",
    "info": "blue",
    "off": "dim",
}
# Read well as text on white and on the dark themes' grey (contrast of 3 or more), and as areas of a plot.
HEX: dict[Tone, str] = {"good": "#2e9e5b", "bad": "#d6424a", "wait": "#d9900a", "info": "#3d7fd9", "off": "#848d97"}


def tone_of(field: str, value: Any) -> Tone | None:
    """Return the tone of a word in this field; None for what is no badge."""
    return _TONES.get(str(value)) if field.lower() in _FIELDS else None
