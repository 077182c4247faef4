"""What an object holds beside its fields: no hash has it, so no approval is bound to it."""

from __future__ import annotations

import time
import weakref
from collections import ChainMap, Counter, OrderedDict, UserDict, defaultdict, deque
from collections.abc import Iterator, Mapping, Set
from contextlib import suppress
from dataclasses import InitVar, dataclass
from datetime import UTC, datetime
from datetime import time as time_of_day
from decimal import Decimal
from enum import Enum
from functools import cached_property
from itertools import count
from pathlib import PurePosixPath
from types import MappingProxyType
from typing import Any, Generic, TypeVar
from uuid import UUID
from zoneinfo import ZoneInfo

import httpx
import numpy
import pandas
import pydantic
import pytest
from pydantic import AnyUrl, BaseModel, ConfigDict, PrivateAttr, ValidationError, computed_field
from starlette.datastructures import FormData, Headers, QueryParams

from agent_gateway_store.encoding.canonical import canonical_json
from agent_gateway_store.errors import ApprovalError
from agent_gateway_store.models.approval import hash_tool_call
from agent_gateway_store.models.values import ToolCall
from oddities import Level

pytestmark = pytest.mark.unit

Item = TypeVar("Item")


class Sealed(BaseModel):
    model_config = ConfigDict(extra="allow")
    to: str
    _note: str | None = PrivateAttr(None)
    _cents: int = PrivateAttr(0)

    @computed_field  # type: ignore[prop-decorator]
    @cached_property
    def loud(self) -> str:
        return self.to.upper()


class Unlike:
    def __deepcopy__(self, memo: object) -> Unlike:
        return Unlike()

    def __eq__(self, other: object) -> bool:
        raise ValueError("neither equal nor not")

    __hash__ = None  # type: ignore[assignment]


class Caching(BaseModel):
    """A model whose private defaults are copied or made for each instance."""

    to: str
    _tags: list[Any] = PrivateAttr([1])
    _at: datetime = PrivateAttr(datetime(2026, 1, 1, tzinfo=UTC))
    _cache: dict[str, Any] = PrivateAttr(default_factory=dict)


class Counting(BaseModel):
    to: str
    _number: int = PrivateAttr(default_factory=count().__next__)


class Incomparable(BaseModel):
    to: str
    _unlike: Unlike = PrivateAttr(Unlike())


class Unset(BaseModel):
    to: str
    _cents: int | None


@dataclass
class Box(Generic[Item]):
    """A generic dataclass, on whose instances `typing` leaves their type."""

    item: Item


@dataclass
class Order:
    to: str
    cents: InitVar[int] = 0

    def __post_init__(self, cents: int) -> None:
        if cents:
            self.kept = cents

    @cached_property
    def loud(self) -> str:
        return self.to.upper()


@dataclass
class Slotted:
    __slots__ = ("cents", "to")
    to: str


@pydantic.dataclasses.dataclass(config=ConfigDict(extra="allow"))
class Open:
    to: str


class Marked(dict[str, Any]):
    """A container that may have attributes."""


class Kept(Mapping[str, Any]):
    def __init__(self, kept: dict[str, Any]) -> None:
        self.kept = kept

    def __getitem__(self, name: str) -> Any:
        return self.kept[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.kept)

    def __len__(self) -> int:
        return len(self.kept)


class Chosen(Set[str]):
    def __init__(self, kept: frozenset[str]) -> None:
        self.kept = kept

    def __contains__(self, name: object) -> bool:
        return name in self.kept

    def __iter__(self) -> Iterator[str]:
        return iter(self.kept)

    def __len__(self) -> int:
        return len(self.kept)


class Name(str):
    """A text that may have attributes."""


class Rounded(Decimal):
    def __str__(self) -> str:
        return f"{self:.0f}"


class FirstOnly(dict[str, Any]):
    def items(self) -> Any:
        return [(name, each[0]) for name, each in dict.items(self)]


class Alike(Enum):
    ONE = 1
    TWO = 2

    @property
    def value(self) -> int:
        return 0


@dataclass
class Reader:
    row: Any

    def __getattribute__(self, name: str) -> Any:
        found = super().__getattribute__(name)
        return [found] if name == "row" else found


class Link(AnyUrl):
    """A URL that may have attributes."""


class Unsaid(AnyUrl):
    def __repr__(self) -> str:
        return "Unsaid(...)"


@dataclass(init=False)
class Batch(deque[int]):
    """A dataclass with items that are no field."""


PARIS = ZoneInfo("Europe/Paris")
KEPT = UserDict({"to": "bob"})
TWO = [("to", "alice"), ("to", "bob")]
# Classes, and of what an object is made: a dataclass below them is read as they are.
READ_AS_BASE: list[tuple[Any, Any]] = [
    *((str, "x"), (int, 1), (float, 0.5), (bytes, b"x"), (bytearray, b"x"), (Decimal, "9"), (UUID, "0" * 32)),
    *((PurePosixPath, "/x"), (time_of_day, 1), (numpy.float64, 1), (numpy.str_, "x"), (list, [1]), (tuple, [1])),
    *((set, [1]), (frozenset, [1]), (dict, {"a": 1}), (OrderedDict, {"a": 1}), (Counter, "a")),
    *((UserDict, {"a": 1}), (Kept, {"a": 1}), (Chosen, frozenset("a"))),
]


