"""The console in a real browser: the whole way of a visitor, live pages, both themes, no script, a phone."""

from __future__ import annotations

import asyncio
import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import pytest
import uvicorn
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import BrowserContext, Page, Request, expect

from agent_gateway_store import ApprovalRequest, GatewayStore, SyncGatewayStore, ToolCall, clock
from agent_gateway_store.console import create_console
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
    """Open the console in a new tab and sign in."""
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
    """Try until the server is up."""
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
        for name, path in paths.items():
            page.goto(f"{url}{path}")
            faults[f"{name}, phone"] = _faults(page)
            assert page.evaluate("document.documentElement.scrollWidth") <= 360, name
            picture(page, f"console-{name}-phone-{'dark' if dark else 'light'}")
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


def test_long_arguments_hold_up_nobody(site: tuple[str, str, Path]) -> None:
    """An agent asks with 60 kB without a blank, again and again: the inbox stays live, and a click is answered."""
    url, key, folder = site
    call = ToolCall(server="long", tool="run", arguments={"body": "v" * 60_000})
    with browser(local=True) as (context, _), store_in(folder) as store:
        page = sign_in(context, url, key)
        flood = [make_request(tool_call=call, risk_explanation="v" * 60_000) for _ in range(20)]
        for request in flood:
            store.approvals.issue_token(request)
        expect(page.get_by_role("link", name="long.run")).to_have_count(20, timeout=30_000)
        quick = ask(store, "quick")
        expect(page.get_by_role("link", name="live.quick")).to_be_visible(timeout=30_000)
        page.get_by_role("link", name="live.quick").click()
        page.get_by_role("button", name="Deny").click()
        expect(page.get_by_role("heading", name="Denied")).to_be_visible()
        assert store.approvals.get(approval_id=quick.approval_id).status == "DENIED"
        for request in flood:
            store.approvals.cancel(approval_id=request.approval_id, approver_id="test")


def test_of_two_browsers_the_second_reads_who_was_first(site: tuple[str, str, Path]) -> None:
    """Both have the form open; the second to send reads the other's name. Enter in the note sends nothing."""
    url, key, folder = site
    with store_in(folder) as store:
        other = store.keys.issue("bob", role="approver").plaintext.get_secret_value()
        request = ask(store, "raced")
        with browser(local=True) as (context, _):
            tabs = []
            for person in (key, other):
                page = sign_in(context.browser.new_context(), url, person)  # type: ignore[union-attr]
                page.goto(f"{url}/approvals/{request.approval_id}")
                tabs.append(page)
            tabs[0].get_by_label("Note").press("Enter")
            assert store.approvals.get(approval_id=request.approval_id).status == "PENDING"
            tabs[1].get_by_label("Note").fill("Mine.")
            tabs[0].get_by_role("button", name="Approve").click()
            expect(tabs[0].get_by_role("heading", name="Approved")).to_be_visible()
            tabs[1].get_by_role("button", name="Deny").click()
            expect(tabs[1].get_by_role("alert")).to_contain_text("demo-approver was first")

            store.keys.revoke("bob")
            tabs[1].goto(f"{url}/audit")
            expect(tabs[1].get_by_role("heading", name="Sign in")).to_be_visible()


def test_a_note_is_not_lost_when_the_session_ends(site: tuple[str, str, Path]) -> None:
    """The page of who writes one stays and says so; a decision that comes too late leads back to its approval."""
    url, key, folder = site
    with store_in(folder) as store, browser(local=True) as (context, _):
        request = ask(store, "noted")
        page, other = sign_in(context, url, key), sign_in(context, url, key)
        page.goto(f"{url}/approvals/{request.approval_id}")
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


