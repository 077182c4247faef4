"""The Python of a page runs as a newcomer runs it: its blocks in one file, from top to bottom, in an empty folder."""

from __future__ import annotations

import ast
import json
import os
import re
import runpy
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from uuid import uuid4

import asyncpg
import pytest
import typer
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from sqlalchemy import Connection, MetaData, create_engine, text
from sqlalchemy.exc import ProgrammingError
from sqlalchemy.ext.asyncio import create_async_engine
from sqlalchemy.pool import NullPool
from typer.testing import CliRunner

from agent_gateway_store import ApprovalRequest, GatewayStore, SyncGatewayStore, ToolCall
from agent_gateway_store.errors import DecisionVetoedError, NotDeliveredError
from builders import make_event, make_request
from forks import forks
from pages import BLOCK, PAGES, blocks, python_of
from wheels import ROOT

pytestmark = [pytest.mark.integration, pytest.mark.system]

# The cells of a notebook: `test_notebooks.py` runs them.
NOTEBOOKS = [f"how-to/{name}.md" for name in ("inbox", "jupyter", "plots")]
SERVED = [
    f"how-to/{name}.md"
    for name in ("console", "fastapi", "fastmcp", "ship-events", "slack", "testing-plugins", "webhook")
]
AGENTS = [f"how-to/{name}.md" for name in ("langchain", "openai-agents", "pydantic-ai")]
SERVING = ["uvicorn", "agent_gateway_store.integrations.fastapi"]
ELSEWHERE = (*NOTEBOOKS, *SERVED, *AGENTS)
PENDING = 'gateway-store approvals list --status PENDING --json | grep -oPm1 \'(?<="approval_id": ")[^"]+\''


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The made-up history that pages ask their reader to make: the smallest in which they find all at any hour."""
    folder = tmp_path_factory.mktemp("demo")
    run(folder, sys.executable, "-m", "agent_gateway_store.cli", "demo", "--events", "6000")
    return folder / "gateway-demo.db"


def run(folder: Path, *command: str, load: Sequence[str] = (), **environment: str) -> tuple[str, str]:
    """Run a command that must end well; return what it wrote to its two outputs.

    What it starts has the package loaded, and the large libraries that `load` names.
    """
    started = forks(is_large=bool(load))
    if load:
        started.load(load)
    programs = f"{started.programs}:{Path(sys.executable).parent}:{os.environ['PATH']}"
    given: dict[str, Any] = {"cwd": folder, "env": {**os.environ, "PATH": programs, **environment}, "timeout": 300}
    if command[0] == sys.executable:
        done = started.run(command[1:], **given)
    else:
        done = subprocess.run(command, capture_output=True, text=True, check=False, **given)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout, done.stderr


def assert_shown(printed: str, page: str, behind: str) -> None:
    """The output is the first text that the page shows behind this code.

    There `...` stands for what differs from run to run, and as a line for any lines.
    """
    shown = next(iter(blocks("text", PAGES[page].partition(behind)[2])), "")
    pattern = re.escape(shown).replace(re.escape("\n...\n"), r"\n(?:.*\n)*").replace(re.escape("..."), ".*")
    assert re.fullmatch(pattern, printed), printed


@pytest.mark.parametrize("page", [page for page in PAGES if python_of(page) and page not in ELSEWHERE])
def test_page_runs(page: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    """Without a warning, on files of its own, or on servers where it asks for them; it prints what the page shows."""
    (tmp_path / "page.py").write_text(python_of(page))
    environment: dict[str, str] = {}
    if "DATABASE_URL" in python_of(page):
        environment = {"DATABASE_URL": request.getfixturevalue("migrated_postgres_database")()}
        environment["REDIS_URL"] = request.getfixturevalue("fresh_redis_url")
    if "gateway-demo.db" in python_of(page):
        shutil.copy(request.getfixturevalue("demo"), tmp_path)

    load = ["pandas"] if "to_pandas" in python_of(page) else []
    printed, said = run(tmp_path, sys.executable, "-W", "error", "page.py", load=load, **environment)

    assert said == ""
    if "asyncio.run(main())" in python_of(page):
        assert_shown(printed, page, behind="asyncio.run(main())\n```\n")


def test_readme_example_runs(tmp_path: Path) -> None:
    """The one Python block of the README runs as it stands, in at most fifteen lines, and again."""
    [example] = blocks("python", (ROOT / "README.md").read_text())
    for _ in range(2):
        printed = run(tmp_path, sys.executable, "-W", "error", "-c", example)

        assert printed == ("refund APPROVAL_REQUIRED SUCCESS\n", "")
    assert len([line for line in example.splitlines() if line.strip()]) <= 15


def free_port() -> int:
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        port: int = listening.getsockname()[1]
        return port


def follow(
    page: str, folder: Path, *, first: str = "```python", load: Sequence[str] = (), **environment: str
) -> tuple[str, str]:
    """Follow a page that says file and commands, from `first` on; return their two outputs.

    The ports of the page are free ones here, and what is installed already is not installed again. A server runs until
    the commands have ended; of a call that waits for an approver, the approval is known then.
    """
    source = PAGES[page]
    for port in ("8000", "8001", "8002"):
        source = source.replace(port, str(free_port()))
    [name] = re.findall(r"one file, `(\w+\.py)`", source)
    (folder / name).write_text("\n\n".join(blocks("python", source)))
    script = ["set -euo pipefail; trap 'kill $(jobs -p) || true' EXIT"]
    for line in "".join(blocks("sh", source[source.index(first) :])).splitlines():
        if line.startswith(("uvicorn", "python")):
            port = (re.findall(r"--port (\d+)", line) or re.findall(r"port=(\d+)", source))[0]
            script.append(f"{line} >&2 & server=$!")
            script.append(f"until (exec 3<>/dev/tcp/127.0.0.1/{port}) 2>&-; do kill -0 $server; sleep 0.1; done")
        elif line.startswith("fastmcp call"):
            script.append(f"{line} || APPROVAL_ID=$({PENDING})")
        elif not line.startswith("pip install"):
            script.append(line.replace("APPROVAL_ID", "$APPROVAL_ID") + ("; echo" if line.startswith("curl") else ""))
    return run(folder, "timeout", "110", "bash", "-c", "\n".join(script), load=load, **environment)


def test_what_the_pages_install_is_the_clone() -> None:
    lines = [line for page in PAGES.values() for line in page.splitlines() if "pip install" in line]
    named = [line for line in lines if "agent-gateway-store" in line]
    assert named
    assert [line for line in named if not re.search(r"[ '\"]\.{1,2}/agent-gateway-store", line)] == []


def test_fastapi_page(migrated_postgres_database: Callable[[], str], fresh_redis_url: str, tmp_path: Path) -> None:
    servers = {"DATABASE_URL": migrated_postgres_database(), "REDIS_URL": fresh_redis_url}

    page = "how-to/fastapi.md"
    printed, log = follow(page, tmp_path, load=SERVING, PYTHONWARNINGS="error", **servers)

    answers = printed.splitlines(keepends=True)[1:]  # behind that of `db upgrade`
    assert_shown("".join(answers[:5]), page, behind="$ALICE_KEY")
    assert_shown("".join(answers[5:]), page, behind='"Approval-Token: unknown"')
    assert "Traceback" not in log


def test_fastmcp_page(tmp_path: Path) -> None:
    printed, log = follow("how-to/fastmcp.md", tmp_path, load=["fastmcp.cli", *imports_of("how-to/fastmcp.md")])

    error, _, rest = printed[printed.index("Error:") :].partition("PENDING.\n")
    assert_shown(f"{error}PENDING.\n", "how-to/fastmcp.md", behind='--auth "$AGENT_KEY"')
    assert_shown(rest[rest.index("{") : rest.index("}\n") + 2], "how-to/fastmcp.md", behind="approvals approve")
    assert sorted(re.findall(r"dev-agent +│ (USED|SUCCESS) ", printed)) == ["SUCCESS", "USED"]
    assert "Traceback" not in log


def imports_of(page: str) -> list[str]:
    found: list[str] = []
    for node in ast.walk(ast.parse(python_of(page))):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.append(node.module)
    return found


@pytest.mark.parametrize("page", AGENTS)
def test_page_of_an_agent(page: str, tmp_path: Path) -> None:
    """The agent asks and ends; approved, it goes on in a new process and runs its call once; the log says so."""
    (tmp_path / "agent.py").write_text(python_of(page))
    lines = "".join(blocks("sh", PAGES[page].partition("Start it.")[2])).splitlines()
    asking, *coming_back = [line for line in lines if "approvals list" not in line]
    script = [
        asking,
        f"APPROVAL_ID=$({PENDING})",
        *(line.replace("APPROVAL_ID", "$APPROVAL_ID") for line in coming_back),
    ]
    script += [f"{asking} >again", f"[ $({PENDING}) != $APPROVAL_ID ]"]

    whole = "set -euo pipefail\n" + "\n".join(script)
    printed, said = run(tmp_path, "bash", "-c", whole, load=imports_of(page), PYTHONWARNINGS="error")

    asked, answer = blocks("text", PAGES[page])
    assert printed.startswith(asked + "Approval ")
    assert printed.splitlines(keepends=True)[2] == answer
    assert sorted(re.findall(r"office-agent +│ (USED|SUCCESS) ", printed)) == ["SUCCESS", "USED"]
    assert re.sub("^Reading gateway.db.\n", "", said, flags=re.MULTILINE) == ""


@pytest.mark.parametrize("page", [*AGENTS, "how-to/fastmcp.md"])
def test_what_a_framework_needs_is_under_forty_lines(page: str) -> None:
    source = PAGES[page].partition("\n## ")[0]
    assert sum(bool(line.strip()) for line in "".join(blocks("python", source)).splitlines()) < 40


def test_slack_page(tmp_path: Path) -> None:
    settings = {"AGENT_GATEWAY_STORE_SLACK_SIGNING_SECRET": "from-the-app's-basic-information"}

    printed, log = follow("how-to/slack.md", tmp_path, load=SERVING, PYTHONWARNINGS="error", **settings)

    assert printed == "401\n\n"
    assert "Traceback" not in log


def test_webhook_page(tmp_path: Path) -> None:
    settings = {"PYTHONWARNINGS": "error", "PYTHONUNBUFFERED": "1"}
    printed, _ = follow("how-to/webhook.md", tmp_path, load=SERVING, **settings)

    assert printed.endswith("401\n\n")


def test_ship_page(tmp_path: Path) -> None:
    """The first event arrives, the second one becomes a dead letter; the file, and the page's own sink, get both."""
    page = "how-to/ship-events.md"
    [program] = [block["body"] for block in BLOCK.finditer(PAGES[page]) if block["title"] == "own.py"]
    (tmp_path / "own.py").write_text(program)
    settings = {"DATABASE_URL": "sqlite:///gateway.db", "REDIS_URL": "", "PYTHONWARNINGS": "error"}
    printed, _ = follow(page, tmp_path, **settings)
    own, said = run(tmp_path, sys.executable, "own.py", **settings)

    assert "1 event arrived.\n" in printed
    assert '"request_id": "r-2"' in printed
    assert "2 events arrived.\n" in printed
    assert "1 dead letters are due again.\n" in printed
    assert [json.loads(line)["request_id"] for line in (tmp_path / "events.jsonl").read_text().splitlines()] == [
        "r-1",
        "r-2",
    ]
    assert own.splitlines()[:3] == [*(f'{{"request_id":"r-{n}","tool_name":"read_file"}}' for n in (1, 2)), "2"]
    assert said == ""


