"""`SlackCallback`: only signed, fresh clicks of approvers decide, each once."""

from __future__ import annotations

import asyncio
import json
import logging
import random
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import parse_qs, urlencode
from uuid import UUID, uuid4

import pytest
from notifier_helpers import OK, serving
from slack_server import SIGNING_SECRET, Slack, click, signed, slack_running

from agent_gateway_store import errors, hookimpl
from agent_gateway_store.hooks.manager import Plugins
from agent_gateway_store.models.values import ApprovalStatus
from agent_gateway_store.plugins.slack import SlackCallback, SlackReply, SlackSettings, callback

pytestmark = pytest.mark.unit

APPROVAL = uuid4()


@dataclass
class Result:
    status: ApprovalStatus


@dataclass
class RecordedApprovals:
    """Stands where `store.approvals` does; decides what a test says."""

    decisions: list[tuple[Any, ...]] = field(default_factory=list)
    outcome: Any = ApprovalStatus.APPROVED
    takes_s: float = 0

    async def approve(self, *, approval_id: UUID, approver_id: str, note: str, channel: str) -> Result:
        self.decisions.append(("approve", approval_id, approver_id, note, channel))
        await asyncio.sleep(self.takes_s)
        if isinstance(self.outcome, BaseException):
            raise self.outcome
        return Result(self.outcome)


@pytest.fixture
async def slack() -> AsyncIterator[Slack]:
    async with slack_running() as running:
        yield running


@pytest.fixture
def approvals() -> RecordedApprovals:
    return RecordedApprovals()


@pytest.fixture
async def make(slack: Slack, approvals: RecordedApprovals) -> AsyncIterator[Callable[..., SlackCallback]]:
    """Build callbacks; they are closed after the test."""
    made: list[SlackCallback] = []

    def build(*plugins: object, **fields: Any) -> SlackCallback:
        values = {"signing_secret": SIGNING_SECRET, "approvers": {"U024BE7LH": "ann"}, "api_url": slack.api_url}
        loaded = Plugins(plugins, environ={"AGENT_GATEWAY_STORE_LOAD_PLUGINS": ""})
        made.append(SlackCallback(approvals, loaded, SlackSettings(**(values | fields))))
        return made[-1]

    yield build
    for each in made:
        await each.aclose()


Make = Callable[..., SlackCallback]


async def pressed(hook: SlackCallback, slack: Slack, **changes: Any) -> SlackReply:
    """Let Slack send a click."""
    body = click(slack, APPROVAL, **changes)
    return await hook.handle(body, signed(body))


