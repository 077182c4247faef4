"""A progress bar on standard error, in a terminal and in a notebook."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TypeVar

__all__ = ["counted", "told"]

T = TypeVar("T")
_EVERY = 100


@contextmanager
def told(progress: bool | Callable[[int], None], text: str) -> Iterator[Callable[[int], None]]:
    """Give what is told the rows done so far: a progress bar (True), a function of the caller's, or nobody."""
    if callable(progress):
        yield progress
    elif progress:
        with _shown(text) as tell:
            yield tell
    else:
        yield lambda _rows: None


def counted(items: Iterable[T], tell: Callable[[int], None]) -> Iterator[T]:
    """Yield `items`, and tell every now and then and at the end how many there were."""
    number = 0
    for number, item in enumerate(items, start=1):
        yield item
        if not number % _EVERY:
            tell(number)
    tell(number)


@contextmanager
def _shown(text: str) -> Iterator[Callable[[int], None]]:
    """Show how many rows are done and how fast; gives what is called with their number, from any thread."""
    from rich.console import Console
    from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}", markup=False),
        TextColumn("{task.completed:,} rows"),
        TextColumn("{task.fields[rate]}", markup=False),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=Console(file=sys.stderr), transient=False) as bar:
        task = bar.add_task(text, total=None, rate="")

        def tell(rows: int) -> None:
            elapsed = bar.tasks[0].elapsed or 0.0
            bar.update(task, completed=rows, rate=f"{rows / elapsed:,.0f} rows/s" if elapsed else "")

        yield tell
