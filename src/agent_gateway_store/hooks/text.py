"""Text of plugins and of approvals, made fit for a log line."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator, Mapping

__all__ = ["MAX_ERROR", "describe", "mask_tokens", "one_line", "spoken"]

MAX_ERROR = 500
_SHORTEST_SECRET = 4

_API_KEY = re.compile(r"\bagw_[\w-]+")
# The form of secrets.token_urlsafe(32). Demanding mixed case and a digit spares long names of tools.
_TOKEN = re.compile(
    r"(?<![\w-])(?=[\w-]{0,42}[A-Z])(?=[\w-]{0,42}[a-z])(?=[\w-]{0,42}[0-9])[A-Za-z0-9_-]{43}(?![\w-])", re.ASCII
)
_URL = re.compile(r"""\b([A-Za-z][A-Za-z0-9+.-]{0,20}://)([^\s'"<>)]*)""")
_BEARER = re.compile(r"\b(bearer|basic)\s+[\w.~+/=-]{6,}", re.IGNORECASE)
_LABELLED = re.compile(
    r"""\b([\w-]{0,40}(?:password|passwd|secret|token|api[_-]?key|authorization)["']?\s{0,3}[=:]\s{0,3}["']?)"""
    r"""[^\s"',;&]+""",
    re.IGNORECASE,
)


def one_line(text: str) -> str:
    """Return `text` with what is unprintable (line breaks, ANSI, bidi marks, surrogates) as backslash escapes."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)


def mask_tokens(text: str) -> str:
    """Return `text` with what looks like an API key or an approval token of this package shown as `***`."""
    return _TOKEN.sub("***", _API_KEY.sub("agw_***", text))


def describe(error: BaseException) -> str:
    """Return an exception as `Type: text`, on one line of at most 500 characters.

    What looks like a secret is masked: tokens, `password=` and its like, and of a URL all but scheme and host, for a
    webhook URL is a password. Never raises an `Exception`, whatever the exception's own `__str__` does.
    """
    try:
        text = _text_of(error)[: 10 * MAX_ERROR]
    except Exception:
        text = "(its text cannot be read)"
    name = type(error).__name__
    return spoken(f"{name}: {text}" if text.strip() else name)


def _text_of(error: BaseException) -> str:
    core = sys.modules.get("pydantic_core")
    if core is None or not isinstance(error, core.ValidationError):
        return str(error)
    # Its own text repeats the input, which may be a secret; what a validator says may quote it.
    told = []
    for each in error.errors(include_url=False, include_context=False):
        message = each["msg"]
        for value in sorted(_texts_in(each["input"]), key=len, reverse=True):
            message = message.replace(value, "***")
        told.append(f"{message} ({'.'.join(map(str, each['loc'])) or error.title})")
    return "; ".join(told)


def _texts_in(value: object) -> Iterator[str]:
    if isinstance(value, str) and len(value) >= _SHORTEST_SECRET:
        yield value
    elif isinstance(value, Mapping):
        for each in value.values():
            yield from _texts_in(each)
    elif isinstance(value, list | tuple):
        for each in value:
            yield from _texts_in(each)


def spoken(text: str) -> str:
    """Return what a plugin says on one line of at most 500 characters, what looks like a secret masked."""
    text = " ".join(text[: 10 * MAX_ERROR].split())
    text = one_line(_LABELLED.sub(r"\1***", _BEARER.sub(r"\1 ***", mask_tokens(_URL.sub(_host_only, text)))))
    return text if len(text) <= MAX_ERROR else f"{text[: MAX_ERROR - 1]}…"


def _host_only(url: re.Match[str]) -> str:
    scheme, rest = url.groups()
    if "@" in rest:
        return f"{scheme}***"
    host = re.split(r"[/?#]", rest, maxsplit=1)[0]
    return f"{scheme}{host}" if rest in (host, f"{host}/") else f"{scheme}{host}/***"
