"""Whatever is sent as a token or a key: one uniform error, which tells nothing, and never one of a server."""

from __future__ import annotations

import random
import time
from collections.abc import Awaitable, Callable, Iterator
from typing import Any
from uuid import uuid4

import pytest

from agent_gateway_store import GatewayStore, errors
from agent_gateway_store.keys.format import new_key, new_key_id
from builders import CALL, make_request

pytestmark = [pytest.mark.usefixtures("no_plugins"), pytest.mark.system]

SQL = [
    "' OR '1'='1",
    "'; DROP TABLE approval_requests; --",
    '" UNION SELECT token FROM approval_requests --',
    "x' OR token LIKE '%",
    *("$1", ":token", "%(token)s", "{0}", "\\", "%", "_", "NULL", "approval:*", "*\r\nFLUSHALL\r\n"),
]
ALPHABETS = [
    *("\x00", "\ud800\udfff", "\x00\x01\x1f\x7f", "äß漢字🙂", "\u202e\u200b\ufeff", "az09-_", "\r\n\t ", "'\"\\;%_"),
]
HUGE = ["x" * 1_000_000, "\x00" * 1_000_000, "漢" * 1_000_000, "\ud800" * 1_000_000]


def fuzzed(rng: random.Random, number: int, real: list[str]) -> Iterator[str]:
    """So many texts, of which none is right; `real` are such as are near to right ones."""
    yield from ["", " ", *SQL, *HUGE, "agw_", "agw__", str(uuid4())]
    for index in range(number):
        kind = index % 6
        text = "".join(rng.choices(rng.choice(ALPHABETS), k=rng.choice([1, 3, 43, 44, 64, 200, 513])))
        right = rng.choice(real)
        at = rng.randrange(len(right))
        if kind == 0:
            yield text
        elif kind == 1:
            yield "".join(chr(rng.randrange(0x110000)) for _ in range(rng.randrange(1, 60)))
        elif kind == 2:
            yield right[:at] + rng.choice(text) + right[at:]
        elif kind == 3:
            yield rng.choice([right + text[:1], text[:1] + right, right[:at], right[at:] + "=", right.swapcase()])
        elif kind == 4:
            yield rng.choice(SQL).join([right[:at], text[:9]])
        else:
            yield rng.choice([new_key(new_key_id()), f"agw_{text[:12]}_{text}", f"approval:{right}"])


async def refusal(answer: Awaitable[Any]) -> tuple[Any, ...]:
    """Return all that an error tells."""
    try:
        result = await answer
    except Exception as exc:
        return type(exc), str(exc), exc.args, vars(exc), exc.__cause__
    return ("accepted", result)


@pytest.mark.parametrize(
    ("backend", "number", "seed"),
    [
        ("sqlite", 60, 11),
        ("postgres", 90, 12),
        pytest.param("sqlite", 10_000, 13, marks=pytest.mark.slow),
        pytest.param("postgres", 10_000, 14, marks=pytest.mark.slow),
    ],
)
async def test_every_wrong_token_and_key_looks_the_same(
    backend: str, number: int, seed: int, fresh_redis_url: str, tmp_path: Any, request: pytest.FixtureRequest
) -> None:
    """Malformed, near, hostile, huge and foreign ones are refused in the same words as an unknown one."""
    make: Callable[[], str] = request.getfixturevalue("migrated_postgres_database")
    url = make() if backend == "postgres" else f"sqlite:///{tmp_path}/gateway.db"
    rng, start = random.Random(seed), time.monotonic()
    async with GatewayStore(url, redis_url=fresh_redis_url) as store:
        acme, globex = store.for_org("acme"), store.for_org("globex")

        async def ask(view: GatewayStore) -> str:
            return await view.approvals.issue_token(make_request())

        own, foreign = [await ask(acme) for _ in range(3)], [await ask(globex) for _ in range(20)]
        for token in foreign[::2]:
            await globex.approvals.approve(token, "approver-1")
        keys = [(await acme.keys.issue(f"agent-{index}", role="r")).plaintext.get_secret_value() for index in range(3)]
        others = [(await globex.keys.issue(f"agent-{index}", role="r")) for index in range(20)]
        # Right in form, and of a caller who has a key, but not that key.
        wrong = [new_key(other.api_key.key_id) for other in others]

        def by_token(token: str) -> list[Awaitable[Any]]:
            approvals = acme.approvals
            return [
                approvals.check_token(token),
                approvals.approve(token, "approver-1"),
                approvals.consume_token(token, caller_id="dev-agent", tool_call=CALL),
                approvals.wait_for_decision(token, timeout_s=0.001),
                *([approvals.check_token(token, fresh=True)] if rng.random() < 0.1 else []),
            ]

        unknown = errors.ApprovalNotFoundError()
        expected = (type(unknown), str(unknown), unknown.args, {"approval_id": None}, None)
        tried = 0
        for token in [*fuzzed(rng, number, own), *foreign]:
            tried += 1
            for answer in by_token(token):
                assert await refusal(answer) == expected, repr(token[:600])

        invalid = errors.InvalidApiKeyError()
        refused = (type(invalid), str(invalid), invalid.args, {}, None)
        held = [other.plaintext.get_secret_value() for other in others]
        for key in [*fuzzed(rng, number, keys), *held, *wrong, *own]:
            tried += 1
            assert await refusal(acme.keys.verify(key)) == refused, repr(key[:600])

        assert [str((await acme.approvals.check_token(token)).status) for token in own] == ["PENDING"] * 3
        assert {str((await globex.approvals.check_token(token)).status) for token in foreign} == {"PENDING", "APPROVED"}
        assert [(await acme.keys.verify(key)).org_id for key in keys] == ["acme"] * 3
        assert store.database.engine.pool.checkedout() == 0  # type: ignore[attr-defined]
    print(f"{backend}: {tried} tokens and keys, seed {seed}, {time.monotonic() - start:.1f} s")