def _sealed(**private: int) -> Sealed:
    made = Sealed(to="bob", more=1)
    for name, value in private.items():
        setattr(made, name, value)
    assert made.loud == "BOB"
    return made


def _with(made: Any, **values: Any) -> Any:
    for name, value in values.items():
        setattr(made, name, value)
    return made


@pytest.mark.parametrize(
    "value",
    [
        _sealed(_cents=500),
        Order("bob", 500),
        _with(Caching(to="bob"), _tags=[2]),
        _with(Caching(to="bob"), _tags=(1,)),
        _with(Caching(to="bob"), _cache={"cents": 500}),
        _with(Caching(to="bob"), _at=datetime(2027, 1, 1, tzinfo=UTC)),
        Counting(to="bob"),
        Incomparable(to="bob"),
        _with(Unset(to="bob"), _cents=None),
        _with(Box[int](1), cents=500),
        _with(Slotted("bob"), cents=500),
        _with(Marked(to="bob"), cents=500),
        [{"deep": _sealed(_note=7)}],
        [Reader(_sealed(_note=7)), Reader(1)],
        Open("bob", more=5),  # type: ignore[call-arg]
        # Forms and other mappings of which a dict has less.
        *(
            QueryParams(TWO),
            FormData(TWO),
            Headers({"to": "bob"}),
            httpx.QueryParams(TWO),
            FirstOnly(to=["alice", "bob"]),
        ),
        *(
            defaultdict(int, to=1),
            ChainMap({"to": 1}, {"to": 2}),
            {"to": 1}.keys(),
            MappingProxyType(FirstOnly(to=[1])),
        ),
        # What classes in C keep beside their items, and what stands for another object.
        *(time.gmtime(0), memoryview(b"bob"), Batch([1]), weakref.proxy(KEPT), numpy.zeros(1, "f8,f8")[0]),
        # Times of which the text has no zone.
        *(datetime(2026, 10, 25, 2, 30, fold=1), time_of_day(2, fold=1), time_of_day(2, tzinfo=PARIS)),
        *(Rounded("1.4"), Alike.ONE, _with(Link("https://a.example"), cents=500), {_with(Name("to"), cents=500): 1}),
        *(Unsaid("https://bob:secret@a.example"), type("Price", (numpy.float32,), {"__repr__": lambda _: "?"})(1)),
    ],
)
def test_an_object_with_values_beside_its_fields_is_not_approved(value: Any) -> None:
    with pytest.raises(ApprovalError, match=r"an object of the type .*( with values outside its fields)? among"):
        hash_tool_call(ToolCall(server="bank", tool="pay", arguments={"to": value}))


@pytest.mark.parametrize(
    "value",
    [
        *(_sealed(), _sealed(_cents=0), Caching(to="bob"), Unset(to="bob"), Order("bob"), Slotted("bob"), Box[int](1)),
        *(Marked(to="bob"), Counter("a"), Level.NAME, KEPT, Kept({"to": "bob"}), Chosen(frozenset("ab"))),
        *(datetime(2026, 10, 25, 2, 30, tzinfo=PARIS, fold=1), pandas.Timestamp(1, unit="ns"), pandas.NaT),
        *(Link("https://a.example"), numpy.float32(0.1), numpy.bool_(1), numpy.datetime64("2026")),
    ],
)
def test_an_object_with_nothing_beside_its_fields_is_approved(value: Any) -> None:
    """What a property keeps comes from the fields, and a default says nothing; a copy is the same."""
    call = ToolCall(server="bank", tool="pay", arguments={"to": value})
    assert hash_tool_call(call) == hash_tool_call(call.model_copy(deep=True))


def test_a_class_below_another_is_approved_where_its_objects_have_nothing_more() -> None:
    for kind, given in READ_AS_BASE:
        below = dataclass(init=False, eq=False)(type("Below", (kind,), {"__annotations__": {"cents": int}}))
        call = ToolCall(server="bank", tool="pay", arguments={"to": below(given)})
        same = ToolCall(server="bank", tool="pay", arguments={"to": kind(given)})
        assert hash_tool_call(call) == hash_tool_call(same), kind
        vars(call.arguments["to"])["cents"] = 500
        with pytest.raises(ApprovalError, match=r"Below with values outside its fields among"):
            hash_tool_call(call)


def test_a_form_is_not_the_arguments_of_a_call_but_shown_in_full_in_the_log() -> None:
    """Of two values of one name a dict would keep one; a mapping that has one of each is taken."""
    for form in (QueryParams(TWO), FormData(TWO), httpx.QueryParams(TWO)):
        with pytest.raises(ValidationError, match="make it a dict"):
            ToolCall(server="mail", tool="send", arguments=form)  # type: ignore[arg-type]
        assert canonical_json({"form": form}) == b'{"form":{"to":["alice","bob"]}}'
    for mapping in (KEPT, MappingProxyType({"to": "bob"}), Counter(to=1)):
        assert ToolCall(server="mail", tool="send", arguments=mapping).arguments == mapping  # type: ignore[arg-type]


def test_a_factory_of_what_is_no_container_is_not_called_again() -> None:
    before = Counting(to="bob")
    with suppress(ApprovalError):
        hash_tool_call(ToolCall(server="bank", tool="pay", arguments={"to": before}))
    assert Counting(to="bob")._number == before._number + 1
