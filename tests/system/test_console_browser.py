"""The console in a real browser: the whole way of a visitor, live pages, both themes, no script, a phone."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import BrowserContext, Page, Request, expect

from agent_gateway_store import ApprovalRequest, SyncGatewayStore, ToolCall, clock
from browser import browser, picture
from builders import make_event, make_request
from picture_console import served
from xss import PAYLOADS

pytestmark = pytest.mark.system


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, str, Path]]:
    """The console on a demo store: its address, a key, and the folder of its files."""
    folder = tmp_path_factory.mktemp("console")
    with served(folder) as (url, key):
        yield url, key, folder


@contextmanager
def store_in(folder: Path) -> Iterator[SyncGatewayStore]:
    """Open the store that the console shows, as a gateway beside it does."""
    with SyncGatewayStore(f"sqlite:///{folder}/gateway.db", redis_url="") as store:
        yield store


def sign_in(context: BrowserContext, url: str, key: str) -> Page:
    page = context.new_page()
    page.goto(f"{url}/login")
    page.fill("#key", key)
    page.get_by_role("button", name="Sign in").click()
    expect(page.get_by_role("heading", name="Approvals", level=1)).to_be_visible()
    return page


def ask(store: SyncGatewayStore, tool: str, path: str = "/a", **fields: Any) -> ApprovalRequest:
    """Ask for an approval of a tool that only one request names."""
    request = make_request(tool_call=ToolCall(server="live", tool=tool, arguments={"path": path}), **fields)
    store.approvals.issue_token(request)
    return request


def test_a_stranger_goes_the_whole_way(tmp_path: Path) -> None:
    """One command, a key from the screen; deny one call, approve another, find both in the audit log."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = str(probe.getsockname()[1])
    command = [sys.executable, "-m", "agent_gateway_store.cli", "console", "--demo", "--port", port]
    environment = {**os.environ, "AUDIT_SPOOL_PATH": str(tmp_path / "spool.db"), "REDIS_URL": ""}
    environment["AUDIT_SEAL_SECONDS"] = "0.2"
    options: Any = {"cwd": tmp_path, "env": environment, "stdout": subprocess.PIPE, "text": True}
    with (tmp_path / "log").open("w") as log, subprocess.Popen(command, stderr=log, **options) as server:
        try:
            assert server.stdout is not None
            assert "Sign in with this key" in server.stdout.readline()
            key = server.stdout.readline().strip()
            with browser(local=True) as (context, seen):
                page = _patiently(lambda: sign_in(context, f"http://127.0.0.1:{port}", key))
                page.get_by_role("link", name="files.delete_file").click()
                page.get_by_label("Note").fill("Still needed.")
                page.get_by_role("button", name="Deny").click()
                expect(page.get_by_role("heading", name="Denied")).to_be_visible()
                page.get_by_role("link", name="All that waits").click()
                page.get_by_role("link", name="payments.refund_payment").click()
                page.get_by_role("button", name="Approve").click()
                expect(page.get_by_role("heading", name="Approved")).to_be_visible()
                for tool, word in (("delete_file", "DENIED"), ("refund_payment", "APPROVED")):
                    page.get_by_role("navigation", name="Main").get_by_role("link", name="Audit log").click()
                    page.get_by_label("tool name").fill(tool)
                    page.get_by_label("APPROVAL_REQUIRED").first.check()
                    page.get_by_role("button", name="Search").click()
                    page.locator("tbody a").first.click()
                    expect(page.locator("section", has_text="Approval").get_by_text(word).first).to_be_visible()
                    expect(page.get_by_text("demo-approver").first).to_be_visible()
                for _ in range(40):
                    if page.get_by_role("link", name="Download the evidence").count():
                        break
                    time.sleep(0.5)
                    page.reload()
                with page.expect_download() as download:
                    page.get_by_role("link", name="Download the evidence").click()
                assert download.value.path().read_text().startswith("{")
                picture(page, "console-event")
                assert (seen.requests, seen.tried, seen.errors) == ([], [], [])
                with page.expect_response("**/events"):
                    page.goto(f"http://127.0.0.1:{port}/approvals")
                server.terminate()
                server.wait(20)
        finally:
            server.terminate()
            server.wait(20)
    said = (tmp_path / "log").read_text()
    assert key not in said
    assert "Traceback" not in said, "an open inbox is no error where the server stops"


T = TypeVar("T")


