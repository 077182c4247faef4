"""Every snippet of the docs runs as it stands, and every Python block of the docs is one of them."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from uuid import uuid4

import asyncpg
import pytest
from sqlalchemy import text
from sqlalchemy.exc import ProgrammingError
from sqlalchemy.ext.asyncio import create_async_engine

from agent_gateway_store import ApprovalRequest, AuditEvent, GatewayStore, ToolCall

pytestmark = pytest.mark.integration

DOCS = Path(__file__).parents[2] / "docs"
SNIPPETS = sorted((DOCS / "snippets").glob("*.py"))
PAGES = sorted(path for path in DOCS.rglob("*.md"))
EXAMPLE = re.compile(r'--8<-- "(?P<file>gateway-store-notify-file/[\w./-]+)"')
INCLUDE = re.compile(r'--8<-- "snippets/(?P<file>\w+\.py)(?::(?P<section>[\w-]+))?"')

# Runs a file like the cells of a notebook: `await` at top level, in a loop that runs already.
NOTEBOOK = """
import ast, asyncio, pathlib, sys

code = compile(pathlib.Path(sys.argv[1]).read_text(), sys.argv[1], "exec", ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)
asyncio.run(eval(code, {"__name__": "__main__"}))
"""


@pytest.mark.parametrize("snippet", SNIPPETS, ids=lambda path: path.stem)
def test_snippet_runs(snippet: Path, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    """It ends well on an empty SQLite folder, or on empty servers where it asks for them, without a warning."""
    source = snippet.read_text()
    environment = dict(os.environ)
    if "Needs DATABASE_URL and REDIS_URL." in source:
        new_database: Callable[[], str] = request.getfixturevalue("postgres_database")
        environment |= {"DATABASE_URL": new_database(), "REDIS_URL": request.getfixturevalue("fresh_redis_url")}
    command = ["-c", NOTEBOOK, str(snippet)] if "\n# run: notebook\n" in source else [str(snippet)]

    done = subprocess.run(
        [sys.executable, "-W", "error", *command],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )

    assert done.returncode == 0, done.stderr
    assert done.stderr == ""


@pytest.mark.parametrize("page", PAGES, ids=lambda path: str(path.relative_to(DOCS)))
def test_python_comes_from_snippets(page: Path) -> None:
    """A Python block of a page holds includes only, and each names a section that exists."""
    blocks = re.findall(r"^ *```python.*\n((?:.*\n)*?) *```$", page.read_text(), re.MULTILINE)

    for line in (line.strip() for block in blocks for line in block.splitlines() if line.strip()):
        if example := EXAMPLE.fullmatch(line):  # its own tests run it
            assert (DOCS.parent / "examples" / example["file"]).is_file(), line
            continue
        found = INCLUDE.fullmatch(line)
        assert found is not None, f"{page.name} holds Python that no test runs: {line}"
        source = (DOCS / "snippets" / found["file"]).read_text()
        if found["section"] is not None:
            assert f"--8<-- [start:{found['section']}]" in source, line
            assert f"--8<-- [end:{found['section']}]" in source, line


def test_every_section_is_shown() -> None:
    """No section is left over from a page that changed."""
    shown = {(found["file"], found["section"]) for page in PAGES for found in INCLUDE.finditer(page.read_text())}

    for snippet in SNIPPETS:
        for section in re.findall(r"--8<-- \[start:([\w-]+)\]", snippet.read_text()):
            assert (snippet.name, section) in shown


async def test_grants_suffice(postgres_database: Callable[[], str]) -> None:
    """With the grants of the docs a gateway works, and cannot delete an audit event."""
    url, role = postgres_database(), f"app_{uuid4().hex}"
    async with GatewayStore(url, auto_migrate=True):
        pass
    grants = (DOCS / "snippets" / "least_privilege.sql").read_text().replace("gateway_app", role)
    owner = await asyncpg.connect(url.replace("+asyncpg", ""))
    await owner.execute(f"CREATE ROLE {role}; {grants}")
    engine = create_async_engine(url, connect_args={"server_settings": {"role": role}})
    try:
        async with GatewayStore(engine=engine) as store:
            key = await store.keys.issue("dev-agent", role="developer")
            await store.keys.verify(key.plaintext)
            call = ToolCall(server="files", tool="delete_file")
            asked = ApprovalRequest(
                request_id="r-1", caller_id="dev-agent", tool_call=call, risk_explanation="Deletes."
            )
            token = await store.approvals.issue_token(asked)
            await store.approvals.approve(token, approver_id="alice")
            await store.approvals.consume_token(token, caller_id="dev-agent", tool_call=call)
            outcomes = [await store.audit.write(make_event()), await store.audit.write(make_event())]

            with pytest.raises(ProgrammingError, match="permission denied"):
                async with store.database.sessions() as session:
                    await session.execute(text("DELETE FROM audit_events"))
            assert outcomes == ["STORED", "STORED"]
            assert len(await store.audit.list_recent()) == 2
    finally:
        await engine.dispose()
        await owner.execute(f"DROP OWNED BY {role}; DROP ROLE {role}")
        await owner.close()


def make_event() -> AuditEvent:
    """An event like the one before it, but for the time."""
    return AuditEvent(
        request_id="r-1",
        caller_id="dev-agent",
        caller_role="developer",
        environment="dev",
        mcp_server="files",
        tool_name="read_file",
        raw_args_hash=AuditEvent.hash_args({}),
        sanitized_args={},
        risk_score=0,
        matched_policy_rule="reads-are-allowed",
        decision="ALLOW",
        latency_ms=1,
        deterministic_rationale="Reads are allowed.",
    )
