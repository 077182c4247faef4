"""Two organisations in one store: what one writes is stamped, and the other sees nothing of it."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any
from uuid import UUID, uuid4

import pytest
from contract_helpers import approved, column

from agent_gateway_store import GatewayStore, IssuedKey, clock, errors
from builders import CALL, make_event, make_request


@dataclass
class Organisation:
    """One organisation's view, and what it has written: the same names as every other."""

    view: GatewayStore
    key: IssuedKey
    tokens: dict[str, str]
    ids: dict[str, UUID]


async def settle(store: GatewayStore, org_id: str) -> Organisation:
    """Let an organisation write one of everything."""
    view = store.for_org(org_id)
    await view.audit.write(make_event(request_id="r-1", deterministic_rationale=f"of {org_id}"))
    key = await view.keys.issue("dev-agent", role=f"role of {org_id}")
    tokens = {
        "pending": await view.approvals.issue_token(make_request(request_id="r-1")),
        "approved": await approved(view, request_id="r-2"),
        "used": await approved(view, request_id="r-3"),
    }
    await view.approvals.consume_token(tokens["used"], caller_id="dev-agent", tool_call=CALL)
    ids = {name: (await view.approvals.check_token(token)).approval_id for name, token in tokens.items()}
    return Organisation(view, key, tokens, ids)


@pytest.fixture
async def two(store: GatewayStore) -> tuple[Organisation, Organisation]:
    """Two organisations that use the same names for different things."""
    return await settle(store, "acme", make_event), await settle(store, "globex", make_event)


async def test_everything_written_is_stamped(store: GatewayStore, two: tuple[Organisation, Organisation]) -> None:
    """Rows of every table carry the organisation; an event that names another one is stamped all the same."""
    await two[0].view.audit.write(make_event(org_id="globex"))

    assert await column(store, "org_id", "audit_events") == ["acme", "globex", "acme"]
    assert await column(store, "org_id", "api_keys") == ["acme", "globex"]
    assert await column(store, "org_id", "approval_requests") == ["acme"] * 3 + ["globex"] * 3
    assert await column(store, "org_id", "approval_votes") == ["acme"] * 2 + ["globex"] * 2
    assert (await two[0].view.keys.verify(two[0].key.plaintext)).org_id == "acme"


async def test_listings_show_one_organisation(store: GatewayStore, two: tuple[Organisation, Organisation]) -> None:
    """Every listing and every look-up by name gives one's own; the unbound store sees all."""
    for org_id, organisation in zip(("acme", "globex"), two, strict=True):
        view = organisation.view
        pages: list[list[Any]] = [
            await view.audit.list_recent(),
            await view.audit.list_by_caller("dev-agent"),
            await view.audit.list_by_decision("ALLOW"),
            await view.keys.list(),
            await view.approvals.list_requests(),
            await view.approvals.list_requests("PENDING"),
        ]
        assert [{row.org_id for row in page} for page in pages] == [{org_id}] * len(pages)
        assert [len(page) for page in pages] == [1, 1, 1, 1, 3, 1]
        event = await view.audit.get_by_request_id("r-1")
        assert event is not None
        assert event.deterministic_rationale == f"of {org_id}"
        assert (await view.keys.get("dev-agent")).role == f"role of {org_id}"
    assert len(await store.audit.list_recent()) == 2
    assert len(await store.keys.list()) == 2
    assert len(await store.approvals.list_requests()) == 6


ByToken = Callable[[GatewayStore, str], Awaitable[Any]]
BY_TOKEN: list[ByToken] = [
    lambda view, token: view.approvals.check_token(token),
    lambda view, token: view.approvals.check_token(token, fresh=True),
    lambda view, token: view.approvals.approve(token, "approver-9"),
    lambda view, token: view.approvals.deny(token, "approver-9"),
    lambda view, token: view.approvals.cancel(token, "approver-9"),
    lambda view, token: view.approvals.consume_token(token, caller_id="dev-agent", tool_call=CALL),
    lambda view, token: view.approvals.release_output(token, caller_id="dev-agent"),
    lambda view, token: view.approvals.record_outcome(token, "done"),
    lambda view, token: view.approvals.wait_for_decision(token, timeout_s=0),
]
BY_ID: list[Callable[[GatewayStore, UUID], Awaitable[Any]]] = [
    lambda view, found: view.approvals.get(approval_id=found),
    lambda view, found: view.approvals.approve(approval_id=found, approver_id="approver-9"),
    lambda view, found: view.approvals.deny(approval_id=found, approver_id="approver-9"),
    lambda view, found: view.approvals.cancel(approval_id=found, approver_id="approver-9"),
]


async def refusal(answer: Awaitable[Any]) -> tuple[Any, ...]:
    """Return all that an error tells."""
    with pytest.raises(errors.GatewayStoreError) as caught:
        await answer
    return type(caught.value), str(caught.value), vars(caught.value)


