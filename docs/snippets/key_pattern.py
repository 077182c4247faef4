"""How-to: find API keys in text."""

# --8<-- [start:scan]
import re

from agent_gateway_store.keys.format import KEY_PATTERN, parse_key_id


def find_keys(text: str) -> list[str]:
    """Return the API keys in `text`; the checksum sorts out what only looks like one."""
    return [found for found in re.findall(KEY_PATTERN, text) if parse_key_id(found)]


# --8<-- [end:scan]

from agent_gateway_store.keys.format import new_key, new_key_id

key = new_key(new_key_id())
wrong = key[:-1] + ("0" if key[-1] != "0" else "1")
assert find_keys(f'GATEWAY_KEY="{key}"\n# {wrong}\n') == [key]
assert find_keys("agw_nothing_here") == []
# The page shows the pattern as written out here.
assert KEY_PATTERN == r"\bagw_[0-9A-Za-z]{12}_[0-9A-Za-z]{49}\b"
