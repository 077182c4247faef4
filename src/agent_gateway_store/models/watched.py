"""JSON values that tell the ORM when they are changed in place.

SQLAlchemy sees an assignment, not `row.sanitized_args["k"] = 1`, and would lose it silently. Values of persistent rows
are therefore held in a `dict` and `list` that mark their column as modified at every change, at any depth (the idea of
`sqlalchemy.ext.mutable`, which watches the top level only). Copies and pickles are plain again.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from functools import wraps
from typing import Any

from pydantic import BaseModel
from sqlalchemy.orm.attributes import flag_modified

__all__ = ["plain", "watch"]


def watch(value: Any, owner: Any, key: str) -> Any:
    """Return `value` with every dict and list in it watched; a change marks attribute `key` of `owner` as modified.

    What is watched for this attribute already is returned itself, so that a reference to it goes on working; anything
    else is copied, so that two rows never share one.
    """
    return _watched(value, weakref.ref(owner), key)


def _watched(value: Any, owner: weakref.ref[Any], key: str) -> Any:
    if isinstance(value, _WatchedDict | _WatchedList) and value._owner is owner and value._key == key:
        return value
    if isinstance(value, dict):
        return _WatchedDict(value, owner, key)
    if isinstance(value, list):
        return _WatchedList(value, owner, key)
    if isinstance(value, BaseModel):
        items = {name: _watched(item, owner, key) for name, item in value.__dict__.items()}
        if any(items[name] is not item for name, item in value.__dict__.items()):
            value = value.model_copy()
            value.__dict__.update(items)
    return value


def plain(value: Any) -> Any:
    """Return a copy of `value` in which every dict and list is a plain one."""
    if isinstance(value, dict):
        return {name: plain(item) for name, item in value.items()}
    if isinstance(value, list):
        return [plain(item) for item in value]
    return value


def _noting(method: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(method)
    def noting(self: Any, *args: Any, **kwargs: Any) -> Any:
        result = method(self, *args, **kwargs)
        self._adopt()
        if (owner := self._owner()) is not None:
            flag_modified(owner, self._key)
        return result

    return noting


class _WatchedDict(dict[Any, Any]):
    def __init__(self, value: dict[Any, Any], owner: weakref.ref[Any], key: str) -> None:
        super().__init__(value)
        self._owner, self._key = owner, key
        self._adopt()

    def _adopt(self) -> None:
        _adopt_into(super().__setitem__, self.items(), self._owner, self._key)

    def __reduce_ex__(self, _protocol: Any) -> Any:
        return plain, (plain(self),)

    def setdefault(self, name: Any, default: Any = None) -> Any:
        if name not in self:
            self[name] = default
        return self[name]

    __setitem__ = _noting(dict.__setitem__)
    __delitem__ = _noting(dict.__delitem__)
    __ior__ = _noting(dict.__ior__)
    clear = _noting(dict.clear)
    pop = _noting(dict.pop)
    popitem = _noting(dict.popitem)
    update = _noting(dict.update)


class _WatchedList(list[Any]):
    def __init__(self, value: list[Any], owner: weakref.ref[Any], key: str) -> None:
        super().__init__(value)
        self._owner, self._key = owner, key
        self._adopt()

    def _adopt(self) -> None:
        _adopt_into(super().__setitem__, enumerate(self), self._owner, self._key)

    def __reduce_ex__(self, _protocol: Any) -> Any:
        return plain, (plain(self),)

    __setitem__ = _noting(list.__setitem__)
    __delitem__ = _noting(list.__delitem__)
    __iadd__ = _noting(list.__iadd__)
    __imul__ = _noting(list.__imul__)
    append = _noting(list.append)
    clear = _noting(list.clear)
    extend = _noting(list.extend)
    insert = _noting(list.insert)
    pop = _noting(list.pop)
    remove = _noting(list.remove)
    reverse = _noting(list.reverse)
    sort = _noting(list.sort)


def _adopt_into(
    put: Callable[[Any, Any], None], items: Iterable[tuple[Any, Any]], owner: weakref.ref[Any], key: str
) -> None:
    for place, item in list(items):
        if (kept := _watched(item, owner, key)) is not item:
            put(place, kept)
