"""The FastAPI integration: the life of the store, and who calls."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import fastapi_helpers
import httpx
import pytest
from fastapi import FastAPI, Request
from fastapi_helpers import Bench, build_app, running

from agent_gateway_store import GatewayStore, errors
from agent_gateway_store.integrations.fastapi import StoreDep, get_store, http_exception_of, lifespan

bench = fastapi_helpers.bench


async def test_store_is_open_while_the_application_runs() -> None:
    """The host's own lifespan runs inside, its state is passed on, and the store is closed last."""
    store, seen = GatewayStore(), []

    @asynccontextmanager
    async def own(app: FastAPI) -> AsyncIterator[dict[str, Any]]:
        seen.append(await store.audit.list_recent(limit=1))
        yield {"greeting": "hello"}
        seen.append(await store.audit.list_recent(limit=1))

    async with lifespan(store, inner=own)(FastAPI()) as state:
        given = dict(state)

    assert (given["greeting"], seen) == ("hello", [[], []])
    with pytest.raises(errors.StoreNotOpenError):
        await store.audit.list_recent(limit=1)


async def test_mounted_application_has_the_same_store_each_time_it_starts() -> None:
    """Through the state of the server; without a store of the host's each start makes one from the environment."""
    app, mounted = FastAPI(lifespan=lifespan()), FastAPI()

    @mounted.get("/same")
    async def same(request: Request, store: StoreDep) -> bool:
        return store is outer["agent_gateway_store"] and not await store.audit.list_recent()

    app.mount("/v2", mounted)
    for _ in range(2):
        async with app.router.lifespan_context(app) as state:
            outer: dict[str, Any] = dict(state or {})

            async def with_state(scope: Any, receive: Any, send: Any, outer: Any = outer) -> None:  # as a server does
                await app({**scope, "state": outer.copy()}, receive, send)

            transport = httpx.ASGITransport(with_state)
            async with httpx.AsyncClient(transport=transport, base_url="http://gateway") as client:
                assert (await client.get("/v2/same")).json() is True


async def test_dependencies_answer_without_a_store_and_without_the_handlers() -> None:
    """503 for a store that was never opened; 401 does not hang on `install_error_handlers`."""
    store = GatewayStore()
    app = build_app(store)
    transport = httpx.ASGITransport(app, raise_app_exceptions=False)

    async with httpx.AsyncClient(transport=transport, base_url="http://gateway") as client:
        missing = await client.get("/whoami", headers={"X-API-Key": "agw_x"})
        app.dependency_overrides[get_store] = lambda: store
        closed = await client.get("/follow", params={"token": "t"}, headers={"X-API-Key": _unknown_key()})
    async with running(build_app(GatewayStore(), is_handling=False)) as client:
        refused = await client.get("/whoami")

    assert (missing.status_code, closed.status_code, refused.status_code) == (503, 503, 401)


async def test_either_header_names_the_caller(bench: Bench) -> None:
    """Bearer, in any case, and X-API-Key do the same."""
    headers = await bench.key("dev-agent", org_id="acme")
    key = headers["Authorization"].split()[1]

    for given in (headers, {"X-API-Key": key}, {"authorization": f"bearer  {key}"}):
        answer = await bench.client.get("/whoami", headers=given)
        assert (answer.status_code, answer.json()["caller_id"], answer.json()["org_id"]) == (200, "dev-agent", "acme")


async def test_bad_keys_get_one_answer(bench: Bench) -> None:
    """Missing, garbage, unknown, revoked, doubled: no reason is given away, and no key is repeated."""
    good = await bench.key("dev-agent")
    key = good["Authorization"].split()[1]
    gone = await bench.key("gone")
    await bench.store.keys.revoke("gone")
    both = [("Authorization", f"Bearer {key}"), ("X-API-Key", key)]
    given: list[Any] = [
        {},
        {"Authorization": ""},
        {"Authorization": "Bearer"},
        {"Authorization": f"Basic {key}"},
        {"X-API-Key": ""},
        {"X-API-Key": "x" * 10_000},
        {"X-API-Key": b"\xff\x00\xfe".replace(b"\x00", b"")},
        {"X-API-Key": _unknown_key()},
        {"Authorization": f"Bearer {key[:-1]}!"},
        gone,
        both,
        [both[0], both[0]],
        [both[1], ("X-API-Key", "other")],
    ]

    answers = [await bench.client.get("/whoami", headers=headers) for headers in given]

    assert {answer.status_code for answer in answers} == {401}
    assert {answer.headers["WWW-Authenticate"] for answer in answers} == {"Bearer"}
    assert {answer.text for answer in answers} == {'{"detail":"Invalid API key: ask the operator for a new one."}'}


