"""What an object holds beside its fields: no hash has it, so no approval is bound to it."""

from __future__ import annotations

from collections import Counter
from contextlib import suppress
from dataclasses import InitVar, dataclass
from datetime import UTC, datetime
from functools import cached_property
from itertools import count
from typing import Any, Generic, TypeVar

import pydantic
import pytest
from pydantic import BaseModel, ConfigDict, PrivateAttr, computed_field

from agent_gateway_store.errors import ApprovalError
from agent_gateway_store.models.approval import hash_tool_call
from agent_gateway_store.models.values import ToolCall
from oddities import Level

pytestmark = pytest.mark.unit

Item = TypeVar("Item")


class Sealed(BaseModel):
    """A model with all that Pydantic puts beside fields."""

    model_config = ConfigDict(extra="allow")
    to: str
    _note: str | None = PrivateAttr(None)
    _cents: int = PrivateAttr(0)

    @computed_field  # type: ignore[prop-decorator]
    @cached_property
    def loud(self) -> str:
        return self.to.upper()


class Unlike:
    """A value that cannot be compared."""

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
    """A model of which no two have the same private value."""

    to: str
    _number: int = PrivateAttr(default_factory=count().__next__)


class Incomparable(BaseModel):
    """A model whose private default has no equal."""

    to: str
    _unlike: Unlike = PrivateAttr(Unlike())


class Unset(BaseModel):
    """A model whose private attribute has no default."""

    to: str
    _cents: int | None


@dataclass
class Box(Generic[Item]):
    """A generic dataclass, on whose instances `typing` leaves their type."""

    item: Item


@dataclass
class Order:
    """A dataclass whose values may not be fields."""

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
    """One whose value is in a slot."""

    __slots__ = ("cents", "to")
    to: str


@pydantic.dataclasses.dataclass(config=ConfigDict(extra="allow"))
class Open:
    """One that takes what is no field."""

    to: str


class Marked(dict[str, Any]):
    """A container that may have attributes."""


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
        Open("bob", more=5),  # type: ignore[call-arg]
    ],
)
def test_an_object_with_values_beside_its_fields_is_not_approved(value: Any) -> None:
    """They decide what the tool does, and no hash has them."""
    with pytest.raises(ApprovalError, match=r"an object of the type .* with values outside its fields among"):
        hash_tool_call(ToolCall(server="bank", tool="pay", arguments={"to": value}))


@pytest.mark.parametrize(
    "value",
    [
        *(_sealed(), _sealed(_cents=0), Caching(to="bob"), Unset(to="bob"), Order("bob"), Slotted("bob"), Box[int](1)),
        *(Marked(to="bob"), Counter("a"), Level.NAME),
    ],
)
def test_an_object_with_nothing_beside_its_fields_is_approved(value: Any) -> None:
    """What a property keeps comes from the fields, and a default says nothing; a copy is the same."""
    call = ToolCall(server="bank", tool="pay", arguments={"to": value})
    assert hash_tool_call(call) == hash_tool_call(call.model_copy(deep=True))


def test_a_factory_of_what_is_no_container_is_not_called_again() -> None:
    """It may count, or open a connection."""
    before = Counting(to="bob")
    with suppress(ApprovalError):
        hash_tool_call(ToolCall(server="bank", tool="pay", arguments={"to": before}))
    assert Counting(to="bob")._number == before._number + 1
