"""What a process loads before its first write, and before it prints help; and what it says of a missing library."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from alembic.config import Config
from alembic.script import ScriptDirectory

from agent_gateway_store import GatewayStore
from agent_gateway_store.storage import migrate
from forks import forks

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
    return set(text.split())


async def test_opening_a_store_on_a_schema_that_is_current_loads_no_alembic(tmp_path: Path) -> None:
    async with GatewayStore(f"sqlite:///{tmp_path / 'g.db'}", redis_url=""):
        pass
    ended = subprocess.run([sys.executable, "-c", _OPEN], cwd=tmp_path, capture_output=True, text=True, timeout=60)

    assert not {"alembic", "rich", "typer"} & _loaded(ended, ended.stdout)


@pytest.mark.parametrize(
    ("args", "unwanted"),
    [
        (("--help",), {"pydantic", "agent_gateway_store.cli.keys", "agent_gateway_store.cli.audit"}),
        # Typer loads Pydantic to read the options before the command.
        (("db", "--help"), set()),
    ],
)
def test_help_loads_neither_the_store_nor_what_draws(args: tuple[str, ...], unwanted: set[str], tmp_path: Path) -> None:
    """Nor the bundled plugins, which have no commands, nor for the list of commands any of these."""
    unwanted |= {"alembic", "asyncpg", "asyncio", "redis", "rich", "sqlalchemy", "agent_gateway_store.demo.command"}
    ended = subprocess.run(
        [sys.executable, "-c", _HELP, *args], cwd=tmp_path, capture_output=True, text=True, timeout=60
    )

    assert "Usage: " in ended.stdout
    assert not unwanted & _loaded(ended, ended.stderr)


def test_the_revisions_are_those_that_alembic_reads() -> None:
    config = Config()
    config.set_main_option("script_location", str(migrate.migrations_path()))
    scripts = ScriptDirectory.from_config(config)

    assert migrate.head() == scripts.get_current_head()
    assert all(migrate.is_known(script.revision) for script in scripts.walk_revisions())
    assert not migrate.is_known("9999_future")


@pytest.mark.parametrize("library", ["fastapi", "fastmcp"])
def test_a_missing_library_of_an_integration_is_told_by_its_extra(library: str, tmp_path: Path) -> None:
    code = f"import sys; sys.modules['{library}'] = None; import agent_gateway_store.integrations.{library}"
    done = forks().run(["-c", code], cwd=tmp_path, env=os.environ, timeout=60)

    assert "MissingExtraError" in done.stderr
    assert f"pip install 'agent-gateway-store[{library}]'" in done.stderr


def test_opentelemetry_that_is_missing_is_told_by_its_extra(tmp_path: Path) -> None:
    """Without the OpenTelemetry API the setting ends in a sentence that says what to install."""
    code = (
        "import sys; sys.modules['opentelemetry'] = None\n"
        "import asyncio\n"
        "from agent_gateway_store import GatewayStore, StoreSettings, errors\n"
        "async def main():\n"
        "    try:\n"
        "        await GatewayStore('sqlite:///g.db', settings=StoreSettings(otel_enabled=True, redis_url='')).open()\n"
        "    except errors.MissingExtraError as exc:\n"
        "        print(exc)\n"
        "asyncio.run(main())"
    )
    ended = forks().run(["-c", code], cwd=tmp_path, env=os.environ, timeout=60)

    assert "agent-gateway-store[otel]" in ended.stdout, ended.stderr