class TestDecisions:
    async def test_quorum(self, make: Make, slack: Slack, approvals: RecordedApprovals) -> None:
        """A voice that does not decide yet is acknowledged to its owner."""
        approvals.outcome = ApprovalStatus.PENDING
        await pressed(make(), slack)

        (said,) = slack.said
        assert "Others must approve" in said["text"]

    async def test_refusal_of_the_store_is_told(self, make: Make, slack: Slack, approvals: RecordedApprovals) -> None:
        """To whoever clicked, and to them alone; its text mentions nobody."""
        approvals.outcome = errors.ApprovalAlreadyDecidedError("Approval was already decided: DENIED by <!channel>.")
        reply = await pressed(make(), slack)

        (said,) = slack.said
        assert reply.status == 200
        assert said["text"] == "Approval was already decided: DENIED by &lt;!channel&gt;."
        assert (said["response_type"], said["replace_original"]) == ("ephemeral", False)

    async def test_outage_can_be_clicked_away(self, make: Make, slack: Slack, approvals: RecordedApprovals) -> None:
        """What was not recorded is said so, and the very same click may come again."""
        approvals.outcome = errors.StoreUnavailableError("postgresql://user:planted@host is away")
        hook, body = make(), click(slack, APPROVAL)

        first = await hook.handle(body, signed(body))
        approvals.outcome = ApprovalStatus.APPROVED
        second = await hook.handle(body, signed(body))

        assert (first.status, second.status) == (200, 200)
        assert len(approvals.decisions) == 2
        assert "could not be recorded" in slack.said[0]["text"]
        assert "planted" not in str(slack.said)

    async def test_slow_store(
        self, make: Make, slack: Slack, approvals: RecordedApprovals, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Slack gets its answer in time; the decision goes on, and its end is told."""
        monkeypatch.setattr(callback, "ANSWER_SECONDS", 0.05)
        approvals.takes_s, approvals.outcome = 0.3, errors.ApprovalExpiredError("The deadline has passed.")
        hook, body = make(), click(slack, APPROVAL)

        async with asyncio.timeout(0.25):
            reply = await hook.handle(body, signed(body))
        said_early = list(slack.said)
        await hook.aclose()

        assert (reply.status, said_early) == (200, [])
        assert slack.said[0]["text"] == "The deadline has passed."

    async def test_slack_that_takes_no_word(self, make: Make, slack: Slack, approvals: RecordedApprovals) -> None:
        approvals.outcome = ApprovalStatus.PENDING
        async with serving(OK) as gone:
            pass
        reply = await pressed(make(), slack, response_url=f"http://127.0.0.1:{gone.port}/x")

        assert reply.status == 200
        assert len(approvals.decisions) == 1


class TestWhoClicks:
    async def test_stranger_is_refused(
        self, make: Make, slack: Slack, approvals: RecordedApprovals, caplog: pytest.LogCaptureFixture
    ) -> None:
        reply = await pressed(make(), slack, user="U0STRANGER")

        assert (reply.status, approvals.decisions) == (200, [])
        assert "not an approver" in slack.said[0]["text"]
        assert "U0STRANGER" in caplog.text
        assert str(APPROVAL) in caplog.text

    @pytest.mark.parametrize("kind", ["sync", "async"])
    async def test_hook_names_the_approver(
        self, make: Make, approvals: RecordedApprovals, slack: Slack, kind: str
    ) -> None:
        """It is told who clicked on what; it may be sync or async."""
        asked: list[tuple[Any, ...]] = []

        class Sync:
            @hookimpl
            def gateway_store_map_approver(
                self, channel: str, user_id: str, user_name: str, approval_id: UUID
            ) -> str | None:
                asked.append((channel, user_id, user_name, approval_id))
                return "bob@example.com"

        class Async:
            @hookimpl
            async def gateway_store_map_approver(self, user_id: str) -> str | None:
                await asyncio.sleep(0)
                return "bob@example.com"

        await pressed(make(Sync() if kind == "sync" else Async()), slack, user="U2")

        assert approvals.decisions[0][2] == "bob@example.com"
        assert asked == ([("slack", "U2", "ann", APPROVAL)] if kind == "sync" else [])

    @pytest.mark.parametrize("fault", ["raises", "hangs", "number", "blank", "list", "none"])
    async def test_failing_hook_refuses(
        self, make: Make, approvals: RecordedApprovals, slack: Slack, monkeypatch: pytest.MonkeyPatch, fault: str
    ) -> None:
        """Whatever it does but name somebody; also before a plugin that would."""
        monkeypatch.setattr(callback, "MAP_SECONDS", 0.1)

        class First:
            @hookimpl
            async def gateway_store_map_approver(self, user_id: str) -> Any:
                if fault == "raises":
                    raise RuntimeError("planted")
                if fault == "hangs":
                    await asyncio.sleep(60)
                return {"number": 7, "blank": " ", "list": ["ann"], "none": None}[fault]

        class Second:
            @hookimpl
            def gateway_store_map_approver(self, user_id: str) -> str:
                return "bob"

        plugins = [First()] if fault == "none" else [First(), Second()]
        reply = await pressed(make(*plugins), slack, user="U2")

        assert (reply.status, approvals.decisions) == (200, [])
        assert "not an approver" in slack.said[0]["text"]

    async def test_other_workspace(self, make: Make, approvals: RecordedApprovals, slack: Slack) -> None:
        """With a team id set, user ids of another workspace count for nothing."""
        await pressed(make(team_id="T0OTHER"), slack)
        assert approvals.decisions == []

        await pressed(make(team_id="T9TK3CUKW"), slack)

        assert len(approvals.decisions) == 1


class TestRequests:
    async def test_only_post_decides(self, make: Make, approvals: RecordedApprovals, slack: Slack) -> None:
        """A link scanner that fetches the address does nothing, not even with a signed body."""
        body = click(slack, APPROVAL)
        for method in ("GET", "HEAD", "PUT", "OPTIONS", "get"):
            reply = await make().handle(body, signed(body), method=method)
            assert (reply.status, reply.headers, approvals.decisions) == (405, {"Allow": "POST"}, [])

    async def test_unsigned(self, make: Make, approvals: RecordedApprovals, slack: Slack) -> None:
        """No signature, another's, of another body or time, or older than five minutes: 401. Too long: 413."""
        body, long = click(slack, APPROVAL), b"payload=" + b"x" * 1_000_001
        good = signed(body)
        stale_time = good | {"X-Slack-Request-Timestamp": str(int(good["X-Slack-Request-Timestamp"]) - 1)}
        hook = make()

        forged = [signed(body, secret="other"), signed(body + b"&"), good | {"X-Slack-Signature": ""}]
        forged += [signed(body, age_s=age_s) for age_s in (310, -310, 86_400)]
        for headers in ({}, stale_time, *forged):
            assert (await hook.handle(body, headers)).status == 401
        assert (await hook.handle(long, signed(long))).status == 413
        assert approvals.decisions == []
        in_lower_case = {name.lower(): value for name, value in signed(body, age_s=290).items()}
        assert (await hook.handle(body, in_lower_case)).status == 200
        assert len(approvals.decisions) == 1

    async def test_signed_but_no_click_of_ours(self, make: Make, approvals: RecordedApprovals) -> None:
        hook = make()
        for body in (
            *(b"", b"payload=", b"payload=null", b"payload=[]", b"payload=%5B" * 3, b"ssl_check=1&token=x"),
            urlencode({"payload": json.dumps({"type": "view_submission"})}).encode(),
            *(
                click(None, APPROVAL, "another_app_button"),
                click(None, "not-a-uuid"),
                click(None, APPROVAL, actions=[]),
            ),
            *(click(None, APPROVAL, actions=None), click(None, APPROVAL, type="block_suggestion")),
            click(None, APPROVAL, user=None),  # type: ignore[arg-type]
        ):
            assert (await hook.handle(body, signed(body))).status == 200
        assert approvals.decisions == []

    @pytest.mark.parametrize(
        "url",
        [
            "http://127.0.0.1:{port}/x",
            "https://hooks.slack.com.evil.example/",
            "https://hooks.slack.com@127.0.0.1:{port}/",
            7,
        ],
    )
    async def test_words_go_to_slack_only(self, make: Make, slack: Slack, url: Any) -> None:
        async with serving(OK) as trap:
            url = url.format(port=trap.port) if isinstance(url, str) else url
            reply = await pressed(make(), slack, user="U0STRANGER", response_url=url)

        assert (reply.status, trap.connections) == (200, 0)


class TestRepeats:
    async def test_same_click_many_times(self, make: Make, approvals: RecordedApprovals, slack: Slack) -> None:
        """At once, and signed anew seconds later: one decision, every answer 200."""
        approvals.takes_s = 0.01
        hook, body = make(), click(slack, APPROVAL)
        headers = signed(body)

        together = await asyncio.gather(*(hook.handle(body, headers) for _ in range(50)))
        later = [await hook.handle(body, signed(body, age_s=age_s)) for age_s in (3, 2, 0)]

        assert {reply.status for reply in (*together, *later)} == {200}
        assert len(approvals.decisions) == 1

    async def test_memory_is_bounded(
        self, make: Make, approvals: RecordedApprovals, slack: Slack, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Only the latest clicks are kept: the store itself refuses older ones."""
        monkeypatch.setattr(callback, "REMEMBERED", 10)
        hook = make()
        bodies = [click(slack, uuid4()) for _ in range(30)]
        for body in bodies:
            await hook.handle(body, signed(body))
        assert len(approvals.decisions) == 30

        await hook.handle(bodies[20], signed(bodies[20]))
        assert len(approvals.decisions) == 30, "the oldest of the ten latest was forgotten"

        await hook.handle(bodies[19], signed(bodies[19]))
        assert len(approvals.decisions) == 31, "more than ten were remembered"


def mutated(rng: random.Random, good: bytes) -> tuple[bytes, dict[Any, Any]]:
    """A hostile request: unsigned or wrongly signed, or rightly signed nonsense."""
    kind = rng.randrange(4)
    if kind == 0:  # nonsense in the headers
        headers: dict[Any, Any] = dict(signed(good))
        name = rng.choice(["X-Slack-Request-Timestamp", "X-Slack-Signature"])
        noise = "".join(chr(rng.randrange(0xD800)) for _ in range(rng.randrange(20)))
        headers[name] = rng.choice([noise, None, b"bytes", 7, "1" * 5000, "nan", "-1", "v0=", "v0=" + "é" * 64])
        return good, headers
    if kind == 1:  # another body under this signature
        place = rng.randrange(len(good))
        return good[:place] + rng.randbytes(3) + good[place + 3 + rng.randrange(2) :], signed(good)
    if kind == 2:  # bytes of any kind, rightly signed
        body = rng.choice(
            [rng.randbytes(40).decode("latin-1").encode(), b"payload=" + rng.randbytes(20).hex().encode()]
        )
        return body, signed(body)
    payload = json.loads(parse_qs(good.decode())["payload"][0])
    _damage(rng, payload)
    body = urlencode({"payload": json.dumps(payload)}).encode()
    return body, signed(body)


def _damage(rng: random.Random, payload: dict[str, Any]) -> None:
    odd = rng.choice([None, 7, [], {}, "", [[]], {"id": None}, True, -1e308])
    action = payload["actions"][0]
    kind = rng.randrange(4)
    if kind == 0:
        payload[rng.choice(["type", "user", "actions"])] = odd
    elif kind == 1:
        action[rng.choice(["action_id", "value", "action_ts"])] = odd
    elif kind == 2:
        payload["user"]["id"] = odd
    else:
        payload["actions"] = [action, action]


@pytest.mark.parametrize("count", [1_000, pytest.param(10_000, marks=pytest.mark.slow)])
async def test_fuzzed_requests(make: Make, approvals: RecordedApprovals, slack: Slack, count: int) -> None:
    rng = random.Random(20261124)
    hook, good = make(), click(slack, APPROVAL)
    statuses: set[int] = set()
    for _ in range(count):
        body, headers = mutated(rng, good)
        reply = await hook.handle(body, headers)
        statuses.add(reply.status)

    assert statuses == {200, 401}
    assert approvals.decisions == []
    assert (await hook.handle(good, signed(good))).status == 200
    assert len(approvals.decisions) == 1  # the request they were made from is a good one


async def test_secrets_are_in_no_log(
    make: Make, slack: Slack, approvals: RecordedApprovals, caplog: pytest.LogCaptureFixture
) -> None:
    """Neither the signing secret nor the response URL, also at DEBUG and in the reprs."""
    approvals.outcome = ApprovalStatus.PENDING
    hook, body = make(), click(slack, APPROVAL)
    with caplog.at_level(logging.DEBUG):
        await hook.handle(body, signed(body))
        await hook.handle(body, signed(body, secret="other"))

    assert len(slack.said) == 1
    for text in (caplog.text, repr(hook), repr(vars(hook)), *(repr(vars(record)) for record in caplog.records)):
        assert SIGNING_SECRET not in text
        assert "planted-response-url" not in text


def test_needs_a_signing_secret() -> None:
    with pytest.raises(ValueError, match="SIGNING_SECRET"):
        SlackCallback(RecordedApprovals(), Plugins(environ={"AGENT_GATEWAY_STORE_LOAD_PLUGINS": ""}))
