"""The tree of errors: each says one sentence, keeps its facts, and survives the way to another process."""

from __future__ import annotations

import asyncio
import copy
import importlib
import inspect
import pickle
import re
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from datetime import UTC, datetime
from multiprocessing import get_context
from pathlib import Path
from typing import Any, TypeVar
from uuid import UUID

import pytest

from agent_gateway_store import ApprovalResult, ApprovalStatus, errors

pytestmark = pytest.mark.unit

E = TypeVar("E", bound=Exception)

FACTS: dict[str, Any] = {
    "message": "Something is wrong: do something.",
    "approval_id": UUID("12345678-1234-5678-1234-567812345678"),
    "status": "APPROVED",
    "approver_id": "alice",
    "decided_at": datetime(2031, 5, 1, tzinfo=UTC),
    "caller_id": "dev-agent",
    "current": "0001",
    "expected": "0002",
    "feature": "Charts",
    "extra": "notebook",
    "plugin": "slack",
    "plugins": ("slack", "teams"),
    "retry_after_s": 2.5,
    "is_permanent": True,
    "sqlstate": "40001",
    "in_session": True,
    "encoding": "LATIN1",
    "approval": ApprovalResult(
        approval_id=UUID(int=1),
        status=ApprovalStatus.PENDING,
        scope="EXECUTION",
        expires_at=datetime(2031, 5, 1, tzinfo=UTC),
    ),
}
"""A value for every argument that an error of the tree takes."""


def tree(kind: type[E]) -> list[type[E]]:
    return [kind, *(each for child in kind.__subclasses__() for each in tree(child))]


KINDS = [kind for kind in tree(errors.GatewayStoreError) if kind.__module__ == errors.__name__]


def build(kind: type[E], *, full: bool) -> E:
    """Build an error with every argument that it takes, or only with those it needs."""
    taken = inspect.signature(kind.__init__).parameters.items()
    if "args" in dict(taken):
        return kind(FACTS["message"])
    return kind(
        **{name: FACTS.get(name, f"a {name}") for name, given in [*taken][1:] if full or given.default is given.empty}
    )


def pickled(error: E) -> E:
    for protocol in range(pickle.HIGHEST_PROTOCOL):
        pickle.loads(pickle.dumps(error, protocol))
    return pickle.loads(pickle.dumps(error))  # type: ignore[no-any-return]


@pytest.mark.parametrize("way", [pickled, copy.copy, copy.deepcopy])
@pytest.mark.parametrize("full", [True, False])
@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_every_error_survives(kind: type[errors.GatewayStoreError], full: bool, way: Callable[[Any], Any]) -> None:
    """Pickled or copied it is of the same class, with the same text and the same facts."""
    error = build(kind, full=full)
    error.add_note("seen by a test")
    again = way(error)

    assert type(again) is kind
    assert (str(again), again.args, again.__dict__) == (str(error), error.args, error.__dict__)
    if isinstance(error, ImportError):
        assert again.msg == error.msg
    if full and "caller_id" in error.__dict__:
        assert again.caller_id == "dev-agent"


def test_an_error_of_any_module_survives() -> None:
    """So do those outside the tree, such as what an adapter raises where a call waits for a human."""
    source = Path(errors.__file__).parents[1]
    for path in source.glob("agent_gateway_store/**/*.py"):
        # Some modules load a large library.
        if re.search(r"^class \w+Error\(", path.read_text(), re.MULTILINE):
            importlib.import_module(".".join(path.relative_to(source).with_suffix("").parts).removesuffix(".__init__"))
    named = {f"{each.__module__}.{each.__name__}": each for each in tree(Exception)}
    kinds = [kind for name, kind in named.items() if re.match(r"agent_gateway_store\..*\.[A-Z]\w+$", name)]
    assert {"CallPendingError", "CallRefusedError", "CommandError", "SlackRefusedError"} <= {
        each.__name__ for each in kinds
    }
    for kind in kinds:
        for way in (pickled, copy.copy, copy.deepcopy):
            error = build(kind, full=True)
            error.add_note("seen by a test")
            again = way(error)
            assert type(again) is kind
            assert (str(again), again.args, again.__dict__) == (str(error), error.args, error.__dict__)


def test_the_whole_tree_is_looked_at() -> None:
    """Every public name of the module is one of the errors above."""
    assert {kind.__name__ for kind in KINDS if not kind.__name__.startswith("_")} == set(errors.__all__)


def fail(name: str) -> None:
    raise build(getattr(errors, name), full=True)


@pytest.mark.system
@pytest.mark.parametrize("name", ["ApiKeyExistsError", "ApprovalAlreadyDecidedError", "MissingExtraError"])
async def test_an_error_crosses_a_process_pool(name: str) -> None:
    """It is raised where the pool's caller waits, rather than breaking the pool."""
    with (
        ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool,
        pytest.raises(getattr(errors, name)) as caught,
    ):
        await asyncio.get_running_loop().run_in_executor(pool, fail, name)

    assert str(caught.value) == str(build(getattr(errors, name), full=True))
