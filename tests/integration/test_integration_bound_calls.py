"""Whatever happens between question and run, a call runs as it was approved, once, and the log says how it ended."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from datetime import timedelta
from enum import StrEnum
from fractions import Fraction
from functools import partial
from ipaddress import ip_address
from typing import Annotated, Any, NamedTuple

import guard_helpers
import numpy
import pytest
from agents import FunctionTool, WebSearchTool, function_tool, tool_namespace
from fastmcp import Client, FastMCP
from fastmcp_helpers import always
from guard_helpers import CALLER, approve, events, judge
from pydantic import BaseModel, Discriminator, Field, HttpUrl, RootModel, SecretStr, StringConstraints, Tag
from pydantic_ai import Agent, DeferredToolRequests, FunctionToolset
from pydantic_ai.messages import ModelResponse, ToolCallPart
from pydantic_ai.models.function import FunctionModel

from agent_gateway_store import ApprovalRequest, Decision, GatewayStore, ToolCall
from agent_gateway_store.integrations import openai_agents as for_openai
from agent_gateway_store.integrations import pydantic_ai as for_pydantic_ai
from agent_gateway_store.integrations.fastmcp import GatewayMiddleware
from agent_gateway_store.integrations.guard import CallGuard, CallPendingError, CallRefusedError

store = guard_helpers.store


def pay(to: Any) -> ToolCall:
    return ToolCall(server="bank", tool="pay", arguments={"to": to})


async def done() -> str:
    return "done"


class TestGuard:
    """The core of the adapters."""

    async def test_what_sanitize_changes_is_not_the_call(self, store: GatewayStore) -> None:
        """One that masks in place neither widens an approval nor reaches the tool."""

        def mask(call: ToolCall) -> dict[str, Any]:
            call.arguments["to"]["to"] = "***"
            return call.arguments

        one, other = (pay({"to": name}) for name in ("alice", "mallory"))
        guard = CallGuard(store, judge, sanitize=mask)
        with pytest.raises(CallPendingError):
            await guard.run(one, CALLER, done)
        await approve(store)
        with pytest.raises(CallPendingError):
            await guard.run(other, CALLER, done)
        assert await guard.run(one, CALLER, done) == "done"
        assert "alice" in str(one.arguments)
        async with store.audit.call(other, CALLER, decision=Decision.ALLOW, sanitize=mask) as event:
            assert "mallory" in str(other.arguments)
        assert event.raw_args_hash == store.hash_args(other.arguments)

    async def test_a_released_call_runs_once(self, store: GatewayStore) -> None:
        released = await CallGuard(store, judge).release(ToolCall(server="s", tool="free"), CALLER)
        assert await released.run(done) == "done"
        with pytest.raises(CallRefusedError, match="ran before"):
            await released.run(done)
        assert len(await events(store)) == 1

    async def test_an_object_whose_text_may_lie_is_not_approved(self, store: GatewayStore) -> None:
        """Two secrets look the same; a call that needs no human runs."""
        guard = CallGuard(store, judge)
        with pytest.raises(CallRefusedError, match=r"an object of the type pydantic\.types\.SecretStr among"):
            await guard.run(pay([{"deep": SecretStr("x")}]), CALLER, done)
        # Of these the text says all.
        known = [timedelta(1), Fraction(1, 3), ip_address("::1"), HttpUrl("https://a.example"), numpy.int64(3)]
        with pytest.raises(CallPendingError):
            await guard.run(pay(known), CALLER, done)
        free = ToolCall(server="s", tool="free", arguments={"secret": SecretStr("x")})
        assert await guard.run(free, CALLER, done) == "done"

    async def test_an_approval_is_for_the_types_that_were_asked_for(self, store: GatewayStore) -> None:
        """Two calls whose JSON is the same may do different things."""
        guard, same = CallGuard(store, judge), Frozen()
        circle: list[Any] = [Box(1, 2)]
        circle.append(circle)
        pairs: list[tuple[Any, Any]] = [
            ([1, 2], Box(1, 2)),
            ((1, 2), Box(1, 2)),
            ({"n": 0}, same),
            ([same, {"n": 0}], [{"n": 0}, same]),
            ([same, same], [same, {"n": 0}]),
            ([{"n": 0}], [OrderedDict(n=0)]),
            ({Mode.ALL: 1}, {"all": 1}),
            ([{Mode.ALL: 1}, {"all": 1}], [{"all": 1}, {Mode.ALL: 1}]),
            ({Place("x")}, {Other("x")}),
            ({Place(Mode.ALL), Other("all")}, {Place("all"), Other(Mode.ALL)}),
            (circle, [[1, 2], [Box(1, 2), circle]]),
            (Numbers(["a", "b"]), {"root": ["a", "b"]}),
        ]
        for n, (asked, sent) in enumerate(pairs):
            calls = [ToolCall(server="bank", tool=f"pay{n}", arguments={"to": each}) for each in (asked, sent)]
            for call in calls:
                with pytest.raises(CallPendingError):
                    await guard.run(call, CALLER, done)
                await approve(store)
            assert [await guard.run(call, CALLER, done) for call in calls] == ["done"] * 2, n

    async def test_an_approval_of_plain_json_has_no_types(self, store: GatewayStore) -> None:
        """What was asked for without them, by `acquire` or by an earlier version, releases the call."""
        twice: list[Any] = [1, 2.5, "$int:3", None, True]
        call = pay({"a": twice, "b": [twice, {"ä": twice}]})
        shown = {"caller_id": CALLER.caller_id, "tool_call": pay("[hidden]"), "risk_explanation": "why"}
        request = ApprovalRequest(request_id="r-1", **shown)
        await store.approvals.acquire(request, call=call)
        await approve(store)
        assert await CallGuard(store, judge).run(call, CALLER, done) == "done"


async def test_the_status_of_an_error_is_found_among_its_causes(store: GatewayStore) -> None:
    """Also where these lead in a circle, which Python allows."""
    for error in (
        ExceptionGroup("one", [TimeoutError()]),
        in_a_circle(ValueError("x"), KeyError("y")),
        in_a_circle(ValueError("x"), TimeoutError("y")),
    ):
        with pytest.raises((ValueError, ExceptionGroup)):
            async with store.audit.call(pay("alice"), CALLER, decision=Decision.ALLOW):
                raise error
    assert [each.execution_status for each in await events(store)] == ["TIMEOUT", "TOOL_ERROR", "TIMEOUT"]


def in_a_circle(first: BaseException, second: BaseException) -> BaseException:
    first.__cause__, second.__cause__ = second, first
    return first


class Read(BaseModel):
    """What was approved."""

    path: str


class Delete(BaseModel):
    """What looks the same as JSON."""

    path: str


@dataclass(frozen=True)
class Place:
    """As `Read`, for sets."""

    path: str


@dataclass(frozen=True)
class Other:
    """As `Delete`, for sets."""

    path: str


class Box(NamedTuple):
    """A list in JSON."""

    lo: int
    hi: int


class Mode(StrEnum):
    """A text in JSON."""

    ALL = "all"


class Frozen(BaseModel, frozen=True):
    """One object that stands at several places, as a default does."""

    n: int = 0


class Numbers(RootModel[list[str]]):
    """As the pages of Pydantic show it."""

    def __iter__(self) -> Any:
        return iter(self.root)


def kind(value: Any) -> str:
    return value["op"] if isinstance(value, dict) else type(value).__name__


Either = Annotated[Annotated[Read, Tag("Read")] | Annotated[Delete, Tag("Delete")], Discriminator(kind)]


async def act(what: Either) -> str:
    raise AssertionError(what)


async def delete_rows(rows: list[int] | Box) -> str:
    raise AssertionError(rows)


Stripped = Annotated[str, StringConstraints(strip_whitespace=True)]


async def purge(what: Annotated[Mode | Stripped, Field(union_mode="left_to_right")]) -> str:
    raise AssertionError(what)


DEFAULT = Frozen()
Some = Annotated[dict[str, Any] | Frozen, Field(union_mode="left_to_right")]


async def wipe(one: Some = DEFAULT, other: Some = DEFAULT) -> str:
    raise AssertionError(one, other)


@pytest.mark.parametrize(
    ("tool", "asked", "sent"),
    [
        (act, {"what": {"op": "Read", "path": "x"}}, {"what": {"op": "Delete", "path": "x"}}),
        (delete_rows, {"rows": [1, 900]}, {"rows": {"lo": 1, "hi": 900}}),
        (purge, {"what": " all"}, {"what": "all"}),
        (wipe, {}, {"one": {"n": 0}}),
    ],
)
async def test_pydantic_ai_tells_objects_apart_whose_json_is_the_same(
    store: GatewayStore, tool: Any, asked: dict[str, Any], sent: dict[str, Any]
) -> None:
    """The tool receives validated objects, and which class each is decides what happens."""
    for arguments in (asked, sent):
        part = ToolCallPart(tool.__name__, arguments, tool_call_id="c-1")
        model = FunctionModel(lambda *_, part=part: ModelResponse(parts=[part]))
        tools = for_pydantic_ai.GatewayToolset(FunctionToolset([tool]), CallGuard(store, judge), lambda _: CALLER)
        ended = await Agent(model, toolsets=[tools], output_type=[str, DeferredToolRequests]).run("go")
        assert isinstance(ended.output, DeferredToolRequests)
        await approve(store)


class TestOpenAIAgents:
    """What is told apart by name."""

    async def test_two_tools_of_one_name_are_told_apart(self, store: GatewayStore) -> None:
        """By their namespaces; and where they have none, they are refused."""

        @function_tool(name_override="delete")
        async def one(path: str) -> str:
            return path

        @function_tool(name_override="delete")
        async def other(path: str) -> str:
            return path * 2

        tools = for_openai.GatewayTools(CallGuard(store, judge), lambda _: CALLER)
        crm, prod = (
            tool_namespace(name=name, description="d", tools=[tool]) for name, tool in (("crm", one), ("prod", other))
        )
        for wrapped in tools.wrap(*crm, *prod):
            assert await wrapped.needs_approval(Context(), {"path": "a"}, "c-1")
        asked = await store.approvals.list_requests()
        assert sorted(each.tool_call.tool for each in asked) == ["crm.delete", "prod.delete"]
        tools.wrap(one, one)
        with pytest.raises(ValueError, match="Two different tools are named delete"):
            tools.wrap(other)

    async def test_two_tools_without_functions_are_told_apart(self, store: GatewayStore) -> None:
        """Partials, as a host makes them for each run; of one function they are one tool."""

        async def one(_path: str, _context: Any, _given: str) -> str:
            return ""

        async def other(_path: str, _context: Any, _given: str) -> str:
            return ""

        def made(function: Any, **schema: Any) -> FunctionTool:
            return FunctionTool(
                name="pay", description="d", params_json_schema={"type": "object", **schema}, on_invoke_tool=function
            )

        tools = for_openai.GatewayTools(CallGuard(store, judge), lambda _: CALLER)
        tools.wrap(made(partial(one, "a")), made(partial(one, "b"), title="For another user"))
        with pytest.raises(ValueError, match="Two different tools are named pay"):
            tools.wrap(made(partial(other, "a")))

    async def test_a_tool_that_runs_elsewhere_is_refused(self, store: GatewayStore) -> None:
        tools = for_openai.GatewayTools(CallGuard(store, judge), lambda _: CALLER)
        with pytest.raises(TypeError, match="A WebSearchTool runs where the gateway cannot judge it"):
            tools.wrap(WebSearchTool())  # type: ignore[arg-type]


class Context:
    """What the SDK hands to `needs_approval`."""

    context = None


async def test_fastmcp_asks_anew_when_a_tool_takes_something_else(store: GatewayStore) -> None:
    """A default that grew between the question and the second call is part of what runs."""
    ran: list[int] = []

    async def call(limit: int, text: str = "") -> Any:
        gateway = GatewayMiddleware(store, judge, identify=always, approval_wait_s=0.01)
        server: FastMCP[Any] = FastMCP("bank", middleware=[gateway])

        @server.tool(description=text)
        async def transfer(to: str, most: int = limit) -> str:
            ran.append(most)
            return to

        async with Client(server) as client:
            return await client.call_tool("transfer", {"to": "alice"}, raise_on_error=False)

    assert (await call(10)).is_error
    await approve(store)
    assert (await call(10**6)).is_error
    assert ran == []
    assert not (await call(10, "Words for readers.")).is_error
    assert ran == [10]
