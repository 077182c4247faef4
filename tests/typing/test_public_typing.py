"""The blocking twin and the public type hints."""

from __future__ import annotations

import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest

import generate_sync_stub
from agent_gateway_store import sync
from agent_gateway_store.approval import ApprovalManager
from agent_gateway_store.audit import AuditManager
from agent_gateway_store.keys import KeyManager
from agent_gateway_store.store import GatewayStore
from pages import PAGES, blocks, python_of

pytestmark = pytest.mark.unit

ROOT = Path(__file__).parents[2]
PAIRS = [
    (AuditManager, sync.SyncAuditManager),
    (ApprovalManager, sync.SyncApprovalManager),
    (KeyManager, sync.SyncKeyManager),
    (GatewayStore, sync.SyncGatewayStore),
]


def public(cls: type) -> dict[str, object]:
    """Return the public methods and properties of a class; class methods make it, so no instance has them."""
    return {
        name: inspect.getattr_static(cls, name)
        for name in dir(cls)
        if not name.startswith("_") and not isinstance(inspect.getattr_static(cls, name), classmethod)
    }


def test_checked_in_stub_is_the_generated_one() -> None:
    """`sync.pyi` says what the async classes say; if not: `python scripts/generate_sync_stub.py`."""
    assert generate_sync_stub.STUB.read_text(encoding="utf-8") == generate_sync_stub.generate()


@pytest.mark.parametrize(("cls", "twin"), PAIRS, ids=lambda cls: cls.__name__)
def test_twin_has_the_same_names(cls: type, twin: type) -> None:
    """Nothing is missing from the blocking twin, and it has nothing of its own."""
    instance_attributes = {"settings"} if cls is GatewayStore else set()

    assert public(twin).keys() == public(cls).keys() | instance_attributes


@pytest.mark.parametrize(("cls", "twin"), PAIRS, ids=lambda cls: cls.__name__)
def test_twin_has_the_same_signatures(cls: type, twin: type) -> None:
    """Each method takes the same arguments, has the same docstring, and is not async."""
    methods = {name: member for name, member in public(cls).items() if inspect.isfunction(member)}
    for name, method in methods.items():
        blocking = getattr(twin, name)

        assert inspect.signature(blocking) == inspect.signature(method), name
        assert inspect.getdoc(blocking) == inspect.getdoc(method), name
        assert not inspect.iscoroutinefunction(blocking), name
    assert inspect.signature(sync.SyncGatewayStore) == inspect.signature(GatewayStore)


@pytest.mark.system
def test_mypy_accepts_the_public_api(tmp_path: Path) -> None:
    """Nor is anything wrong, by `mypy --strict`, with the use of it in `api.py`, in the README and in the docs."""
    [readme] = blocks("python", (ROOT / "README.md").read_text())
    (tmp_path / "readme.py").write_text(readme)
    for page in filter(python_of, PAGES):
        (tmp_path / f"{re.sub(r'[^a-z]', '_', page)}.py").write_text(python_of(page))
    # With the options and the cache of a plain `mypy`, which has read the package and its libraries before.
    command = [sys.executable, "-m", "mypy", "--config-file", str(ROOT / "pyproject.toml")]
    command += ["--cache-dir", str(ROOT / ".mypy_cache")]

    done = subprocess.run(
        [*command, str(Path(__file__).with_name("api.py")), *map(str, tmp_path.iterdir())],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )

    assert done.returncode == 0, done.stdout + done.stderr
