"""The tree of errors: each says one sentence, keeps its facts, and survives the way to another process."""

from __future__ import annotations

import asyncio
import copy
import importlib
import inspect
import pickle
import re
from concurrent.futures import ProcessPoolExecutor
from datetime import UTC, datetime
from itertools import product
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


def test_every_error_survives() -> None:
    """Pickled or copied it keeps its class, text and facts; so do those outside the tree, as of an adapter."""
    source = Path(errors.__file__).parents[1]
    for path in source.glob("agent_gateway_store/**/*.py"):
        # Some modules load a large library.
        if re.search(r"^class \w+Error\(", path.read_text(), re.MULTILINE):
            importlib.import_module(".".join(path.relative_to(source).with_suffix("").parts).removesuffix(".__init__"))
    named = {f"{each.__module__}.{each.__name__}": each for each in tree(Exception)}
    kinds = [kind for name, kind in named.items() if re.match(r"agent_gateway_store\..*\.[A-Z]\w+$", name)]
    assert {errors.ApiKeyExistsError, errors.GatewayStoreError} < set(kinds)
    assert {"CallPendingError", "CallRefusedError", "CommandError", "SlackRefusedError"} <= {
        each.__name__ for each in kinds
    }
    for kind, full, way in product(kinds, (True, False), (pickled, copy.copy, copy.deepcopy)):
        error = build(kind, full=full)
        error.add_note("seen by a test")
        again = way(error)
        assert type(again) is kind
        assert (str(again), again.args, again.__dict__) == (str(error), error.args, error.__dict__)
        if isinstance(error, ImportError):
            assert again.msg == error.msg


def fail(name: str) -> None:
    raise build(getattr(errors, name), full=True)


@pytest.mark.system
@pytest.mark.parametrize("name", ["ApiKeyExistsError", "ApprovalAlreadyDecidedError", "MissingExtraError"])
async def test_an_error_crosses_a_process_pool(name: str) -> None:
    with (
        ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool,
        pytest.raises(getattr(errors, name)) as caught,
    ):
        await asyncio.get_running_loop().run_in_executor(pool, fail, name)

    assert str(caught.value) == str(build(getattr(errors, name), full=True))
