"""`StoreModel`: one class that is both the validated Pydantic model and the ORM table.

Stock SQLModel tables validate nothing when built, keep a refused value when assigned to (and commit it), and share ORM
state between copies. Here the Pydantic core validator fills the instance itself, and an assignment is validated before
the ORM sees it. As with any SQLAlchemy row, a change inside a JSON value is not seen: assign a new value.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from copy import deepcopy
from functools import cache
from typing import TYPE_CHECKING, Any, ClassVar, Self

from pydantic import BaseModel, ValidationError
from pydantic_core import InitErrorDetails, PydanticCustomError
from sqlalchemy import Index, MetaData, Table, TextClause, event
from sqlalchemy.orm import registry
from sqlalchemy.orm.attributes import flag_modified, set_attribute
from sqlmodel import SQLModel

from agent_gateway_store.errors import UnreadableRowError
from agent_gateway_store.models.values import ShownAsCard

# With names that follow one rule a violated constraint can be recognised, and Alembic can drop it.
NAMING_CONVENTION = {
    "ix": "ix_%(table_name)s_%(column_0_N_name)s",
    "uq": "uq_%(table_name)s_%(column_0_N_name)s",
    "ck": "ck_%(table_name)s_%(constraint_name)s",
    "fk": "fk_%(table_name)s_%(column_0_N_name)s",
    "pk": "pk_%(table_name)s",
}

_logger = logging.getLogger("agent_gateway_store.storage")
_MISSING = object()
_STATE = "_sa_instance_state"


class UnreadableRow(dict[str, Any]):
    """A row that was altered past the store: looked into, it raises its error.

    Attributes:
        error: Names the row, and says what to do.
        stand_ins: Its values, with one that releases nothing for each that cannot be read.
    """

    def __init__(self, error: UnreadableRowError, stand_ins: dict[str, Any]) -> None:
        super().__init__()
        self.error, self.stand_ins = error, stand_ins

    def __missing__(self, name: str) -> Any:
        raise self.error


def repaired(row: dict[str, Any]) -> dict[str, Any]:
    """Return a row with its stand-ins, for what shows it among others or has changed it already; the log names it."""
    if not isinstance(row, UnreadableRow):
        return row
    _logger.warning("%s", row.error)
    return row.stand_ins


class StoreModel(ShownAsCard, SQLModel, registry=registry(metadata=MetaData(naming_convention=NAMING_CONVENTION))):
    """Base of the tables.

    Wrong values are refused with `pydantic.ValidationError` when constructing and when assigning; a refused value
    leaves the instance as it was. Error texts never repeat the input. JSON values are plain: a session stores an
    assigned one, and not what is edited in place. Nothing here does I/O.
    """

    model_config = {
        "extra": "forbid",
        "validate_assignment": True,
        "hide_input_in_errors": True,
        "arbitrary_types_allowed": True,
    }

    if TYPE_CHECKING:
        __table__: ClassVar[Table]
        __tablename__: ClassVar[str]

    def __new__(cls, *_args: Any, **_data: Any) -> Self:
        # The ORM state is set here: otherwise SQLAlchemy's own __init__ looks for it through Pydantic's __getattr__,
        # which costs more than the validation.
        new: Self = object.__new__(cls)
        if (manager := _manager(cls)) is not None:
            new.__dict__[_STATE] = manager._state_constructor(new, manager)
        return new

    def __init__(self, **data: Any) -> None:
        self._fill(data)

    def _fill(self, obj: Any, **options: Any) -> None:
        # The validator replaces `__dict__`, and the ORM state with it.
        state = self.__dict__.get(_STATE)
        try:
            self.__pydantic_validator__.validate_python(obj, self_instance=self, **options)
        except ValidationError:
            raise
        except Exception as exc:
            # Pydantic calls methods of the values, and passes on what those raise.
            error = PydanticCustomError("unreadable", "A value cannot be read: one of its methods raised an error")
            lines: list[InitErrorDetails] = [{"type": error, "loc": (), "input": None}]
            raise ValidationError.from_exception_data(type(self).__name__, lines, hide_input=True) from exc
        if state is not None:
            self.__dict__[_STATE] = state

    def _adopt(self, values: Mapping[str, Any], fields_set: set[str]) -> None:
        self.__dict__.update(values)
        _set_private(self, fields_set)

    @classmethod
    def from_row(cls, row: Mapping[str, Any]) -> Self:
        """Build a detached instance from a row of our own database, without validating it a second time.

        Args:
            row: Column name to value, as the column types return them; every column of the table.

        Raises:
            UnreadableRowError: It is an `UnreadableRow`.
        """
        new: Self = object.__new__(cls)
        manager = _manager(cls)
        state = manager._state_constructor(new, manager)
        # The same key as the mapper's `identity_key_from_primary_key`, which would cost as much as all the rest.
        state.key = (cls, (row["id"],), None)
        values = new.__dict__
        values.update(row)
        values[_STATE] = state
        _set_private(new, set(_fields(cls)))
        return new

    @classmethod
    def model_validate(  # type: ignore[override]
        cls,
        obj: Any,
        *,
        strict: bool | None = None,
        from_attributes: bool | None = None,
        context: dict[str, Any] | None = None,
        update: dict[str, Any] | None = None,
    ) -> Self:
        """Validate `obj` (a mapping, an instance, or any object with `from_attributes`) into a new instance."""
        if isinstance(obj, StoreModel):
            obj = {name: obj.__dict__[name] for name in type(obj).model_fields if name in obj.__dict__}
        if update:
            if not isinstance(obj, Mapping):
                obj = {name: getattr(obj, name) for name in cls.model_fields if hasattr(obj, name)}
            obj = {**obj, **update}
        new = cls.__new__(cls)
        new._fill(obj, strict=strict, from_attributes=from_attributes, context=context)
        return new

    def __setattr__(self, name: str, value: Any) -> None:
        cls = type(self)
        if name not in cls.model_fields or _STATE not in self.__dict__:
            super().__setattr__(name, value)
            return
        before = self.__dict__.get(name, _MISSING)
        BaseModel.__setattr__(self, name, value)
        # Read again: the validator has replaced `__dict__`. The old value goes back, so that the ORM sees the change.
        values = self.__dict__
        accepted = values.pop(name)
        if before is not _MISSING:
            values[name] = before
        set_attribute(self, name, accepted)
        # The ORM compares with the value before, which may have been edited in place and then looks the same.
        if isinstance(accepted, dict | list | BaseModel):
            flag_modified(self, name)

    def _clone(self, values: dict[str, Any]) -> Self:
        new = type(self).__new__(type(self))
        new._adopt(values, set(self.__pydantic_fields_set__))
        return new

    def _values(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != _STATE}

    def __copy__(self) -> Self:
        return self._clone(self._values())

    def __deepcopy__(self, memo: dict[int, Any] | None = None) -> Self:
        return self._clone(deepcopy(self._values(), memo))

    @classmethod
    def model_construct(  # type: ignore[override]
        cls, _fields_set: set[str] | None = None, **values: Any
    ) -> Self:
        """Build an instance from trusted values, unvalidated (as in Pydantic)."""
        built: Any = super().model_construct(_fields_set, **values)
        new: Self = built._clone(built._values())
        return new

    def model_copy(self, *, update: Mapping[str, Any] | None = None, deep: bool = False) -> Self:
        """Return a copy with no ORM state of its own; `update` is not validated (as in Pydantic)."""
        new = self.__deepcopy__() if deep else self.__copy__()
        if update:
            new.__dict__.update(update)
            new.__pydantic_fields_set__.update(update)
        return new

    def __getstate__(self) -> dict[Any, Any]:
        return {"values": self._values(), "fields_set": self.__pydantic_fields_set__}

    def __setstate__(self, state: dict[Any, Any]) -> None:
        self._adopt(state["values"], state["fields_set"])


metadata = StoreModel.metadata


def index_where(condition: TextClause, *columns: str, name: str | None = None, unique: bool = False) -> Index:
    """Return an index over the rows that fulfil a condition."""
    return Index(name, *columns, unique=unique, postgresql_where=condition, sqlite_where=condition)


@event.listens_for(StoreModel, "load", propagate=True)
@event.listens_for(StoreModel, "refresh", propagate=True)
def _loaded(target: StoreModel, *_: Any) -> None:
    # The ORM builds instances without `__init__`, so Pydantic's own attributes would be missing.
    _set_private(target, type(target).model_fields.keys() & target.__dict__.keys())


@cache
def _manager(cls: type[StoreModel]) -> Any:
    """The ORM's manager of a table class, its mapper configured; None for a class without a table."""
    if (manager := cls.__dict__.get("_sa_class_manager")) is not None:
        manager.registry.configure()
    return manager


@cache
def _fields(cls: type[StoreModel]) -> frozenset[str]:
    return frozenset(cls.model_fields)


def _set_private(target: StoreModel, fields_set: set[str]) -> None:
    object.__setattr__(target, "__pydantic_fields_set__", fields_set)
    object.__setattr__(target, "__pydantic_extra__", None)
    object.__setattr__(target, "__pydantic_private__", None)