def test_prove_page(tmp_path: Path) -> None:
    """Keys, witness, verification, evidence and the published log, as the page says; then a changed event is found."""
    commands = [block for block in blocks("sh", PAGES["how-to/prove.md"]) if not block.startswith("pip install")]
    [program] = [block["body"] for block in BLOCK.finditer(PAGES["how-to/prove.md"]) if block["title"] == "check.py"]
    (tmp_path / "check.py").write_text(program)
    script = ["set -euo pipefail", *commands, "python -W error check.py", "cat public/checkpoint"]

    printed, _ = run(tmp_path, "bash", "-c", "\n".join(script), DATABASE_URL="sqlite:///gateway.db", REDIS_URL="")

    assert "integrity    ok" in printed
    assert re.search(r"^True 1\n", printed, re.MULTILINE)
    assert printed.endswith((tmp_path / "witness.txt").read_text().rstrip("\n") + "\n")
    proof = tmp_path / "r-1.json"
    proof.write_text(proof.read_text().replace("delete_file", "read_file"))
    check = ["-m", "agent_gateway_store.cli", "evidence", "check", proof.name, "--key"]
    check.append((tmp_path / "log.vkey").read_text())
    assert forks().run(check, cwd=tmp_path, env=os.environ, timeout=60).returncode == 3