@pytest.mark.parametrize("org_id", ["default", "globex"])
def test_a_tab_never_decides_for_who_signs_in_beside_it(site: tuple[str, str, Path], org_id: str) -> None:
    """It takes nothing of the other session's page, whose organisation may be another one, and says who has come."""
    url, key, folder = site
    with store_in(folder) as store, browser(local=True) as (context, _):
        issued = store.keys.issue(f"bob-{org_id}", role="approver", org_id=org_id)
        request = ask(store, f"beside-{org_id}", required_approvals=2)
        inbox, page = sign_in(context, url, key), context.new_page()
        page.goto(f"{url}/approvals/{request.approval_id}")
        other = sign_in(context, url, issued.plaintext.get_secret_value())
        store.approvals.approve(approval_id=request.approval_id, approver_id="carol")
        for tab in (inbox, page):
            _turn(tab, hidden=False)
            expect(tab.get_by_role("status")).to_contain_text(f"bob-{org_id} has signed in here.")
            expect(tab.locator(".who b")).to_have_text("demo-approver")
        expect(inbox.get_by_role("link", name=f"live.beside-{org_id}")).to_be_visible()
        page.get_by_label("Note").fill("Mine.")
        page.get_by_role("button", name="Approve").click()
        expect(page.locator(".who b")).to_have_text(f"bob-{org_id}")
        expect(page.locator("textarea")).to_have_value("Mine.")
        history = store.approvals.history(request.approval_id)
        assert [step["by"] for step in history if step["event"] == "vote"] == ["carol"]
        inbox.get_by_role("link", name="Load it again").click()
        expect(inbox.locator(".who b")).to_have_text(f"bob-{org_id}")
        other.close()


def test_only_a_page_that_is_seen_and_stays_holds_a_stream(site: tuple[str, str, Path]) -> None:
    """Tabs share six connections; a stream that was refused once is asked for again."""
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


def test_everything_works_without_a_script(site: tuple[str, str, Path]) -> None:
    """Sign in, decide, search and sign out in a browser whose scripts are off."""
    url, key, folder = site
    with store_in(folder) as store, browser(local=True) as (context, _):
        request = ask(store, "plain")
        page = sign_in(context.browser.new_context(java_script_enabled=False), url, key)  # type: ignore[union-attr]
        page.get_by_role("link", name="live.plain").click()
        page.get_by_role("button", name="Deny").click()
        expect(page.get_by_role("heading", name="Denied")).to_be_visible()
        page.get_by_role("navigation", name="Main").get_by_role("link", name="Audit log").click()
        page.get_by_label("caller id").fill("support-agent")
        page.get_by_role("button", name="Search").click()
        assert page.locator("tbody tr").count() > 3
        page.get_by_role("button", name="Sign out").click()
        expect(page.get_by_role("heading", name="Sign in")).to_be_visible()
        assert store.approvals.get(approval_id=request.approval_id).status == "DENIED"


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


async def test_a_database_that_goes_away_comes_back_on_the_page(tmp_path: Path) -> None:
    """The page says so and returns by itself; nobody reloads it."""
    file, away = tmp_path / "gateway.db", tmp_path / "away.db"
    store = GatewayStore(f"sqlite:///{file}", redis_url="")
    async with store, _server(create_console(store)) as url:
        key = (await store.keys.issue("alice", role="approver")).plaintext.get_secret_value()
        loop = asyncio.get_running_loop()

        def visit() -> None:
            with browser(local=True) as (context, _):
                page = sign_in(context, url, key)
                asyncio.run_coroutine_threadsafe(_close(store, file, away), loop).result(20)
                page.goto(f"{url}/approvals")
                expect(page.get_by_role("heading", name="The database is away")).to_be_visible()
                picture(page, "console-away")
                asyncio.run_coroutine_threadsafe(_reopen(store, file, away), loop).result(20)
                expect(page.get_by_role("heading", name="Approvals", level=1)).to_be_visible(timeout=20_000)

        await asyncio.to_thread(visit)


async def _close(store: GatewayStore, file: Path, away: Path) -> None:
    await store.close()
    file.rename(away)


async def _reopen(store: GatewayStore, file: Path, away: Path) -> None:
    away.rename(file)
    await store.open()


@asynccontextmanager
async def _server(app: Any) -> AsyncIterator[str]:
    # `lifespan` off: the store is opened and closed by the test, as by a host.
    config = uvicorn.Config(app, port=0, log_level="warning", lifespan="off", timeout_graceful_shutdown=1)
    web = uvicorn.Server(config)
    task = asyncio.create_task(web.serve())
    while not web.started:
        await asyncio.sleep(0.02)
    yield f"http://127.0.0.1:{web.servers[0].sockets[0].getsockname()[1]}"
    web.should_exit = True
    await task
