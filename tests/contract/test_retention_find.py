"""Looking for what an erasure request is about: any text is found where it stands, however the column spells it."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from contract_helpers import store_sealed_by_hand
from erasure_helpers import OLD

from agent_gateway_store import GatewayStore, ToolCall, clock
from builders import make_event, make_request

store = store_sealed_by_hand

TEXTS = {
    "umlaut": "Müller",
    "chinese": "李雷",
    "quote": 'O"Brien',
    "backslash": "C:\\Users\\ada",
    "lines": "first\nsecond",
    "tab": "one\ttwo",
    "control": "one\x01two\x7f",
    "nul": "one\0two",
    "emoji": "party 🎉",
    "like": "100%_of",
    "json": "\\u00fc",
    "plain": "/home/ada",
}
PLACES: dict[str, dict[str, Any]] = {
    "arguments": {"sanitized_args": {"path": ["before {} after"]}},
    "names": {"sanitized_args": {"before {} after": 1}},
    "labels": {"risk_labels": ["x", "before {} after"]},
    "extra": {"extra": {"who": {"name": "before {} after"}}},
    "text": {"llm_explanation": "before {} after"},
}


def filled(value: Any, text: str) -> Any:
    """Return a value with the text in its places."""
    if isinstance(value, dict):
        return {filled(name, text): filled(each, text) for name, each in value.items()}
    if isinstance(value, list):
        return [filled(each, text) for each in value]
    return value.replace("{}", text) if isinstance(value, str) else value


async def in_table_and_archive(store: GatewayStore, folder: Path) -> AsyncIterator[Path | None]:
    """None while everything is in the tables, and then the folder to which it went."""
    yield None
    clock.move(timedelta(days=200))
    await store.audit.write_many([make_event(request_id="old", timestamp=OLD), make_event(request_id="newest")])
    await store.retention.prune(OLD + timedelta(days=1), by="ops", archive=folder)
    await store.retention.prune_approvals("190d", by="ops", archive=folder)
    yield folder


async def require_found(store: GatewayStore, folder: Path, places: Iterable[str]) -> None:
    """Find each text in its places, and no other one; in the tables, and in the archive."""
    async for archive in in_table_and_archive(store, folder):
        for name, text in TEXTS.items():
            page = await store.retention.find(text=text, archive=archive)
            assert all((each.file is None) == (archive is None) for each in page)
            found = {each.request_id for each in page}
            assert {each for each in found if each.startswith(name)} == {f"{name}-{place}" for place in places}
            # What JSON writes for an umlaut may be somebody's text as well: both are shown rather than none.
            assert {each.partition("-")[0] for each in found} <= ({name, "umlaut"} if name == "json" else {name})


async def test_any_text_is_found_in_events(store: GatewayStore, tmp_path: Path) -> None:
    """In arguments and their names, labels, extra and plain text; and no other event is."""
    events = {
        f"{name}-{place}": filled(fields, text) for name, text in TEXTS.items() for place, fields in PLACES.items()
    }
    await store.audit.write_many([make_event(request_id=each, timestamp=OLD, **events[each]) for each in events])

    await require_found(store, tmp_path / "a", PLACES)


async def test_any_text_is_found_in_approvals(store: GatewayStore, tmp_path: Path) -> None:
    """In the arguments of the call, in an output that waits, and in plain text; and no other approval is."""
    for name, text in TEXTS.items():
        call = ToolCall(server="s", tool="t", arguments={"path": [f"before {text} after"]})
        requests = {
            "call": make_request(request_id=f"{name}-call", tool_call=call),
            "output": make_request(
                request_id=f"{name}-output", scope="OUTPUT_RELEASE", output_payload={"text": f"before {text} after"}
            ),
            "plain": make_request(request_id=f"{name}-plain", risk_explanation=f"before {text} after"),
        }
        for request in requests.values():
            await store.approvals.cancel(await store.approvals.issue_token(request), "x")

    await require_found(store, tmp_path / "a", ("call", "output", "plain"))


async def test_notes_and_names_of_all_who_voted_are_looked_at(store: GatewayStore, tmp_path: Path) -> None:
    """The approval itself holds those of the last one; a field without a value holds no "None"."""
    for request_id in ("r-1", "r-2"):
        request = make_request(request_id=request_id, required_approvals=2)
        token = await store.approvals.issue_token(request)
        if request_id == "r-1":
            await store.approvals.approve(token, "alice", f"for {TEXTS['quote']}")
        await store.approvals.deny(token, "bob", "no")
    async for folder in in_table_and_archive(store, tmp_path / "a"):
        for text in (TEXTS["quote"], "ALICE"):
            page = await store.retention.find(text=text, archive=folder)
            assert [(each.kind, each.request_id) for each in page] == [("approval", "r-1")]
            assert all((each.file is None) == (folder is None) for each in page)
        assert await store.retention.find(text="None", archive=folder) == []
    with pytest.raises(ValueError, match="1 to 1,000 characters"):
        await store.retention.find(text="")
