"""The records of the store as answers of a FastAPI application: pages, and what no answer may hold."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Callable
from typing import Any

import httpx
import pytest
from fastapi import FastAPI
from fastapi.encoders import jsonable_encoder
from fastapi_helpers import CALL, running
from pydantic import BaseModel, TypeAdapter, ValidationError

from agent_gateway_store import (
    ApiKey,
    ApprovalRequest,
    ApprovalResult,
    ApprovalScope,
    ApprovalVote,
    AuditEvent,
    CallerIdentity,
    GatewayStore,
    IssuedKey,
    NotificationDelivery,
    Page,
    TrustLevel,
)
from agent_gateway_store.evidence import Evidence, check
from agent_gateway_store.integrations.fastapi import StoreDep, lifespan
from agent_gateway_store.results import Stats
from builders import make_event

OUTPUT = "withheld output"
RECORDS: tuple[Any, ...] = (
    AuditEvent,
    ApiKey,
    ApprovalRequest,
    ApprovalResult,
    ApprovalVote,
    CallerIdentity,
    IssuedKey,
    NotificationDelivery,
    dict[str, int],
    int,
    Any,
)


@pytest.fixture
async def store() -> AsyncIterator[GatewayStore]:
    """A store on a SQLite file."""
    async with GatewayStore() as opened:
        yield opened


async def _asked(store: GatewayStore) -> tuple[ApprovalRequest, str]:
    """Ask for the release of an output; returns the request that has its token, and the token."""
    request = ApprovalRequest(
        request_id="r-1",
        caller_id="dev-agent",
        tool_call=CALL,
        risk_explanation="Personal data.",
        scope=ApprovalScope.OUTPUT_RELEASE,
        output_payload={"text": OUTPUT},
    )
    token = await store.approvals.issue_token(request)
    return request.model_copy(update={"token": token}), token


async def test_page_is_an_object_with_the_cursor_of_the_next(store: GatewayStore) -> None:
    """A client reads all of a listing, page by page, and OpenAPI names the records."""
    app = FastAPI(lifespan=lifespan())

    @app.get("/events")
    async def events(store: StoreDep, cursor: str | None = None) -> Page[AuditEvent]:
        return await store.audit.search(limit=2, cursor=cursor)

    await store.audit.write_many(make_event(request_id=f"r-{number}") for number in range(5))
    pages, cursor = [], None
    async with running(app) as client:
        while not pages or cursor:
            answer = await client.get("/events", params={"cursor": cursor} if cursor else {})
            pages.append(answer.json())
            cursor = pages[-1]["next_cursor"]
        schema = (await client.get("/openapi.json")).json()["paths"]["/events"]["get"]["responses"]["200"]
    answer_schema = schema["content"]["application/json"]["schema"]

    assert [page.keys() for page in pages] == [{"items", "next_cursor"}] * 3
    assert {event["request_id"] for page in pages for event in page["items"]} == {f"r-{n}" for n in range(5)}
    assert pages[0]["items"][0] == (await store.audit.get_by_request_id("r-4")).model_dump(mode="json")
    assert answer_schema["properties"]["items"]["items"] == {"$ref": "#/components/schemas/AuditEvent"}
    assert answer_schema["required"] == ["items", "next_cursor"]


@pytest.mark.parametrize("record", RECORDS, ids=lambda record: getattr(record, "__name__", str(record)))
def test_every_record_makes_a_page(record: Any) -> None:
    """As a response, as a field of a model, and as JSON that is read back."""
    app = FastAPI()

    async def empty() -> Any:
        raise AssertionError

    app.add_api_route("/page", empty, response_model=Page[record])

    class Envelope(BaseModel):
        page: Page[record]

    assert "/page" in app.openapi()["paths"]
    assert Envelope(page=Page(next_cursor="c")).model_dump_json() == '{"page":{"items":[],"next_cursor":"c"}}'
    read = TypeAdapter(Page[record]).validate_json('{"items":[]}')
    assert (type(read), list(read), read.next_cursor) == (Page, [], None)


def test_page_keeps_what_it_is() -> None:
    """Its cursor, its columns and its records, which are not copied; JSON gives the records back."""
    pages: TypeAdapter[Page[AuditEvent]] = TypeAdapter(Page[AuditEvent])
    page = Page([make_event()], next_cursor="c", columns=("tool_name",), record_type=AuditEvent)
    checked = pages.validate_python(page)
    read = pages.validate_json(pages.dump_json(page))
    stats = Stats([{"caller_id": "a", "calls": 1}], by="caller_id")

    assert checked[0] is page[0]
    assert (checked.next_cursor, checked.columns, checked.record_type) == ("c", ("tool_name",), AuditEvent)
    assert (read, read.next_cursor) == (page, "c")
    assert TypeAdapter(Stats).validate_python(stats).by == ("caller_id",)
    assert pages.validate_python([page[0]]) == page


@pytest.mark.parametrize(
    "wrong", [7, {}, {"items": [1]}, {"items": [], "total": 1}, [1], {"items": [], "next_cursor": 1}]
)
def test_page_of_something_else_is_refused(wrong: Any) -> None:
    """As any other type does."""
    with pytest.raises(ValidationError):
        TypeAdapter(Page[AuditEvent]).validate_python(wrong)


async def test_stats_are_an_answer(store: GatewayStore) -> None:
    """The rows of the groups."""
    app = FastAPI(lifespan=lifespan())

    @app.get("/stats")
    async def stats(store: StoreDep) -> Stats:
        return await store.audit.stats(by="tool_name")

    await store.audit.write(make_event())
    async with running(app) as client:
        answer = (await client.get("/stats")).json()

    assert [(row["tool_name"], row["calls"]) for row in answer["items"]] == [(make_event().tool_name, 1)]


async def test_no_answer_holds_a_hash_of_a_key_a_token_or_a_withheld_output(store: GatewayStore) -> None:
    """However the endpoint is annotated, and with the record as it was handed in, too."""
    issued = await store.keys.issue("dev-agent", role="developer")
    rotated = await store.keys.rotate("dev-agent")
    request, token = await _asked(store)
    checked = await store.approvals.check_token(token)
    (read,) = await store.approvals.list_requests()
    values: list[tuple[Any, Any]] = [
        (list[ApiKey], await store.keys.list()),
        (Page[ApiKey], await store.keys.list()),
        (None, await store.keys.list()),
        (ApiKey, rotated.api_key),
        (None, rotated.api_key),
        (IssuedKey, rotated),
        (None, {"issued": rotated, "keys": [issued.api_key]}),
        (ApprovalRequest, request),
        (Page[ApprovalRequest], Page([request, read])),
        (None, [request, read]),
        (ApprovalResult, checked),
        (None, checked),
        (dict[str, Any], {"result": checked, "request": request}),
    ]
    app = FastAPI()
    for number, (model, value) in enumerate(values):
        app.add_api_route(f"/{number}", _returning(value), response_model=model)
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://gateway") as client:
        answers = [await client.get(f"/{number}") for number in range(len(values))]
    (key,) = await store.keys.list()
    secrets = [
        *(each.plaintext.get_secret_value() for each in (issued, rotated)),
        *(hashed for hashed in (key.key_hash, key.previous_key_hash) if hashed),
        *(token, OUTPUT),
    ]

    assert checked.token == token
    assert {answer.status_code for answer in answers} == {200}
    for answer in answers:
        assert [secret for secret in secrets if json.dumps(secret)[1:-1] in answer.text] == []
        assert '"key_hash"' not in answer.text
        assert '"token"' not in answer.text


def _returning(value: Any) -> Callable[[], Any]:
    async def endpoint() -> Any:
        return value

    return endpoint


async def test_record_that_is_read_still_has_what_its_json_leaves_out(store: GatewayStore) -> None:
    """Attributes, copies and `to_dicts` of an analyst are whole; `to_dicts` never had a secret."""
    request, token = await _asked(store)
    issued = await store.keys.issue("dev-agent", role="developer", trust_level=TrustLevel.HIGH)
    key = issued.api_key
    (read,) = await store.approvals.list_requests()

    assert (request.token, request.model_copy(deep=True).token) == (token, token)
    assert ApiKey.model_validate(key).key_hash == key.key_hash
    assert Page([read]).to_dicts()[0]["output_payload"] == {"text": OUTPUT}
    assert (await store.keys.verify(issued.plaintext)).trust_level == TrustLevel.HIGH
    for dumped in (key.model_dump(), jsonable_encoder(key), *Page([key]).to_dicts()):
        assert dumped.keys() & {"key_hash", "previous_key_hash"} == set()
    for dumped in (request.model_dump(), jsonable_encoder(request)):
        assert dumped.keys() & {"token", "output_payload"} == set()


async def test_evidence_is_an_answer(store: GatewayStore) -> None:
    """Its hashes are bytes, which are no text: the answer is the document that `check` takes."""
    app = FastAPI(lifespan=lifespan(store))

    @app.get("/evidence")
    async def answer(opened: StoreDep) -> Evidence:
        await opened.audit.write(make_event(request_id="r-1"))
        await opened.evidence.seal()
        return await opened.evidence.prove("r-1")

    async with running(app) as client:
        answered = await client.get("/evidence")
        described = await client.get("/openapi.json")

    assert (answered.status_code, described.status_code) == (200, 200)
    assert check(answered.text).ok
