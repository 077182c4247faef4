"""What several tests of `gateway-store` need: a database of each kind, commands on it, an approval to decide."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import servers
from agent_gateway_store import ApprovalRequest, GatewayStore, ToolCall
from commands import Outcome, gateway_store

KEY = re.compile(r"agw_[0-9A-Za-z]{12}_[0-9A-Za-z]{49}")


@pytest.fixture(params=["sqlite", "postgres"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """The URL of an empty, migrated database."""
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path / 'cli.db'}"
    create: Callable[[], str] = request.getfixturevalue("migrated_postgres_database")
    return create()


@pytest.fixture
def cli(url: str) -> Callable[..., Outcome]:
    """Run a command on the database."""

    def run(*args: str, **options: Any) -> Outcome:
        return gateway_store("--database-url", url, *args, **options)

    return run


def ask(url: str, request_id: str, *, name: str = "a.txt", caller_id: str = "dev-agent") -> str:
    """Ask for an approval and return its id."""

    async def work() -> str:
        async with GatewayStore(url) as store:
            call = ToolCall(server="files", tool="delete_file", arguments={"name": name})
            request = ApprovalRequest(
                request_id=request_id, caller_id=caller_id, tool_call=call, risk_explanation="It is gone for good."
            )
            await store.approvals.issue_token(request)
            return str(request.approval_id)

    return servers.run(work())


def ids(found: Outcome) -> list[str]:
    assert found.json["next_cursor"] is None
    return [item["request_id"] for item in found.json["items"]]
