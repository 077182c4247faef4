"""Text for people: nothing in it is hidden, no two values look alike, and no secret is shown.

Tables, cards, charts, messages, log lines and the terminal all write their text by this module.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

# Chosen: a few lines of a terminal.
MAX_ERROR = 500
# Chosen: a shorter value is in many messages by chance.
_SHORTEST_SECRET = 4

CUT_CALL = (
    "This call was too long to be stored whole: approving it approves something that nobody can see here. "
    "Deny it unless you know it from elsewhere."
)
"""What every view of an approval says where `is_cut` is true of the call."""

# What stands in place of what was cut when it was stored; ids, and texts that earlier versions stored, end in `~` and a
# SHA-256. A name that was taken has a number behind it.
_CUT = re.compile(r"(?:\[cut: [^\[\]]{1,150}\]|~[0-9a-f]{64})(?:~[0-9]{1,9})?\Z")
# Characters: more than the longest of these marks has.
_CUT_CHARS = 250

MASK = "***"
# The form of `keys.format`; 16 characters of a secret are enough, where it was cut off. Anything shorter is a name that
# begins like a key, and a reader of what is to run must see it.
_API_KEY = re.compile(r"agw_[0-9A-Za-z]{12}_[0-9A-Za-z]{16,}")
# The form of secrets.token_urlsafe(32): 43 characters. Long names of tools seldom have both cases and a digit.
_TOKEN = re.compile(
    r"(?<![\w-])(?=[\w-]{0,42}[A-Z])(?=[\w-]{0,42}[a-z])(?=[\w-]{0,42}[0-9])[A-Za-z0-9_-]{43}(?![\w-])", re.ASCII
)
_URL = re.compile(r"""\b([A-Za-z][A-Za-z0-9+.-]{0,20}://)([^\s'"<>)]*)""")
# Every repetition below is bounded or ends the pattern: a text from outside must not cost quadratic time.
_BEARER = re.compile(r"\b(bearer|basic)\s+[\w.~+/=-]{6,}", re.IGNORECASE)
_LABELLED = re.compile(
    r"""\b([\w-]{0,40}(?:password|passwd|secret|token|api[_-]?key|authorization)["']?\s{0,3}[=:]\s{0,3}["']?)"""
    r"""[^\s"',;&]+""",
    re.IGNORECASE,
)

# What Python calls unprintable is every character of the general categories Cc, Cf, Cs, Co, Cn, Zl, Zp and Zs but the
# space (`str.isprintable`). These are printable to Python and yet leave no mark: the rest of
# Default_Ignorable_Code_Point (DerivedCoreProperties.txt, Unicode 16), and letters and symbols that are drawn blank.
_BLANK = re.compile(
    "[\u034f\u115f\u1160\u17b4\u17b5\u180b-\u180d\u180f\u3164\ufe00-\ufe0f\uffa0\U000e0100-\U000e01ef"
    "\u2800\U00016fe4\U0001d159]"
)
_BACKSLASH = re.compile(r"\\")
_EMOJI = (
    "[\u203c\u2049\u2122\u2139\u2190-\u21ff\u2300-\u23ff\u25a0-\u27bf"
    "\u2b00-\u2bff\u3030\u303d\u3297\u3299\U0001f000-\U0001faff]"
)
# An emoji with its colour selector, joined to others: joiner and selector change what is drawn. Tag characters do not,
# so a flag that is made of them is escaped.
_EMOJI_SEQUENCE = re.compile(f"({_EMOJI}\ufe0f?(?:\u200d{_EMOJI}\ufe0f?)*)")
# No digit, sign or point at the beginning, so that a number never looks like a text.
_BARE_WORD = re.compile(r"[A-Za-z_/@~*][\w/@:.+~%*-]*", re.ASCII)
_JSON_WORDS = frozenset({"true", "false", "null", "NaN", "Infinity"})


class Shown(str):
    """Text that went through `escape` already, which does not change it again."""

    __slots__ = ()


def escape(text: str, *, keep: str = "") -> Shown:
    """Return `text` with every character that leaves no mark of its own as a backslash escape.

    These are line breaks and other controls, bidirectional marks, zero-width and other default-ignorable characters,
    tag characters, blank letters, all spaces but U+0020, lone surrogates, private and unassigned code points. An emoji
    keeps its colour selector and its joiners (U+FE0F, U+200D), which change what is drawn. No two texts are shown
    alike: a backslash that would read as the beginning of an escape is doubled.

    Args:
        text: Any text.
        keep: Characters that stay as they are, such as line breaks where several lines are shown.
    """
    if isinstance(text, Shown):
        return text
    if "\\" in text:
        # Doubled also before a character that becomes an escape, which begins with a backslash itself.
        text = _BACKSLASH.sub(
            lambda found: "\\\\" if _begins_escape(text[found.end() : found.end() + 1], keep) else "\\", text
        )
    return Shown(_replace_hidden(text, _python_escape, keep))


def is_blank(text: str) -> bool:
    """True if nothing of `text` is seen: it is empty, or holds only blanks and characters that leave no mark."""
    return not any(each.isprintable() and each != " " and not _BLANK.match(each) for each in text)


def sentence(text: str) -> Shown:
    """Return a message of this package with nothing hidden in what it quotes; its backslashes stay single."""
    return text if isinstance(text, Shown) else Shown(_replace_hidden(text, _python_escape, ""))


def json_text(value: Any, *, indent: int | None = None) -> Shown:
    """Return a value as JSON in which nothing is hidden: what `escape` shows is a JSON escape. It reads back equal.

    Args:
        value: Anything; what JSON does not know is shown as its text.
        indent: Spaces of a level; None: one line.
    """
    text = json.dumps(value, indent=indent, ensure_ascii=False, default=str)
    return Shown(_replace_hidden(text, lambda character: json.dumps(character)[1:-1], "\n"))


def is_cut(value: Any) -> bool:
    """True if JSON `value` holds, in a text or a name, the mark of something that was cut when it was stored.

    Such a mark in an argument makes a whole call look cut; nothing makes a cut one look whole.
    """
    left = [value]
    while left:
        each = left.pop()
        if isinstance(each, str):
            if _CUT.search(each[-_CUT_CHARS:]):
                return True
        elif isinstance(each, Mapping):
            left += [*each, *each.values()]
        elif isinstance(each, list | tuple):
            left += each
    return False


def code_text(value: Any) -> Shown:
    """Return a value as Python writes it (`repr`), with nothing hidden in it. For code to copy and for errors."""
    return Shown(_replace_hidden(repr(value), _python_escape, ""))


def word(value: Any) -> Shown:
    """Return a value as one word: text as it is where it can be taken for nothing else, anything else as JSON."""
    if isinstance(value, str) and _BARE_WORD.fullmatch(value) and value not in _JSON_WORDS:
        return Shown(value)
    return json_text(value)


def call_name(server: str, tool: str) -> Shown:
    """Return `server.tool`; a part with a point of its own, or with anything unusual, is in quotes."""
    return Shown(".".join(json_text(part) if "." in part else word(part) for part in (server, tool)))


def arguments_text(arguments: Mapping[str, Any]) -> Shown:
    """Return arguments on one line, as `name=value`: different arguments are never the same line."""
    return Shown(" ".join(f"{word(name)}={word(value)}" for name, value in arguments.items()))


def _begins_escape(following: str, keep: str) -> bool:
    return following != "" and (following in "\\xuUnrt" or (following not in keep and _is_hidden(following)))


def _is_hidden(character: str) -> bool:
    return not character.isprintable() or _BLANK.match(character) is not None


def _python_escape(character: str) -> str:
    return character.encode("unicode_escape").decode("ascii")


def _replace_hidden(text: str, encode: Callable[[str], str], keep: str) -> str:
    # Nearly every text has nothing hidden, which is found out here at once.
    seen = text
    for each in keep:
        seen = seen.replace(each, "")
    if seen.isprintable() and (seen.isascii() or not _BLANK.search(seen)):
        return text
    hidden = {ord(each): encode(each) for each in set(text) if each not in keep and _is_hidden(each)}
    shown = []
    # `split` with a group gives an emoji sequence at every odd index.
    for index, piece in enumerate(_EMOJI_SEQUENCE.split(text)):
        # The blocks of emoji have unassigned code points, too, which are not printable.
        is_emoji = index % 2 and piece.replace("\ufe0f", "").replace("\u200d", "").isprintable()
        shown.append(piece if is_emoji else piece.translate(hidden))
    return "".join(shown)


def mask_tokens(text: str) -> str:
    """Return `text` with what looks like an API key or an approval token of this package shown as `***`."""
    return _TOKEN.sub(MASK, _API_KEY.sub(f"agw_{MASK}", text))


def mask_values(text: str, values: Iterable[str]) -> str:
    """Return `text` with each of these values, but for very short ones, shown as `***`."""
    for value in sorted(values, key=len, reverse=True):
        if len(value) >= _SHORTEST_SECRET:
            text = text.replace(value, "***")
    return text


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
    return plugin_text(f"{name}: {text}" if text.strip() else name)


def _text_of(error: BaseException) -> str:
    core = sys.modules.get("pydantic_core")
    if core is None or not isinstance(error, core.ValidationError):
        return str(error)
    # `str` of a ValidationError repeats the input, which may be a secret, and a validator's message may quote it.
    messages = []
    for each in error.errors(include_url=False, include_context=False):
        place = ".".join(map(str, each["loc"])) or error.title
        messages.append(f"{mask_values(each['msg'], _texts_in(each['input']))} ({place})")
    return "; ".join(messages)


def _texts_in(value: object) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for each in value.values():
            yield from _texts_in(each)
    elif isinstance(value, list | tuple):
        for each in value:
            yield from _texts_in(each)


def plugin_text(text: str) -> str:
    """Return what a plugin says on one line of at most 500 characters, what looks like a secret masked."""
    # Cut first, as the patterns are slow on long texts; ten times as much, as masking makes text shorter.
    text = " ".join(text[: 10 * MAX_ERROR].split())
    text = escape(_LABELLED.sub(r"\1***", _BEARER.sub(r"\1 ***", mask_tokens(_URL.sub(_host_only, text)))))
    return text if len(text) <= MAX_ERROR else f"{text[: MAX_ERROR - 1]}…"


def _host_only(url: re.Match[str]) -> str:
    scheme, rest = url.groups()
    if "@" in rest:
        return f"{scheme}***"
    host = re.split(r"[/?#]", rest, maxsplit=1)[0]
    return f"{scheme}{host}" if rest in (host, f"{host}/") else f"{scheme}{host}/***"