async def test_foreign_approval_looks_absent(two: tuple[Organisation, Organisation]) -> None:
    """With the token or the id of another organisation nothing is read, decided or used; the error tells nothing."""
    acme, globex = two
    before = [(row.status, row.version) for row in await globex.view.approvals.list_requests()]

    for name in globex.tokens:
        for ask in BY_TOKEN:
            foreign = await refusal(ask(acme.view, globex.tokens[name]))
            assert foreign == await refusal(ask(acme.view, "no-such-token"))
            assert foreign[0] is errors.ApprovalNotFoundError
        for ask in BY_ID:
            assert await refusal(ask(acme.view, globex.ids[name])) == await refusal(ask(acme.view, uuid4()))
    assert [(row.status, row.version) for row in await globex.view.approvals.list_requests()] == before
    assert (await globex.view.approvals.check_token(globex.tokens["pending"])).status == "PENDING"


async def test_foreign_key_looks_unknown(two: tuple[Organisation, Organisation]) -> None:
    """A key of another organisation is refused as any other, and nobody rotates or revokes it from outside."""
    acme, globex = two
    await globex.view.keys.issue("only-theirs", role="r")

    with pytest.raises(errors.InvalidApiKeyError):
        await acme.view.keys.verify(globex.key.plaintext)
    for ask in (acme.view.keys.get, acme.view.keys.rotate, acme.view.keys.revoke):
        assert await refusal(ask("only-theirs")) == (
            errors.ApiKeyNotFoundError,
            "No API key for caller 'only-theirs': issue one with `gateway-store keys issue`.",
            {"caller_id": "only-theirs"},
        )
        with pytest.raises(errors.ApiKeyNotFoundError):
            await ask("dev-agent", org_id="globex")
    with pytest.raises(ValueError, match="bound to another organisation"):
        await acme.view.keys.issue("new-agent", role="r", org_id="globex")
    await acme.view.keys.revoke("dev-agent")
    assert (await globex.view.keys.verify(globex.key.plaintext)).role == "role of globex"


async def test_unbound_store_names_the_organisation(
    store: GatewayStore, two: tuple[Organisation, Organisation]
) -> None:
    """Without `for_org` a key's organisation is an argument; left out, it is "default"."""
    assert (await store.keys.get("dev-agent", org_id="globex")).role == "role of globex"
    assert (await store.keys.issue("dev-agent", role="r")).api_key.org_id == "default"
    assert (await store.keys.revoke("dev-agent", org_id="acme")).org_id == "acme"
    assert (await store.keys.verify(two[1].key.plaintext)).org_id == "globex"


async def test_request_of_another_organisation_is_refused(store: GatewayStore) -> None:
    """A request that names another organisation is not issued; one that names none, or one's own, is stamped."""
    acme = store.for_org("acme")

    with pytest.raises(
        errors.ApprovalMismatchError, match=r"belongs to another organisation than this store: use"
    ) as caught:
        await acme.approvals.issue_token(make_request(org_id="globex"))
    assert caught.value.approval_id is not None
    for request in (make_request(), make_request(org_id="acme")):
        await acme.approvals.issue_token(request)
    assert await column(store, "org_id", "approval_requests") == ["acme", "acme"]


async def test_sweep_is_of_one_organisation(store: GatewayStore, two: tuple[Organisation, Organisation]) -> None:
    """`expire_stale` of one leaves the other's rows as they are."""
    clock.move(timedelta(hours=2))

    assert await two[0].view.approvals.expire_stale() == 2
    statuses = await column(store, "status", "approval_requests")
    assert statuses == ["EXPIRED", "EXPIRED", "USED", "PENDING", "APPROVED", "USED"]
    assert await store.approvals.expire_stale() == 2


async def test_same_call_of_two_organisations_is_two_approvals(two: tuple[Organisation, Organisation]) -> None:
    """Asking again joins one's own pending approval, never the other's."""
    acme, globex = two
    again = await acme.view.approvals.issue_token(make_request(request_id="r-1"))

    assert (await acme.view.approvals.check_token(again)).approval_id == acme.ids["pending"]
    assert (await globex.view.approvals.check_token(globex.tokens["pending"])).approval_id == globex.ids["pending"]


async def test_cursor_of_another_organisation_shows_nothing_of_it(two: tuple[Organisation, Organisation]) -> None:
    """A cursor is of one listing of one organisation, and refused by any other."""
    acme, globex = two
    page = await globex.view.approvals.list_requests(limit=1)
    with pytest.raises(errors.InvalidCursorError):
        await acme.view.approvals.list_requests(cursor=page.next_cursor)

    assert await acme.view.approvals.list_requests()


async def test_views_work_side_by_side(store: GatewayStore) -> None:
    """Concurrent writes of ten organisations with the same ids all land, each in its own."""
    views = [store.for_org(f"org-{number}") for number in range(10)]
    await asyncio.gather(*(view.audit.write(make_event(request_id="same")) for view in views))
    await asyncio.gather(*(view.keys.issue("dev-agent", role="r") for view in views))

    for number, view in enumerate(views):
        assert [row.org_id for row in await view.audit.list_recent()] == [f"org-{number}"]
        assert [row.org_id for row in await view.keys.list()] == [f"org-{number}"]


async def test_organisation_has_a_name(store: GatewayStore) -> None:
    """An empty name is refused; a view knows its name, and a view of a view is of the last name."""
    with pytest.raises(ValueError, match="org_id must not be empty"):
        store.for_org("")
    assert store.org_id is None
    assert store.for_org("acme").org_id == "acme"
    assert store.for_org("acme").for_org("globex").org_id == "globex"
