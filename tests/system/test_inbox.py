"""The approver's inbox in a live notebook: a real JupyterLab, a real kernel, a real browser that clicks."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Page as Tab
from playwright.sync_api import TimeoutError as TimedOutError
from playwright.sync_api import expect

from agent_gateway_store import ApprovalRequest, SyncGatewayStore, ToolCall
from browser import browser, picture
from jupyter import lab, run_all, write_notebook

pytestmark = pytest.mark.system

HOSTILE = "<img src=x onerror=alert(1)>\u202e"
OPENING = {
    "blocking": 'store = SyncGatewayStore("{url}").open()',
    "awaited": 'store = await GatewayStore("{url}").open()',
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("lab")


@pytest.fixture(scope="module")
def address(folder: Path) -> Iterator[str]:
    with lab(folder) as found:
        yield found


@pytest.fixture
def store(tmp_path: Path) -> Iterator[SyncGatewayStore]:
    """The store, as the gateway has it open beside the notebook."""
    with SyncGatewayStore(f"sqlite:///{tmp_path}/gateway.db") as opened:
        yield opened


def ask(store: SyncGatewayStore, name: str, **fields: str) -> str:
    given = {"caller_id": "dev-agent", "risk_explanation": f"Deletes {name}."} | fields
    call = ToolCall(server="files", tool="delete_file", arguments={"name": name})
    token: str = store.approvals.issue_token(ApprovalRequest(request_id=f"r-{name}", tool_call=call, **given))
    return token


def open_inbox(tab: Tab, address: str, name: str) -> None:
    """Run a notebook until its inbox shows something."""
    run_all(tab, address, name)
    failed = "[data-mime-type='application/vnd.jupyter.error']"
    try:
        tab.wait_for_selector(f".ags-inbox .ags-item, {failed}", timeout=60_000)
    except TimedOutError:
        picture(tab, f"inbox-{name}-failed")
        raise
    assert tab.locator(failed).all_inner_texts() == []


@pytest.mark.parametrize("kind", OPENING)
def test_an_approver_decides_in_a_notebook(
    kind: str, address: str, folder: Path, store: SyncGatewayStore, tmp_path: Path
) -> None:
    """What waits is shown, also what comes later; a click decides under the approver's name, with the note; who was
    slower than somebody else is told so; nothing of the data is taken for markup.
    """
    url = f"sqlite:///{tmp_path}/gateway.db"
    tokens = {name: ask(store, name) for name in ("old.csv", "new.csv")}
    ask(store, "hostile", caller_id=HOSTILE, risk_explanation=HOSTILE)
    write_notebook(
        folder / f"{kind}.ipynb",
        "from agent_gateway_store import GatewayStore, SyncGatewayStore\n"
        "from agent_gateway_store.notebook import inbox\n" + OPENING[kind].format(url=url),
        'inbox(store, approver="alice", interval_s=0.5)',
    )

    with browser(local=True, width=1300) as (context, seen):
        tab = context.new_page()
        open_inbox(tab, address, f"{kind}.ipynb")
        items = tab.locator(".ags-inbox .ags-item")
        expect(items).to_have_count(3)
        picture(tab, f"inbox-{kind}-waiting")

        old = items.filter(has_text="old.csv")
        old.locator("input").fill("as agreed")
        tokens["late.csv"] = ask(store, "late.csv")
        expect(items).to_have_count(4)
        expect(old.locator("input")).to_have_value("as agreed")
        old.get_by_role("button", name="Approve").click()
        expect(items).to_have_count(3)
        items.filter(has_text="late.csv").get_by_role("button", name="Deny").click()
        expect(items).to_have_count(2)
        # Decided elsewhere between the look and the click: the browser does not know of it yet.
        tab.evaluate("Object.defineProperty(document, 'hidden', {value: true, configurable: true})")
        tab.wait_for_timeout(700)
        store.approvals.approve(tokens["new.csv"], approver_id="bob")
        items.filter(has_text="new.csv").get_by_role("button", name="Deny").click()
        said = tab.locator(".ags-inbox .ags-said li")
        expect(said.first).to_contain_text("bob")
        expect(items).to_have_count(1)
        picture(tab, f"inbox-{kind}-decided")

        expect(items).to_contain_text("<img src=x onerror=alert(1)>\\u202e")
        assert tab.locator(".ags-inbox img").count() == 0
        assert [each for each in seen.errors if "dialog" in each] == []
        assert seen.tried == []

    results = {name: store.approvals.check_token(token, fresh=True) for name, token in tokens.items()}
    assert {name: (str(found.status), found.approver_id, found.note) for name, found in results.items()} == {
        "old.csv": ("APPROVED", "alice", "as agreed"),
        "late.csv": ("DENIED", "alice", ""),
        "new.csv": ("APPROVED", "bob", ""),
    }
