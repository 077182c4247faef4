"""Two organisations that use the same names: each has its own rows, keys and approvals, and sees no other."""

from __future__ import annotations

import asyncio
from datetime import timedelta
from typing import Any

import pytest
from contract_helpers import WITH_REDIS, column, on_backend
from organisation_helpers import MARK, Other, settle

from agent_gateway_store import GatewayStore, clock, errors
from builders import make_event, make_request

pytest_generate_tests = on_backend("postgres")


@pytest.fixture
async def two(store: GatewayStore) -> tuple[Other, Other]:
    """Two organisations that use the same names for different things."""
    return await settle(store.for_org("acme"), "of-acme"), await settle(store.for_org("globex"), MARK)


@WITH_REDIS
async def test_everything_written_is_stamped_and_listed_by_its_own(
    store: GatewayStore, two: tuple[Other, Other]
) -> None:
    """Rows of every table carry the organisation; an event that names another one is stamped all the same. Listings
    and look-ups by name give one's own; the unbound store sees all."""
    await two[0].view.audit.write(make_event(org_id="globex", decision="DENY"))

    for table, each in (("audit_events", 2), ("api_keys", 1), ("approval_requests", 4), ("approval_votes", 3)):
        extra = ["acme"] if table == "audit_events" else []
        assert await column(store, "org_id", table) == ["acme"] * each + ["globex"] * each + extra
    for org_id, mark, own in zip(("acme", "globex"), ("of-acme", MARK), two, strict=True):
        view = own.view
        pages: list[list[Any]] = [
            await view.audit.list_by_caller("dev-agent"),
            await view.audit.list_by_decision("ALLOW"),
            await view.keys.list(),
            await view.approvals.list_requests(),
            await view.approvals.list_requests("PENDING"),
        ]
        assert [{row.org_id for row in page} for page in pages] == [{org_id}] * len(pages)
        assert [len(page) for page in pages] == [3 if org_id == "acme" else 2, 2, 1, 4, 1]
        event = await view.audit.get_by_request_id("r-1")
        assert event is not None
        assert event.deterministic_rationale == mark
        assert ((await view.keys.get("dev-agent")).role, (await view.keys.verify(own.key.plaintext)).org_id) == (
            mark,
            org_id,
        )
        assert (await view.approvals.check_token(own.tokens["PENDING"])).status == "PENDING"
    assert [len(page) for page in (await store.audit.list_recent(), await store.keys.list())] == [5, 2]
    assert len(await store.approvals.list_requests()) == 8


async def test_keys_are_those_of_one_organisation(store: GatewayStore, two: tuple[Other, Other]) -> None:
    """A bound store issues and ends no key but its own; an unbound one names the organisation, else it is "default"."""
    acme, globex = two
    with pytest.raises(ValueError, match="bound to another organisation"):
        await acme.view.keys.issue("new-agent", role="r", org_id="globex")
    await acme.view.keys.revoke("dev-agent")

    assert (await store.keys.verify(globex.key.plaintext)).org_id == "globex"
    assert (await store.keys.get("dev-agent", org_id="globex")).role == MARK
    assert (await store.keys.issue("dev-agent", role="r")).api_key.org_id == "default"
    assert (await store.keys.revoke("dev-agent", org_id="globex")).org_id == "globex"


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


async def test_asking_again_and_sweeping_are_of_one_organisation(store: GatewayStore, two: tuple[Other, Other]) -> None:
    """The same call joins one's own pending approval; `expire_stale` of one leaves the other's rows as they are."""
    acme, globex = two
    again = await acme.view.approvals.issue_token(make_request(request_id="r-PENDING", risk_explanation="of-acme"))
    assert (await acme.view.approvals.check_token(again)).approval_id == acme.ids["PENDING"]
    assert (await globex.view.approvals.check_token(globex.tokens["PENDING"])).approval_id == globex.ids["PENDING"]
    clock.move(timedelta(hours=2))

    assert await acme.view.approvals.expire_stale() == 2
    statuses = await column(store, "status", "approval_requests")
    assert statuses == ["EXPIRED", "EXPIRED", "DENIED", "USED", "PENDING", "APPROVED", "DENIED", "USED"]
    assert await store.approvals.expire_stale() == 2


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
    with pytest.raises(ValueError, match="org_id must not be empty"):
        await store.keys.issue("dev-agent", role="r", org_id="")
    assert store.org_id is None
    assert store.for_org("acme").org_id == "acme"
    assert store.for_org("acme").for_org("globex").org_id == "globex"
