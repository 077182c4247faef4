"""Two weeks of a gateway's life, from a seed: the same seed, number and end give the same history, to the last digit.

It has office hours and nightly batches, lognormal latencies, and six things to find: a database that was slow during a
nightly batch, a policy that began to ask about exports, a caller that probed for half an hour, prompt injection in
fetched pages, a key that was used from outside the company, and callers that ask again after a denial. Each single
incident has its own hour of the day, which does not depend on the hour of the end, and lies in the last four days, so
that a search of one week finds it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta
from functools import partial
from itertools import accumulate
from random import Random
from uuid import UUID

from agent_gateway_store.demo.world import (
    APPROVERS,
    CALLERS,
    LEAKED,
    PROBED,
    PROBES,
    SLOW,
    SLOWED,
    SOUGHT,
    STOLEN,
    THIEF_ADDRESS,
    TOOLS,
    TROUBLEMAKER,
    Caller,
    Incident,
    Tool,
    address,
)
from agent_gateway_store.models.approval import ApprovalRequest, ApprovalVote, VoteDecision, hash_tool_call
from agent_gateway_store.models.audit import AuditEvent, Decision, ExecutionStatus, OutputDecision, RedactionFlag
from agent_gateway_store.models.values import ApprovalStatus, ToolCall

DAYS = 14
# All shares here are made up, and chosen by eye so that each thing to find shows in the plots of 2,000 events, without
# being the first thing that anybody sees.
_PROBE_SHARE = 0.012
_PROBE_COVER = 0.2
_STOLEN_SHARE = 0.006
# So that few events show the slow database, too.
_SLOW_SHARE = 0.003
_RETRY_SHARE = 0.7
_RETRIED_WITHIN = timedelta(hours=1)
_POLICY_CHANGED = timedelta(days=7)
_WAIT_LIMIT = timedelta(hours=1)
_HOUR_S = 3600
_CALLERS = {caller.name: caller for caller in CALLERS}


@dataclass(frozen=True)
class Approval:
    """An approval that has ended, with the vote that decided it (None: nobody decided in time)."""

    request: ApprovalRequest
    vote: ApprovalVote | None


@dataclass(frozen=True)
class Call:
    """One tool call: its audit event, and its approval if a human was asked."""

    event: AuditEvent
    approval: Approval | None = None


def history(count: int, *, seed: int, end: datetime, keys: Mapping[str, str]) -> Iterator[Call]:
    """Yield `count` calls of the two weeks before `end`, oldest first; `keys` are the callers' API key ids."""
    random = Random(seed)  # noqa: S311  reproducible, and no secret comes of it
    maker = _Maker(
        random, end, prefix=hashlib.sha256(f"{seed} {count} {end.isoformat()}".encode()).hexdigest()[:10], keys=keys
    )
    probes = int(count * _PROBE_SHARE)
    cover = round(probes * _PROBE_COVER)
    stolen, slow = int(count * _STOLEN_SHARE), int(count * _SLOW_SHARE)
    usual = random.choices(CALLERS, [each.share for each in CALLERS], k=count - probes - cover - stolen - slow)
    plans: list[tuple[datetime, Callable[[datetime], Call]]] = [
        *((_moment(random, caller, end), partial(maker.usual, caller=caller)) for caller in usual),
        *((_during(PROBED, random, end), partial(maker.usual, caller=_CALLERS[TROUBLEMAKER])) for _ in range(cover)),
        *((_during(SLOW, random, end), partial(maker.usual, caller=_CALLERS[SLOWED])) for _ in range(slow)),
        *((_during(PROBED, random, end), maker.probe) for _ in range(probes)),
        *((_during(STOLEN, random, end), maker.steal) for _ in range(stolen)),
    ]
    for when, make in sorted(plans, key=lambda plan: plan[0]):
        yield make(when)


def _during(incident: Incident, random: Random, end: datetime) -> datetime:
    """Return a time in the incident, during which the usual calls go on."""
    return incident.start(end) + incident.length * random.random()


def _moment(random: Random, caller: Caller, end: datetime) -> datetime:
    """Return a time in the two weeks, by the caller's hours of the day and days of the week."""
    while True:
        start = end - timedelta(seconds=random.random() * DAYS * 24 * _HOUR_S)
        weight = caller.hours[start.hour] * (caller.weekend if start.weekday() >= 5 else 1.0)
        if random.random() * max(caller.hours) < weight:
            return start


@dataclass(frozen=True)
class _Denied:
    """A call that a human denied at this time."""

    at: datetime
    tool: Tool
    arguments: dict[str, object]
    labels: list[str]
    rule: str