def test_testing_page(tmp_path: Path) -> None:
    printed, _ = follow("how-to/testing-plugins.md", tmp_path, first="#")

    assert re.search(r"^=+ \d\d passed, 3 skipped", printed, re.MULTILINE), printed


async def test_grants_suffice(postgres_database: Callable[[], str]) -> None:
    """With the grants of the docs a gateway works, and cannot delete an audit event or choose its id."""
    url, role = postgres_database(), f"app_{uuid4().hex}"
    async with GatewayStore(url, auto_migrate=True):
        pass
    grants, _ = blocks("sql", PAGES["how-to/postgresql-and-redis.md"].replace("gateway_app", role))
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
            assert await store.evidence.seal() is not None
            assert await store.audit.ship(Refusing(), once=True) == 0
            assert (len(await store.sinks.list()), await store.sinks.redrive()) == (1, 2)
            assert await store.sinks.forget("refusing")

            chosen = "INSERT INTO audit_events ({0}) SELECT {0} + 1000 FROM audit_events"
            for refused in ("DELETE FROM audit_events", chosen.format("id"), chosen.format("transaction_id")):
                with pytest.raises(ProgrammingError, match="permission denied"):
                    async with store.database.sessions() as session:
                        await session.execute(text(refused))
            assert await store.audit.write_many(make_event() for _ in range(3)) == {"STORED": 3}
            assert outcomes == ["STORED", "STORED"]
            assert len(await store.audit.list_recent()) == 5
    finally:
        await engine.dispose()
        await owner.execute(f"DROP OWNED BY {role}; DROP ROLE {role}")
        await owner.close()


