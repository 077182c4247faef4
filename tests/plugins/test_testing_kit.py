"""The pytest plugin as an author's project uses it: run by a pytest of its own, with warnings as errors."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

pytestmark = [pytest.mark.integration, pytest.mark.system]


def run_pytest(folder: Path, tests: str, *options: str, ini: str = "", **more: str) -> str:
    """Run tests in a folder as in a project of its own; return what pytest said. They must pass.

    `more` are further modules of tests, by name.
    """
    if "no:asyncio" not in options:
        ini = f"asyncio_default_fixture_loop_scope = function\n{ini}"  # pytest-asyncio warns where it is not set
    (folder / "pytest.ini").write_text(f"[pytest]\nfilterwarnings = error\n{ini}")
    for name, source in {"test_it": tests, **more}.items():
        (folder / f"{name}.py").write_text(textwrap.dedent(source))
    ended = subprocess.run(
        # Plugins of other packages that this project's tests need, and an author's project does not have.
        [
            sys.executable,
            *("-m", "pytest", "-q"),
            *("-pno:cacheprovider", "-pno:valkey", "-pno:langsmith_plugin"),
            *options,
        ],
        cwd=folder,
        # What is set on the machine must not matter.
        env=os.environ | {"DATABASE_URL": "postgresql://nowhere/x", "AUDIT_MODE": "strict", "PYTHONPATH": ""},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
    return ended.stdout


USE = """
    from datetime import timedelta

    import pytest
    from agent_gateway_store import ApprovalRequest, ToolCall
    from agent_gateway_store.errors import ApprovalExpiredError

    def request():
        call = ToolCall(server="files", tool="delete_file")
        return ApprovalRequest(request_id="r-1", caller_id="dev", tool_call=call, risk_explanation="Deletes.")

    MARK
    async def test_store(gateway_store, recorded_notifications, tmp_path):
        token = await gateway_store.approvals.issue_token(request())
        await gateway_store.approvals.approve(token, "approver-1")
        pending, decision = await recorded_notifications.wait_for(2)
        assert {pending.event, decision.event} == {"pending", "decision"}
        assert gateway_store.settings.audit_mode == "spool"
        states = {record.name: record.state for record in gateway_store.plugins.records}
        assert states.pop("recording") == "active"
        assert set(states.values()) == {"blocked"}

    MARK
    async def test_clock(gateway_store, gateway_clock):
        before = gateway_clock.now
        token = await gateway_store.approvals.issue_token(request())
        gateway_clock.move(timedelta(hours=2))
        assert gateway_clock.now - before >= timedelta(hours=2)
        with pytest.raises(ApprovalExpiredError):
            await gateway_store.approvals.approve(token, "approver-1")

    MARK
    async def test_store_is_empty_again(gateway_store, recorded_notifications):
        assert await gateway_store.approvals.list_requests() == []
        assert recorded_notifications.notices == []
"""


ANYIO = """
    @pytest.fixture
    def anyio_backend():
        return "asyncio"
"""
OVERRIDDEN = """
    import pytest
    from agent_gateway_store.testing import RecordingNotifier

    @pytest.fixture
    def gateway_store_plugins(recorded_notifications):
        return [RecordingNotifier("mine"), recorded_notifications]

    @pytest.fixture
    def gateway_store_settings(gateway_store_settings):
        return gateway_store_settings.model_copy(update={"environment": "test"})

    @pytest.mark.asyncio
    async def test_it(gateway_store):
        assert gateway_store.settings.environment == "test"
        names = [record.name for record in gateway_store.plugins.records if record.state == "active"]
        assert names == ["mine", "recording"]
"""


def test_store_clock_and_recorder_under_each_async_plugin(tmp_path: Path) -> None:
    """The store opens in the loop of the test, whichever plugin and loop scope it has; nothing warns. An author gives
    the store their own plugin and settings.
    """
    said = run_pytest(
        tmp_path,
        USE.replace("MARK", "@pytest.mark.asyncio"),
        test_module_loop=USE.replace("MARK", "@pytest.mark.asyncio(loop_scope='module')"),
        test_anyio=USE.replace("MARK", "@pytest.mark.anyio") + ANYIO,
        test_overridden=OVERRIDDEN,
    )

    assert "10 passed" in said


def test_store_clock_and_recorder_under_an_async_plugin_that_is_set_up(tmp_path: Path) -> None:
    ini = "asyncio_mode = auto\nasyncio_default_test_loop_scope = session"
    assert "3 passed" in run_pytest(tmp_path, USE.replace("MARK", ""), ini=ini)


def test_blocking_store_needs_no_async_plugin(tmp_path: Path) -> None:
    """A test without `async` gets the blocking store, and the recorder can be waited for; one that asks for the other
    store fails, unless anyio runs it. One that uses neither has loaded neither SQLModel nor Pydantic for it.
    """
    said = run_pytest(
        tmp_path,
        """
        import sys

        import pytest

        loaded = {name.partition(".")[0] for name in sys.modules}

        def test_first(pytestconfig):
            assert pytestconfig.pluginmanager.hasplugin("agent_gateway_store")
            assert not loaded & {"sqlmodel", "sqlalchemy", "pydantic"}

        def test_it(sync_gateway_store, recorded_notifications):
            from agent_gateway_store import ApprovalRequest, ToolCall

            call = ToolCall(server="files", tool="delete_file")
            sync_gateway_store.approvals.issue_token(
                ApprovalRequest(request_id="r-1", caller_id="dev", tool_call=call, risk_explanation="Deletes.")
            )
            (notice,) = recorded_notifications.wait(event="pending")
            assert notice.tool_call == call
            assert recorded_notifications.pending == [notice]
            with pytest.raises(AssertionError, match="0 of 1 decision notices arrived in time"):
                recorded_notifications.wait(event="decision", timeout_s=0.05)

        @pytest.mark.xfail(strict=True)
        def test_other(gateway_store): ...
        """,
        *("-p", "no:asyncio", "-p", "no:hypothesispytest", "-rx"),
        test_later=USE.replace("MARK", "@pytest.mark.anyio") + ANYIO,
    )

    assert "5 passed, 1 xfailed" in said