class _Maker:
    """Makes calls one after the other; remembers each caller's session, and what it was denied last."""

    def __init__(self, random: Random, end: datetime, *, prefix: str, keys: Mapping[str, str]) -> None:
        self._random, self._end, self._prefix, self._keys = random, end, prefix, keys
        self._slow_from = SLOW.start(end)
        self._number = 0
        self._sessions: dict[str, tuple[str, datetime]] = {}
        self._denied: dict[str, _Denied] = {}
        self._tools = {
            caller.name: ([TOOLS[name] for name in caller.tools], list(accumulate(caller.tools.values())))
            for caller in CALLERS
        }

    def usual(self, when: datetime, caller: Caller) -> Call:
        last = self._denied.get(caller.name)
        if last and last.at <= when < last.at + _RETRIED_WITHIN and self._random.random() < _RETRY_SHARE:
            del self._denied[caller.name]
            return self._call(
                when, caller, last.tool, last.arguments, last.labels, Decision.APPROVAL_REQUIRED, last.rule
            )
        tools, weights = self._tools[caller.name]
        tool = self._random.choices(tools, cum_weights=weights)[0]
        labels = [label for label, share in tool.labels.items() if self._random.random() < share]
        decision = self._decide(tool, caller, labels, when)
        rule = tool.rule
        if tool.full_name == "crm.export_contacts" and when >= self._end - _POLICY_CHANGED:
            rule = "exports-need-approval"
        return self._call(when, caller, tool, tool.arguments(self._random), labels, decision, rule)

    def probe(self, when: datetime) -> Call:
        name, arguments, rule, label = self._random.choice(PROBES)
        return self._call(when, _CALLERS[TROUBLEMAKER], TOOLS[name], arguments, [label, "PROBING"], Decision.DENY, rule)

    def steal(self, when: datetime) -> Call:
        tool = TOOLS["github.search_code"]
        arguments = tool.arguments(self._random) | {"query": self._random.choice(SOUGHT)}
        return self._call(when, _CALLERS[LEAKED], tool, arguments, [], Decision.ALLOW, tool.rule, client=THIEF_ADDRESS)

    def _decide(self, tool: Tool, caller: Caller, labels: list[str], when: datetime) -> Decision:
        if "PROMPT_INJECTION" in labels:
            return self._random.choice((Decision.DENY, Decision.SANITIZE_AND_ALLOW))
        asks, denied = tool.asks, tool.denied
        if tool.full_name == "crm.export_contacts" and when >= self._end - _POLICY_CHANGED:
            asks = 0.95
        if caller.name == TROUBLEMAKER:
            denied = max(denied, 0.12)
        drawn = self._random.random()
        for share, decision in (
            (asks, Decision.APPROVAL_REQUIRED),
            (denied, Decision.DENY),
            (tool.cleaned, Decision.SANITIZE_AND_ALLOW),
        ):
            if drawn < share:
                return decision
            drawn -= share
        return Decision.ALLOW

    def _call(
        self,
        when: datetime,
        caller: Caller,
        tool: Tool,
        arguments: dict[str, object],
        labels: list[str],
        decision: Decision,
        rule: str,
        *,
        client: str | None = None,
    ) -> Call:
        self._number += 1
        request_id = f"req-{self._prefix}-{self._number:07}"
        approval = None
        if decision is Decision.APPROVAL_REQUIRED:
            approval = self._approval(when, caller, tool, arguments, request_id)
        is_run = decision in (Decision.ALLOW, Decision.SANITIZE_AND_ALLOW) or (
            approval is not None and approval.request.status is ApprovalStatus.USED
        )
        status, latency_ms = self._run(tool, when) if is_run else (None, self._random.randrange(1, 6))
        if approval is not None and status is not None:
            approval.request.outcome = str(status)
        if approval is not None and approval.request.status is ApprovalStatus.DENIED:
            at = approval.request.decision_at or when
            self._denied[caller.name] = _Denied(at, tool, arguments, labels, rule)
        flags = []
        if decision is Decision.SANITIZE_AND_ALLOW:
            first = next(iter(arguments))
            flags.append(RedactionFlag(field=f"sanitized_args.{first}", reason="PERSONAL_DATA"))
        risk = min(1.0, max(0.0, self._random.gauss(tool.risk + 0.1 * ("PROBING" in labels), 0.06)))
        event = AuditEvent(
            request_id=request_id,
            trace_id=f"{self._random.getrandbits(128):032x}",
            session_id=self._session(caller, when),
            timestamp=when,
            caller_id=caller.name,
            caller_role=caller.role,
            key_id=self._keys.get(caller.name),
            environment=caller.environment,
            mcp_server=tool.server,
            tool_name=tool.name,
            raw_args_hash=AuditEvent.hash_args(arguments),
            sanitized_args=arguments,
            risk_labels=labels,
            risk_score=round(risk, 3),
            matched_policy_rule=rule,
            policy_version="v42" if when >= self._end - _POLICY_CHANGED else "v41",
            decision=decision,
            approver_id=approval.request.approver_id if approval else None,
            approval_id=approval.request.approval_id if approval and is_run else None,
            execution_status=status,
            latency_ms=latency_ms,
            output_decision=OutputDecision.REDACT if "PERSONAL_DATA" in labels and is_run else OutputDecision.ALLOW,
            redaction_flags=flags,
            extra={"client": client or address(caller.name)},
            deterministic_rationale=f"Rule {rule} says {decision} to {tool.full_name} for the role {caller.role}.",
        )
        return Call(event, approval)

    def _run(self, tool: Tool, when: datetime) -> tuple[ExecutionStatus, int]:
        latency, fails = self._random.lognormvariate(0.0, tool.spread) * tool.median_ms, tool.fails
        if tool.server == "postgres" and self._slow_from <= when < self._slow_from + SLOW.length:
            latency, fails = latency * 14, 0.35
        drawn = self._random.random()
        if drawn < fails * 0.6:
            return ExecutionStatus.TOOL_ERROR, max(1, round(latency * 0.7))
        if drawn < fails:
            return ExecutionStatus.TIMEOUT, 30_000
        return ExecutionStatus.SUCCESS, max(1, min(30_000, round(latency)))

    def _session(self, caller: Caller, when: datetime) -> str:
        name, last = self._sessions.get(caller.name, ("", when))
        if not name or when - last > timedelta(minutes=20) or self._random.random() < 0.02:
            name = f"ses-{self._random.getrandbits(48):012x}"
        self._sessions[caller.name] = (name, when)
        return name

    def _approval(
        self, when: datetime, caller: Caller, tool: Tool, arguments: dict[str, object], request_id: str
    ) -> Approval:
        approval_id = UUID(int=self._random.getrandbits(128), version=4)
        call = ToolCall(server=tool.server, tool=tool.name, arguments=arguments)
        by_night = 6.0 if not 7 <= when.hour < 18 or when.weekday() >= 5 else 1.0
        wait = timedelta(seconds=self._random.lognormvariate(5.0, 1.1) * by_night)
        drawn = self._random.random()
        status = ApprovalStatus.USED if drawn < 0.8 else ApprovalStatus.DENIED if drawn < 0.97 else None
        if when + _WAIT_LIMIT > self._end:
            wait, status = min(wait, (self._end - when) / 2), status or ApprovalStatus.DENIED
        elif wait > _WAIT_LIMIT or status is None:
            status, wait = ApprovalStatus.EXPIRED, _WAIT_LIMIT
        is_decided = status is not ApprovalStatus.EXPIRED
        approver = self._random.choices([n for n, _ in APPROVERS], [w for _, w in APPROVERS])[0] if is_decided else None
        note = "" if approver is None else self._random.choice(("", "", "ok", "as agreed", "checked with the team"))
        if status is ApprovalStatus.DENIED:
            note = self._random.choice(("not without a ticket", "wrong environment", "ask again with less data"))
        request = ApprovalRequest(
            approval_id=approval_id,
            request_id=request_id,
            caller_id=caller.name,
            tool_call=call,
            tool_call_hash=hash_tool_call(call),
            risk_explanation=f"{tool.full_name} is not undone easily." if tool.risk > 0.7 else f"Rule {tool.rule}.",
            created_at=when,
            expires_at=when + _WAIT_LIMIT,
            use_before=when + _WAIT_LIMIT,
            status=status,
            approver_id=approver,
            decision_at=when + wait if is_decided else None,
            approver_note=note,
            used_at=when + wait + timedelta(seconds=1) if status is ApprovalStatus.USED else None,
            version=3 if status is ApprovalStatus.USED else 2,
        )
        if approver is None:
            return Approval(request, None)
        voted = VoteDecision.DENIED if status is ApprovalStatus.DENIED else VoteDecision.APPROVED
        channel = self._random.choice(("slack", "slack", "inbox", "cli"))
        vote = ApprovalVote(
            approval_id=approval_id,
            approver_id=approver,
            decision=voted,
            note=note,
            channel=channel,
            voted_at=when + wait,
        )
        return Approval(request, vote)