def _patiently(work: Callable[[], T], attempts: int = 40) -> T:
    for _ in range(attempts):
        try:
            return work()
        except Exception as exc:
            if "ERR_CONNECTION_REFUSED" not in str(exc):
                raise
            time.sleep(0.5)
    raise AssertionError("the server did not start")


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_no_page_has_a_serious_fault_of_accessibility(site: tuple[str, str, Path], dark: bool) -> None:
    """axe-core looks at every page in both themes, and at the phone's width; the pictures are kept."""
    url, key, folder = site
    with browser(dark=dark, local=True) as (context, seen), store_in(folder) as store:
        ask(store, "long", path="word " * 290, caller_id="c" * 500)
        page = context.new_page()
        page.goto(f"{url}/login")
        faults = {"login": _faults(page)}
        page = sign_in(context, url, key)
        detail = page.locator(".request a").first.get_attribute("href")
        paths = {
            "inbox": "/approvals",
            "history": "/approvals?status=ALL",
            "approval": detail,
            "search": "/audit?since=30d",
            "event": "/audit/5",
            "charts": "/charts",
            "none": "/none",
        }
        for name, path in paths.items():
            page.goto(f"{url}{path}")
            faults[name] = _faults(page)
            picture(page, f"console-{name}-{'dark' if dark else 'light'}")
        page.set_viewport_size({"width": 360, "height": 740})
        for name, path in () if dark else paths.items():
            page.goto(f"{url}{path}")
            faults[f"{name}, phone"] = _faults(page)
            assert page.evaluate("document.documentElement.scrollWidth") <= 360, name
            picture(page, f"console-{name}-phone")
    errors = [error for error in seen.errors if "404" not in error]
    assert ({name: found for name, found in faults.items() if found}, errors) == ({}, [])


def _faults(page: Page) -> list[str]:
    # By itself axe leaves out what came with WCAG 2.2, such as the size of targets.
    options = {"runOnly": ["wcag2a", "wcag2aa", "wcag21a", "wcag21aa", "wcag22aa", "best-practice"]}
    found = Axe().run(page, options=options).response["violations"]
    grave = [each for each in found if each["impact"] in ("serious", "critical") or each["id"] == "landmark-unique"]
    return [f"{each['id']}: {each['nodes'][0]['html'][:200]}" for each in grave]


def test_new_requests_arrive_and_count_down_to_their_end(site: tuple[str, str, Path]) -> None:
    """Without a reload: the request of a gateway is there within seconds; at its end the buttons are off."""
    url, key, folder = site
    with browser(local=True) as (context, _), store_in(folder) as store:
        page = sign_in(context, url, key)
        ask(store, "arrives", expires_at=clock.utc_now() + timedelta(seconds=40))
        expect(page.get_by_role("link", name="live.arrives")).to_be_visible(timeout=30_000)
        # Whatever somebody does to the clock of the own machine.
        page.add_init_script("Date.now = () => 0")
        page.get_by_role("link", name="live.arrives").click()
        expect(page.locator("[data-until]").first).to_contain_text("left")
        # Nothing reads the page again meanwhile, so that it is the script's own clock that comes to the end.
        page.route("**/approvals/*", lambda route: route.abort())
        expect(page.locator("[data-until]").first).to_contain_text("expired", timeout=60_000)
        expect(page.get_by_role("button", name="Approve")).to_be_disabled()
        page.unroute("**/approvals/*")
        expect(page.get_by_role("heading", name="Expired")).to_be_visible(timeout=30_000)


def test_a_note_is_not_lost_when_the_session_ends(site: tuple[str, str, Path]) -> None:
    """The page of who writes one stays and says so; a decision that comes too late leads back to its approval."""
    url, key, folder = site
    with store_in(folder) as store, browser(local=True) as (context, _):
        request = ask(store, "noted")
        page, other = sign_in(context, url, key), sign_in(context, url, key)
        page.goto(f"{url}/approvals/{request.approval_id}")
        # Enter in the note sends nothing.
        page.get_by_label("Note").press("Enter")
        page.get_by_label("Note").fill("A careful reason.")
        other.get_by_role("button", name="Sign out").click()
        expect(other.get_by_role("heading", name="Sign in")).to_be_visible()
        expect(page.get_by_role("status")).to_contain_text("You are signed out.", timeout=60_000)
        expect(page.get_by_label("Note")).to_have_value("A careful reason.")
        page.get_by_role("button", name="Deny").click()
        expect(page.get_by_role("alert")).to_contain_text("Your session had ended: nothing was recorded.")
        expect(page.get_by_label("Your note")).to_have_value("A careful reason.")
        page.fill("#key", key)
        page.get_by_role("button", name="Sign in").click()
        expect(page).to_have_url(f"{url}/approvals/{request.approval_id}")
        assert store.approvals.get(approval_id=request.approval_id).status == "PENDING"


