"""Tasks that are cancelled at any moment leave no answer for the next one, and no connection behind."""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest

from agent_gateway_store import ApprovalResult, GatewayStore, StoreSettings, errors
from agent_gateway_store.models.columns import token_digest
from agent_gateway_store.storage.redis_cache import RedisCache
from agent_gateway_store.store import parts_of
from builders import CALL, make_request

pytestmark = [pytest.mark.usefixtures("no_plugins"), pytest.mark.system]

AT_ONCE = 40


@pytest.mark.parametrize(
    ("backend", "number", "seed"),
    [
        ("postgres", 500, 1),
        pytest.param("sqlite", 500, 2, marks=pytest.mark.slow),
        pytest.param("sqlite", 10_000, 3, marks=pytest.mark.slow),
        pytest.param("postgres", 10_000, 4, marks=pytest.mark.slow),
    ],
)
async def test_no_cancelled_task_leaves_its_answer_to_another(
    backend: str,
    number: int,
    seed: int,
    fresh_redis_url: str,
    tmp_path: Any,
    request: pytest.FixtureRequest,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Checks, decisions, uses and waits of many approvals are cancelled at random moments: every answer is of the token
    that was asked for, also what Redis itself answered, and afterwards everything works."""
    make: Callable[[], str] = request.getfixturevalue("migrated_postgres_database")
    url = make() if backend == "postgres" else f"sqlite:///{tmp_path}/gateway.db"
    rng, met, mixed_up = random.Random(seed), Counter[str](), []
    get = RedisCache.get

    async def watched(self: RedisCache, key: str) -> Any:
        found = await get(self, key)
        kind, _, name = key.partition(":")
        if found is not None and kind == "approval" and json.loads(found[0])["token_sha256"] != token_digest(name):
            mixed_up.append(key)
        return found

    monkeypatch.setattr(RedisCache, "get", watched)
    start = time.monotonic()
    settings = StoreSettings(approval_cache_seconds=60)
    async with GatewayStore(url, redis_url=fresh_redis_url, settings=settings) as store:
        approvals = store.approvals
        tokens = [await approvals.issue_token(make_request()) for _ in range(max(50, number // 20))]
        ids = {token: (await approvals.check_token(token)).approval_id for token in tokens}
        for token in tokens[::3]:
            await approvals.approve(token, "approver-0")

        async def one(token: str) -> None:
            works: list[Callable[[], Any]] = [
                lambda: approvals.check_token(token),
                lambda: approvals.check_token(token),
                lambda: approvals.check_token(token, fresh=True),
                lambda: approvals.approve(token, f"approver-{ids[token]}"),
                lambda: approvals.consume_token(token, caller_id="dev-agent", tool_call=CALL),
                lambda: approvals.wait_for_decision(token, timeout_s=5),
            ]
            weights = [8, 4, 2, 1, 1, 1]
            task = asyncio.ensure_future(rng.choices(works, weights)[0]())
            for _ in range(rng.randrange(4)):
                await asyncio.sleep(0)
            await asyncio.sleep(rng.random() ** 4 * 0.15)
            task.cancel()
            try:
                result: ApprovalResult = await task
            except asyncio.CancelledError:
                met["cancelled"] += 1
                return
            except errors.ApprovalError as exc:
                met["refused" if exc.approval_id == ids[token] else "of another"] += 1
                return
            met["answered"] += 1
            assert (result.token, result.approval_id) == (token, ids[token])
            assert result.approver_id in (None, "approver-0", f"approver-{ids[token]}")

        left = iter(range(number * 10))

        async def caller() -> None:
            while met["cancelled"] < number and next(left, None) is not None:
                await one(rng.choice(tokens))

        await asyncio.gather(*(caller() for _ in range(AT_ONCE)))
        # What was cancelled may still roll back.
        async with asyncio.timeout(10):
            while store.database.engine.pool.checkedout():  # type: ignore[attr-defined]
                await asyncio.sleep(0.01)

        assert mixed_up == []
        assert parts_of(store).pubsub.keys_subscribed == 0
        for token in tokens:
            cached, fresh = [await approvals.check_token(token), await approvals.check_token(token, fresh=True)]
            assert cached.approval_id == fresh.approval_id == ids[token]
        token = await approvals.issue_token(make_request())
        await approvals.approve(token, "approver-1")
        used = await approvals.consume_token(token, caller_id="dev-agent", tool_call=CALL)
        assert used.status == "USED"
        assert store.database.engine.pool.checkedout() == 0  # type: ignore[attr-defined]
    print(f"{backend}: {dict(met)}, seed {seed}, {time.monotonic() - start:.1f} s")
    assert met["cancelled"] >= number
    assert met["answered"] > 0
    assert met["of another"] == 0
