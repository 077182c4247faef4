"""The list of mutants stays what it says: each change can be made, and each test is there."""

from __future__ import annotations

import ast
import os
from functools import cache
from pathlib import Path

import pytest

import proofs.mutants
from proofs.mutants import KILLED, LIST, ROOT, SURVIVED, Copy, Mutant, NotApplicableError, chosen, mutants

pytestmark = pytest.mark.unit

ALL = mutants(LIST.read_text(encoding="utf-8"))
"""All of the list."""


@cache
def ids_in(path: str) -> set[str]:
    """Return the ids, within their file, of the test functions and methods in a file."""
    body = ast.parse((ROOT / path).read_text(encoding="utf-8")).body
    own = [(f"{kind.name}::", each) for kind in body if isinstance(kind, ast.ClassDef) for each in kind.body]
    found = [*(("", each) for each in body), *own]
    return {prefix + each.name for prefix, each in found if isinstance(each, ast.FunctionDef | ast.AsyncFunctionDef)}


def test_there_are_enough() -> None:
    assert len({mutant.name for mutant in ALL}) == len(ALL) >= 60


def test_each_can_be_made_and_its_test_is_there() -> None:
    """The old text stands in its file once, what comes out is other Python, and the test is a function of its file."""
    wrong = []
    # What a file means is worked out once for its mutants.
    for mutant in sorted(ALL, key=lambda mutant: mutant.path):
        path, _, test = mutant.test.partition("::")
        try:
            mutant.applied((ROOT / mutant.path).read_text(encoding="utf-8"))
        except (NotApplicableError, OSError) as exc:
            wrong.append(f"{mutant.name}: {exc}")
        if not (ROOT / path).is_file() or test.partition("[")[0] not in ids_in(path):
            wrong.append(f"{mutant.name}: there is no {mutant.test}")

    assert wrong == []


@pytest.mark.parametrize(
    ("old", "new", "why"),
    [
        ("gone", "b", "the old text is 0 times"),
        ("a", "b", "the old text is 3 times"),
        ("1  # one", "1", "it changes nothing"),
        ("= 1", "= (", "is no Python"),
    ],
)
def test_mutant_that_cannot_be_made_is_told(old: str, new: str, why: str) -> None:
    mutant = Mutant(1, "name", "why", "file.py", old, new, "test")

    with pytest.raises(NotApplicableError, match=why):
        mutant.applied("a = 1  # one\nb = a + a\n")


def test_mutants_are_chosen_by_name_and_number() -> None:
    assert chosen(ALL, [ALL[2].name, "1"]) == [ALL[2], ALL[0]]
    assert chosen(ALL, []) == ALL
    with pytest.raises(ValueError, match="There is no mutant nobody"):
        chosen(ALL, ["nobody"])


def test_entry_of_another_form_is_told() -> None:
    with pytest.raises(ValueError, match="0 have the form"):
        mutants("### name\n\nno diff\n")


def test_mutants_are_judged_by_what_their_test_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed or survived, one after the other in one copy; a test that fails without any change is told."""
    source, toy = "def two():\n    return 2\n\n\ndef three():\n    return 3\n", tmp_path / "toy"
    (toy / "src").mkdir(parents=True)
    (toy / "src" / "toy.py").write_text(source)
    (toy / "test_toy.py").write_text(
        "from toy import two\n\ndef test_two():\n    assert two() == 2\n\ndef test_broken():\n    assert two() == 3\n"
    )
    monkeypatch.setattr(proofs.mutants, "ROOT", toy)
    copy = Copy(tmp_path / "copy", os.environ | {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"})

    def judge(old: str, new: str, test: str = "test_two") -> str:
        return copy.judge(Mutant(1, "name", "why", "src/toy.py", old, new, f"test_toy.py::{test}"))

    assert [judge("return 3", "return 4"), judge("return 2", "return 1")] == [SURVIVED, KILLED]
    with pytest.raises(NotApplicableError, match="pytest ended with 4"):
        judge("return 2", "return 1", "test_gone")
    assert copy.broken(["test_toy.py::test_two", "test_toy.py::test_broken"]) == ["test_toy.py::test_broken"]
    assert (tmp_path / "copy" / "src" / "toy.py").read_text() == source