def test_a_tab_never_decides_for_who_signs_in_beside_it(site: tuple[str, str, Path]) -> None:
    """It takes nothing of the other session's page, whose organisation may be another one, and says who has come."""
    url, key, folder = site
    with store_in(folder) as store, browser(local=True) as (context, _):
        issued = store.keys.issue("bob", role="approver", org_id="globex")
        request = ask(store, "beside", required_approvals=2)
        inbox, page = sign_in(context, url, key), context.new_page()
        page.goto(f"{url}/approvals/{request.approval_id}")
        other = sign_in(context, url, issued.plaintext.get_secret_value())
        store.approvals.approve(approval_id=request.approval_id, approver_id="carol")
        for tab in (inbox, page):
            _turn(tab, hidden=False)
            expect(tab.get_by_role("status")).to_contain_text("bob has signed in here.")
            expect(tab.locator(".who b")).to_have_text("demo-approver")
        expect(inbox.get_by_role("link", name="live.beside")).to_be_visible()
        page.get_by_label("Note").fill("Mine.")
        page.get_by_role("button", name="Approve").click()
        expect(page.locator(".who b")).to_have_text("bob")
        expect(page.locator("textarea")).to_have_value("Mine.")
        history = store.approvals.history(request.approval_id)
        assert [step["by"] for step in history if step["event"] == "vote"] == ["carol"]
        inbox.get_by_role("link", name="Load it again").click()
        expect(inbox.locator(".who b")).to_have_text("bob")
        other.close()


def test_only_a_page_that_is_seen_and_stays_holds_a_stream(site: tuple[str, str, Path]) -> None:
    url, key, folder = site
    with store_in(folder) as store, browser(local=True) as (context, _):
        request = ask(store, "streamed")
        page = sign_in(context, url, key)
        with page.expect_event("requestfailed", _is_stream):
            _turn(page, hidden=True)
        page.route("**/events", lambda route: route.fulfill(status=503), times=1)
        with page.expect_response("**/events") as refused:
            _turn(page, hidden=False)
        assert refused.value.status == 503
        with page.expect_response("**/events") as answer:
            pass
        assert answer.value.status == 200
        with page.expect_response("**/events"):
            page.goto(f"{url}/approvals/{request.approval_id}")
        # The form is on its way for good, as where it waits for a connection.
        page.route("**/decision", lambda _: None)
        with page.expect_event("requestfailed", _is_stream):
            page.get_by_role("button", name="Approve").click(no_wait_after=True)


def _turn(page: Page, *, hidden: bool) -> None:
    # Without a screen every tab is seen.
    page.evaluate("value => Object.defineProperty(document, 'hidden', { value, configurable: true })", hidden)
    page.evaluate("document.dispatchEvent(new Event('visibilitychange'))")


def _is_stream(request: Request) -> bool:
    return request.url.endswith("/events")


def test_no_payload_runs_or_leaves(site: tuple[str, str, Path]) -> None:
    """All of the corpus in one inbox, one approval and the audit log: no dialog, no request, no error."""
    url, key, folder = site
    with store_in(folder) as store, browser(local=True) as (context, seen):
        arguments = {payload: [payload] for payload in PAYLOADS}
        call = ToolCall(server=PAYLOADS[0], tool=PAYLOADS[9], arguments=arguments)
        request = make_request(tool_call=call, risk_explanation="\n".join(PAYLOADS))
        store.approvals.issue_token(request)
        for payload in PAYLOADS:
            store.audit.write(make_event(tool_name=payload, caller_id=payload, sanitized_args={payload: payload}))
        newest = store.audit.list_recent(limit=1)[0].id
        page = sign_in(context, url, key)
        for path in ("/approvals", f"/approvals/{request.approval_id}", "/audit", f"/audit/{newest}", "/charts"):
            page.goto(f"{url}{path}", wait_until="load")
        for name in ("calls", "latency", "timeline"):
            page.goto(f"{url}/charts/{name}.svg", wait_until="load")
        store.approvals.cancel(approval_id=request.approval_id, approver_id="test")

    # A drawing that is opened by itself has styles inside, which our policy refuses, and asks for a favicon.
    errors = [error for error in seen.errors if not re.search("inline style|style-src|404", error)]
    assert (seen.requests, seen.tried, errors) == ([], [], [])
