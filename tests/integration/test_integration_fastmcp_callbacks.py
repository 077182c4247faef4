"""The callbacks of a host that guards FastMCP: what one returns, changes or raises runs nothing that was not judged."""

from __future__ import annotations

import json
import re
from functools import partial
from pathlib import Path
from typing import Any

import fastmcp_helpers
import pytest
from fastmcp_helpers import CALLER, SECRET, Bench, judge

from agent_gateway_store import (
    AuditEvent,
    CallerIdentity,
    ToolCall,
)
from agent_gateway_store.integrations.fastmcp import Verdict

bench = fastmcp_helpers.bench

DENIED = Verdict(decision="DENY", rule="r", reason="no")
NO_DECISIONS = ["SANITIZE_AND_ALLOW", "deny", None]


async def test_callbacks_cannot_change_what_runs(bench: Bench) -> None:
    """They are given copies: the call that was hashed is the call that runs."""

    def meddle(caller: CallerIdentity, call: ToolCall) -> Verdict:
        call.arguments["path"] = "other.txt"
        return judge(caller, call)

    def sanitize(call: ToolCall) -> dict[str, Any]:
        call.arguments.clear()
        return {}

    await bench.call(bench.server(meddle, sanitize=sanitize), "read_file", path="a.txt")

    assert bench.ran == ["a.txt"]
    assert (await bench.event()).raw_args_hash == AuditEvent.hash_args({"path": "a.txt"})


async def _failing(*_: Any) -> Any:
    raise ValueError(SECRET)


def _failing_now(*_: Any) -> Any:
    raise KeyError(SECRET)


async def test_broken_callback_runs_nothing(bench: Bench, caplog: pytest.LogCaptureFixture) -> None:
    """The caller is told that the gateway failed; what the callback said stays out of the log."""
    broken: list[tuple[str, Any]] = [
        ("identify", _failing),
        ("identify", lambda _: None),
        ("policy", _failing),
        ("policy", _failing_now),
        ("policy", lambda *_: True),
        *(("policy", lambda *_, said=said: DENIED.model_copy(update={"decision": said})) for said in NO_DECISIONS),
        ("policy", lambda *_: DENIED.model_copy(update={"risk_score": None})),
        ("identify", lambda _: CALLER.model_copy(update={"role": None})),
        ("sanitize", _failing_now),
        ("sanitize", lambda _: 7),
        ("server", _failing),
        ("server", lambda _: None),
        ("server", lambda _: ""),
    ]
    for role, callback in broken:
        caplog.clear()
        server = bench.server(callback) if role == "policy" else bench.server(**{role: callback})
        refusal = await bench.refusal(server, "read_file", path=SECRET)
        event = (await bench.store.audit.list_recent())[0]
        assert refusal == "The gateway failed, so the call was not run: tell its operator."
        assert (event.decision, event.execution_status, bench.ran) == ("DENY", None, [])
        (logged,) = [each.getMessage() for each in caplog.records if each.name.startswith("agent_gateway_store")]
        assert re.search(rf"Request {event.request_id}: {role} \S+ \({re.escape(__file__)}:\d+\)", logged)
        assert SECRET not in caplog.text


def _wrong_verdict(_caller: CallerIdentity, call: ToolCall) -> Verdict:
    path: Any = call.arguments["path"]
    return Verdict(decision=path, rule="r", reason="Why.", risk_score=path)  # the line that is named


def _wrong_library(_caller: CallerIdentity, call: ToolCall) -> Verdict:
    return Verdict.model_validate_json(json.dumps(json.loads(call.arguments["path"])))  # the line that is named


class _WrongObject:
    async def __call__(self, _caller: CallerIdentity, call: ToolCall) -> Verdict:
        raise LookupError(call.arguments["path"])  # the line that is named


def _few_arguments(_caller: CallerIdentity) -> Verdict:
    raise AssertionError


async def test_failing_callback_is_named_by_its_own_line(bench: Bench, caplog: pytest.LogCaptureFixture) -> None:
    """The line is the callback's, not that of a library; wrong fields are named, and no value is repeated."""
    own = {
        f"{__file__}:{number}"
        for number, line in enumerate(Path(__file__).read_text(encoding="utf-8").splitlines(), 1)
        if line.endswith("# the line that is named")
    }
    cases: list[tuple[Any, str]] = [
        (_wrong_verdict, r"policy _wrong_verdict .*: ValidationError at OWN.*\(2 wrong: decision, risk_score\)$"),
        (_wrong_library, r"policy _wrong_library .* failed: JSONDecodeError at OWN, .*json.*\.py:\d+$"),
        (_WrongObject(), r"policy _WrongObject .* failed: LookupError at OWN$"),
        (partial(_wrong_verdict), r"policy partial .* failed: ValidationError at OWN"),
        (_few_arguments, r"policy _few_arguments \(\S+:\d+\) failed: TypeError at "),
        (lambda *_: None, r"policy \S+<lambda> .* must return a Verdict, not NoneType\.$"),
        (7, r"policy int failed: TypeError at "),
    ]
    for policy, said in cases:
        caplog.clear()
        await bench.refusal(bench.server(policy), "read_file", path=SECRET)
        (logged,) = [each.getMessage() for each in caplog.records if each.name.startswith("agent_gateway_store")]
        assert re.search(said.replace("OWN", f"(?:{'|'.join(map(re.escape, own))})"), logged), logged
        assert SECRET not in caplog.text
