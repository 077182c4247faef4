"""Hide arguments whose name says that they are secret, before anybody but the tool sees them."""

from __future__ import annotations

from typing import Any

from agent_gateway_store import RedactionFlag

__all__ = ["REDACTED", "redact"]

REDACTED = "[redacted]"
_SECRET_WORDS = ("password", "passwd", "secret", "token", "api_key", "apikey", "authorization", "credential")
_SECRET_NAMES = ("content",)
_MAX_DEPTH = 32


def redact(arguments: dict[str, Any], *, field: str = "sanitized_args") -> tuple[dict[str, Any], list[RedactionFlag]]:
    """Return a copy of `arguments` fit for approvers and the audit log, and a flag for each replacement.

    Args:
        arguments: As the caller sent them; not changed.
        field: What the flags call the whole.
    """
    flags: list[RedactionFlag] = []
    return {name: _shown(name, value, f"{field}.{name}", 0, flags) for name, value in arguments.items()}, flags


def _shown(name: str, value: Any, place: str, depth: int, flags: list[RedactionFlag]) -> Any:
    if _is_secret(name) or depth == _MAX_DEPTH:
        # No hash of the original: a short password could be found by guessing.
        flags.append(RedactionFlag(field=place, reason="SECRET_NAME" if _is_secret(name) else "TOO_DEEP"))
        return REDACTED
    if isinstance(value, dict):
        return {key: _shown(key, inner, f"{place}.{key}", depth + 1, flags) for key, inner in value.items()}
    if isinstance(value, list):
        return [_shown("", inner, f"{place}[{index}]", depth + 1, flags) for index, inner in enumerate(value)]
    return value


def _is_secret(name: str) -> bool:
    plain = name.lower().replace("-", "_")
    return plain in _SECRET_NAMES or any(word in plain for word in _SECRET_WORDS)
