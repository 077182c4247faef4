"""The plugin contract: names, documents, and what it costs to load."""

from __future__ import annotations

import inspect
import subprocess
import sys
from pathlib import Path

import pytest

import agent_gateway_store
from agent_gateway_store._text import describe, escape, mask_tokens
from agent_gateway_store.hooks import PROJECT, hookimpl, hookspec, specs

pytestmark = pytest.mark.unit

SOURCE = Path(agent_gateway_store.__file__).parents[1]
HOOKS = {name: hook for name, hook in inspect.getmembers(specs, inspect.isfunction) if hasattr(hook, f"{PROJECT}_spec")}


HEAVY = {"sqlmodel", "sqlalchemy"}


@pytest.mark.parametrize(
    ("code", "unwanted"),
    [
        ("from agent_gateway_store import hookimpl", {*HEAVY, "pydantic", "pydantic_core", "asyncio"}),
        (
            """from agent_gateway_store import Notice, StoreSettings, ToolCall, hookimpl
from agent_gateway_store.models.values import PendingApproval
from agent_gateway_store.errors import DecisionVetoedError, NotDeliveredError
from agent_gateway_store.testing import make_notice
make_notice()""",
            HEAVY,
        ),
    ],
    ids=["the marker", "values and errors"],
)
def test_what_an_author_imports_loads_no_orm(code: str, unwanted: set[str]) -> None:
    """Nor does the marker alone load Pydantic: a plugin module costs its host next to nothing."""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", f"import sys\n{code}\nprint(*sys.modules)"],
        env={"PYTHONPATH": str(SOURCE)},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )

    assert "agent_gateway_store" in done.stdout.split(), done.stderr
    assert not unwanted & {name.partition(".")[0] for name in done.stdout.split()}


def test_the_root_hands_out_the_marker_of_the_hooks() -> None:
    """`hookimpl` of the root is the one that the manager looks for."""
    assert agent_gateway_store.hookimpl is hookimpl
    assert hookimpl.project_name == hookspec.project_name == "agent_gateway_store"


def test_every_hook_is_prefixed_typed_and_documented() -> None:
    """A hookspec is a contract: name, types, and a document that says what each argument is."""
    for name, hook in HOOKS.items():
        signature, document = inspect.signature(hook), inspect.getdoc(hook) or ""
        assert name.startswith("gateway_store_")
        assert ("Args:" in document) is bool(signature.parameters)
        assert "Returns:" in document
        assert signature.return_annotation is not inspect.Signature.empty
        for parameter in signature.parameters.values():
            assert parameter.annotation is not inspect.Parameter.empty
            assert f"    {parameter.name}: " in document


def test_notifier_shape_can_be_checked_at_run_time() -> None:
    class Good:
        name = "good"

        async def notify_pending(self, notice: object) -> None: ...

        async def notify_decision(self, notice: object) -> None: ...

    assert isinstance(Good(), specs.Notifier)
    assert not isinstance(object(), specs.Notifier)


class TestText:
    """What plugins say is made fit for a log."""

    def test_describe_masks_secrets(self) -> None:
        """No key, token, password or webhook path gets from an exception into a log."""
        for secret in (
            "agw_0123456789ab_" + "Ab1" * 16 + "x",
            "agw_0123456789ab_0123456789abcdefg",
            "aB3defghijklmnopqrstuvwxyz0123456789-_ABCDE",
            "https://user:hunter2@example.com/x",
            "https://hooks.slack.com/services/T000/B000/XXXX",
            "password=hunter2",
            "'token': 'hunter2'",
            "Authorization: Bearer hunter2hunter2",
        ):
            text = describe(ValueError(f"it failed for {secret} today"))
            assert not [each for each in (secret, "hunter2", "XXXX") if each in text]
            assert (text[:26], text[-6:]) == ("ValueError: it failed for ", " today")

    def test_describe_is_one_short_line(self) -> None:
        """Whatever an exception says, it is one line of at most 500 characters."""
        text = describe(ValueError("a\nb\x1b[31m\u202e" + "x" * 5000))

        assert text.startswith(r"ValueError: a b\x1b[31m\u202exx")
        assert text.isprintable()
        assert len(text) == 500

    def test_describe_survives_a_broken_exception(self) -> None:
        """An exception whose text cannot be read is named all the same."""

        class BrokenError(Exception):
            def __str__(self) -> str:
                raise RuntimeError

        assert describe(BrokenError()) == "BrokenError: (its text cannot be read)"
        assert describe(KeyError()) == "KeyError"

    def test_mask_tokens_spares_names_that_begin_like_a_key(self) -> None:
        for name in ("agw_prod-customers_all", "/backups/agw_tmp", "agw_prod_customers_of_2026", "agw_"):
            assert mask_tokens(name) == name

    def test_mask_tokens_spares_long_names(self) -> None:
        """A tool name of 43 characters, a SHA-256 and a UUID are no tokens."""
        name = "mcp__github__create_pull_request_reviews__x"
        text = f"{name} {'ab12' * 16} 8a7e1f0c-3a52-4b0e-9d0c-0123456789ab"

        assert len(name) == 43
        assert mask_tokens(text) == text

    def test_one_line_escapes_what_cannot_be_seen(self) -> None:
        assert escape("a\r\n\u2028\x85\ud800b é") == r"a\r\n\u2028\x85\ud800b é"
