"""What several tests of `gateway-store` need: a database of each kind, commands on it, an approval to decide."""

from __future__ import annotations

import re
import secrets
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from sqlalchemy import make_url, text

import servers
from agent_gateway_store import ApprovalRequest, GatewayStore, ToolCall
from agent_gateway_store.storage.database import create_engine
from commands import Outcome, gateway_store
from pages import DOCS
from proofs.harness import execute
from tampering import tamper

Cli = Callable[..., Outcome]
KEY = re.compile(r"agw_[0-9A-Za-z]{12}_[0-9A-Za-z]{49}")


@pytest.fixture
def url(migrated_postgres_database: Callable[[], str]) -> str:
    """The URL of an empty, migrated database."""
    return migrated_postgres_database()


@pytest.fixture
def cli(url: str) -> Cli:
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


async def execute_on(url: str, statement: str) -> None:
    engine = create_engine(url)
    async with engine.begin() as connection:
        await connection.execute(text(statement))
    await engine.dispose()


async def tamper_with(url: str, statement: str) -> None:
    """Run a statement, whatever the triggers say."""
    engine = create_engine(url)
    await tamper(engine, statement)
    await engine.dispose()


@pytest.fixture
def limited_url(migrated_postgres_database: Callable[[], str]) -> Iterator[str]:
    """A database for the role of gateways that the page describes; its owner's URL has `postgres` as its user."""
    url, role = migrated_postgres_database(), f"gateway_{secrets.token_hex(4)}"
    page = (DOCS / "how-to" / "postgresql-and-redis.md").read_text()
    grants = [line.replace("gateway_app", role) for line in page.splitlines() if line.startswith("GRANT ")]
    servers.run(execute(url, f"CREATE ROLE {role} LOGIN", *(grant.rstrip(";") for grant in grants)))
    yield make_url(url).set(username=role).render_as_string(hide_password=False)
    servers.run(execute(url, f"DROP OWNED BY {role}", f"DROP ROLE {role}"))