class Refusing:
    name = "refusing"

    async def send(self, _events: object) -> None:
        raise NotDeliveredError("no", is_permanent=True)


def test_events_hash_as_the_page_says(tmp_path: Path) -> None:
    (tmp_path / "page.py").write_text(python_of("reference/canonical-json.md"))
    content_hash = runpy.run_path(str(tmp_path / "page.py"))["content_hash"]

    with SyncGatewayStore() as store:
        for args in ({"path": "ü"}, {"n": 1e300, "z": -0.0, "nul": "\0"}, {"n": 2**70}):
            store.audit.write(make_event(sanitized_args=args, risk_score=1e-7))
        events = store.audit.list_recent()

    assert [event.content_hash for event in events] == [content_hash(event) for event in events] != []


def test_hooks_do_what_their_page_says(tmp_path: Path) -> None:
    (tmp_path / "page.py").write_text(python_of("reference/hooks.md"))
    page = runpy.run_path(str(tmp_path / "page.py"))
    plugins = [page[name]() for name in ("HideAddresses", "CountDenials", "ProductionNeedsAReason")]
    app = typer.Typer()
    app.callback()(lambda: None)
    page["gateway_store_register_commands"](app)

    with SyncGatewayStore(plugins=plugins) as store:
        store.audit.write(make_event(sanitized_args={"to": "ann@example.com"}, decision="DENY"))
        [stored] = store.audit.list_recent()
        call = ToolCall(server="prod-db", tool="drop_table")
        token = store.approvals.issue_token(make_request(tool_call=call))
        with pytest.raises(DecisionVetoedError, match="say why"):
            store.approvals.approve(token, approver_id="alice")
        counted = CliRunner().invoke(app, ["pending-count"]).stdout
        store.approvals.approve(token, approver_id="alice", note="ticket 4711, backed up")

    assert stored.sanitized_args == {"to": "(address)"}
    assert [flag.field for flag in stored.redaction_flags] == ["sanitized_args.to"]
    assert plugins[1].denials == {stored.caller_id: 1}
    assert counted == "1\n"


def test_alembic_of_a_host_leaves_the_store_alone(tmp_path: Path) -> None:
    """With the function of the page, a host's Alembic proposes to drop nothing; without it, it would."""
    source = blocks("python", PAGES["how-to/migrate.md"])[-1]
    (tmp_path / "env.py").write_text(source)
    include_object = runpy.run_path(str(tmp_path / "env.py"))["include_object"]

    def differences(connection: Connection, **options: object) -> list[object]:
        return compare_metadata(MigrationContext.configure(connection, opts=options), MetaData())

    with SyncGatewayStore("sqlite:///host.db"):
        pass
    # Without a pool, whose connection Python 3.13 finds unclosed.
    with create_engine("sqlite:///host.db", poolclass=NullPool).connect() as connection:
        assert differences(connection)
        assert differences(connection, include_object=include_object) == []


def test_the_commands_of_retention_run(tmp_path: Path) -> None:
    """Prune, verify, hold, find, erase, as the page says; the log verifies at its end, with one event erased."""
    page = PAGES["how-to/retention.md"]
    script = [block for block in blocks("sh", page) if not block.startswith("pip install")]

    settings = {"DATABASE_URL": "sqlite:///own.db"}
    whole = "set -euo pipefail\n" + "".join(script)
    printed, said = run(tmp_path, "bash", "-c", whole, load=["pyarrow.parquet", "pyarrow.dataset"], **settings)

    assert "1 event pruned in 1 file; 0 are held." in printed
    assert re.search(r"integrity +ok\n(?:.*\n)*erased +1\npruned +1\narchived +1\n", printed)
    assert "Erased at position 0 in the archive" in printed
    assert said == "Reading own.db.\n" * 5


def test_timers_name_one_command_by_its_full_path() -> None:
    """Cron's PATH is /usr/bin and /bin alone, where pip installs nothing; and what one page says holds on the next."""
    timers = [
        (page, line)
        for page, source in PAGES.items()
        for block in BLOCK.finditer(source)
        if (block["title"] or "").startswith(("/etc/cron.d/", "/etc/systemd/"))
        for line in block["body"].splitlines()
        if "gateway-store " in line.replace("/etc/gateway-store/", "")
    ]

    assert len(timers) >= 6
    assert [(page, line) for page, line in timers if not re.search(r"[ =]/usr/local/bin/gateway-store ", line)] == []
