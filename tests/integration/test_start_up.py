"""What a process loads before its first write, and before it prints help."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from alembic.config import Config
from alembic.script import ScriptDirectory

from agent_gateway_store import GatewayStore
from agent_gateway_store.storage import migrate

_OPEN = """
import asyncio, sys
from agent_gateway_store import GatewayStore
async def main():
    async with GatewayStore("sqlite:///g.db", redis_url=""):
        print(*sys.modules)
asyncio.run(main())
"""
_HELP = """
import sys
from agent_gateway_store.cli import main
try:
    main()
except SystemExit:
    print(*sys.modules, file=sys.stderr)
"""


def _loaded(ended: subprocess.CompletedProcess[str], text: str) -> set[str]:
    assert ended.returncode == 0, ended.stderr
    return {name.partition(".")[0] for name in text.split()}


async def test_opening_a_store_on_a_schema_that_is_current_loads_no_alembic(tmp_path: Path) -> None:
    """Alembic is for migrations; an empty database was set up here before."""
    async with GatewayStore(f"sqlite:///{tmp_path / 'g.db'}", redis_url=""):
        pass
    ended = subprocess.run([sys.executable, "-c", _OPEN], cwd=tmp_path, capture_output=True, text=True, timeout=60)

    assert not {"alembic", "rich", "typer"} & _loaded(ended, ended.stdout)


@pytest.mark.parametrize(
    ("args", "unwanted"),
    [
        (("--help",), {"sqlalchemy", "rich", "asyncio", "pydantic"}),
        # Typer loads Pydantic to read the options before the command.
        (("db", "--help"), {"sqlalchemy", "rich", "asyncio"}),
    ],
)
def test_help_loads_neither_the_store_nor_what_draws(args: tuple[str, ...], unwanted: set[str], tmp_path: Path) -> None:
    """Nor the bundled plugins, which have no commands."""
    ended = subprocess.run(
        [sys.executable, "-c", _HELP, *args], cwd=tmp_path, capture_output=True, text=True, timeout=60
    )

    assert "Usage: " in ended.stdout
    assert not unwanted & _loaded(ended, ended.stderr)


def test_the_revisions_are_those_that_alembic_reads() -> None:
    """The store reads them as text, and must not take an older one for the newest."""
    config = Config()
    config.set_main_option("script_location", str(migrate.migrations_path()))
    scripts = ScriptDirectory.from_config(config)

    assert migrate.head() == scripts.get_current_head()
    assert all(migrate.is_known(script.revision) for script in scripts.walk_revisions())
    assert not migrate.is_known("9999_future")