async def test_key_of_another_organisation_is_no_key(bench: Bench) -> None:
    """A store bound to one organisation takes its keys only; a caller's store sees its organisation only."""
    acme, globex = await bench.key("a", org_id="acme"), await bench.key("b", org_id="globex")
    _, token = await bench.ask(org_id="acme")
    bench.app.dependency_overrides[get_store] = lambda: bench.store.for_org("acme")

    mine = await bench.client.get("/follow", params={"token": token}, headers=acme)
    foreign_key = await bench.client.get("/whoami", headers=globex)
    bench.app.dependency_overrides.clear()
    foreign_token = await bench.client.get("/follow", params={"token": token}, headers=globex)

    assert (mine.status_code, mine.json()) == (200, "PENDING")
    assert foreign_key.status_code == 401
    assert (foreign_token.status_code, foreign_token.json()["detail"]) == (
        404,
        "Approval not found: check the token or the approval id.",
    )


async def test_key_is_described_in_openapi(bench: Bench) -> None:
    """Both ways to give the key are named; the dependency's own arguments are none of the API's."""
    schema = (await bench.client.get("/openapi.json")).json()

    assert {name for way in schema["paths"]["/whoami"]["get"]["security"] for name in way} == {
        "HTTPBearer",
        "APIKeyHeader",
    }
    assert "parameters" not in schema["paths"]["/whoami"]["get"]


def test_refusals_say_their_own_sentence() -> None:
    """What the caller can mend is told as the store tells it; what JSON cannot hold is replaced."""
    cases: list[tuple[errors.GatewayStoreError, int]] = [
        (errors.InvalidApiKeyError(), 401),
        (errors.ApprovalNotFoundError(), 404),
        (errors.ApprovalAlreadyDecidedError("Decided."), 409),
        (errors.ApprovalAlreadyUsedError("Used."), 409),
        (errors.ApprovalAlreadyVotedError("Voted."), 409),
        (errors.ApprovalNotApprovedError("Pending."), 409),
        (errors.ApprovalExpiredError("Expired."), 410),
        (errors.ApprovalMismatchError("Another."), 403),
        (errors.SelfApprovalError("Self."), 403),
        (errors.DecisionVetoedError("No."), 403),
        (errors.ApiKeyNotFoundError("a"), 404),
        (errors.ApiKeyExistsError("a"), 409),
        (errors.InvalidCursorError("Cursor."), 400),
    ]
    answers = [http_exception_of(error) for error, _ in cases]

    assert [(answer.status_code, answer.detail) for answer in answers] == [(status, str(e)) for e, status in cases]
    assert http_exception_of(errors.SelfApprovalError("\ud800 asked.")).detail == "\\ud800 asked."


def test_faults_keep_the_operators_hints() -> None:
    """A store that is away may be asked again later; where it is, is not told."""
    for error in (
        errors.StoreUnavailableError("db.internal:5432 is away."),
        errors.AuditUnavailableError("db.internal:5432 is away."),
        errors.StoreNotOpenError("db.internal"),
        errors.SchemaOutOfDateError("db.internal"),
        errors.InvalidUrlError("db.internal"),
        errors.PluginError("db.internal", plugin="p"),
    ):
        answer = http_exception_of(error)
        assert answer.status_code in (500, 503), error
        assert (answer.headers or {}).get("Retry-After") == ("5" if answer.status_code == 503 else None), error
        assert "db.internal" not in answer.detail


def _unknown_key() -> str:
    from agent_gateway_store.keys.format import new_key, new_key_id

    return new_key(new_key_id())
