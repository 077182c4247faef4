"""The pattern that the docs give to secret scanners finds keys, and the checksum keeps everything else out."""

from __future__ import annotations

import random
import re
import string
from pathlib import Path

from agent_gateway_store.keys.format import KEY_PATTERN, new_key, new_key_id, parse_key_id

_PAGE = Path(__file__).parents[2] / "docs/how-to/api-keys.md"
_LETTERS = (string.digits + string.ascii_letters).encode()


def published() -> str:
    """The pattern as the page shows it."""
    found = re.search(r"```text\n(.+)\n```", _PAGE.read_text())
    assert found
    return found[1]


def test_published_pattern_finds_every_key_and_nothing_near_it() -> None:
    """Keys are found in code, logs and URLs; what is too short, too long or glued to a word is not."""
    assert published() == KEY_PATTERN
    keys = [new_key(new_key_id()) for _ in range(200)]
    for around in ('API_KEY="{}"', "Authorization: Bearer {}\n", "https://host/?key={}&x=1", "({})", "{}", "a\t{},b"):
        text = "\n".join(around.format(key) for key in keys)
        assert re.findall(published(), text) == keys
    for key in keys[:20]:
        for near in (key[:-1], key + "A", "x" + key, key.replace("agw", "agx"), key.replace("_", "-")):
            assert re.search(published(), near) is None


def test_checksum_keeps_out_what_only_looks_like_a_key() -> None:
    """Of 50,000 random strings of the right shape none passes, so none costs a lookup."""
    letters = random.Random(8).randbytes(61 * 50_000).translate(bytes(_LETTERS[each % 62] for each in range(256)))
    bodies = (letters[at : at + 61].decode() for at in range(0, len(letters), 61))

    assert [body for body in bodies if parse_key_id(f"agw_{body[:12]}_{body[12:]}") is not None] == []
