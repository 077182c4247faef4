"""Many cases in one test: for those that need a store and leave nothing in it, as each store takes a while to open."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Awaitable, Callable, Iterable
from typing import Any


def cases(
    names: str | tuple[str, ...], values: Iterable[Any]
) -> Callable[[Callable[..., Awaitable[None]]], Callable[..., Awaitable[None]]]:
    """As `pytest.mark.parametrize`, but one test that goes on after a failure and raises all of them at its end.

    Args:
        names: An argument of the test, or several.
        values: Its values, or tuples of theirs.
    """

    def decorate(test: Callable[..., Awaitable[None]]) -> Callable[..., Awaitable[None]]:
        given = [
            dict(zip(names, value, strict=True)) if isinstance(names, tuple) else {names: value} for value in values
        ]

        @functools.wraps(test)
        async def run(**fixtures: Any) -> None:
            failures = []
            for case in given:
                try:
                    await test(**fixtures, **case)
                # What pytest.raises and pytest.fail raise derives from BaseException.
                except BaseException as exc:
                    if not isinstance(exc, Exception) and type(exc).__module__ != "_pytest.outcomes":
                        raise
                    exc.add_note(f"In the case {case!r:.200}")
                    failures.append(exc)
            if failures:
                raise BaseExceptionGroup(f"{len(failures)} of {len(given)} cases fail", failures)

        signature = inspect.signature(test)
        kept = [each for name, each in signature.parameters.items() if name not in given[0]]
        run.__signature__ = signature.replace(parameters=kept)  # type: ignore[attr-defined]
        return run

    return decorate
