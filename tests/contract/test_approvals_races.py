"""Many at once: the database picks one winner, and the others learn who won."""

from __future__ import annotations

import asyncio
from collections import Counter

import pytest
from contract_helpers import approved, column

from agent_gateway_store import ApprovalResult, GatewayStore, errors
from builders import CALL, make_request


@pytest.fixture
def stores(store: GatewayStore, other: GatewayStore) -> list[GatewayStore]:
    """Two stores on one database, as two gateway processes have them."""
    return [store, other]


async def test_one_of_fifty_deciders_and_one_of_fifty_users_wins(stores: list[GatewayStore]) -> None:
    token = await stores[0].approvals.issue_token(make_request())

    async def vote(number: int) -> ApprovalResult:
        approvals = stores[number % 2].approvals
        decide = approvals.approve if number % 3 else approvals.deny
        return await decide(token, f"approver-{number}")

    answers = await asyncio.gather(*map(vote, range(50)), return_exceptions=True)

    (winner,) = [answer for answer in answers if isinstance(answer, ApprovalResult)]
    losers = [answer for answer in answers if isinstance(answer, errors.ApprovalAlreadyDecidedError)]
    assert len(losers) == 49
    assert {(loser.status, loser.approver_id) for loser in losers} == {(winner.status, winner.approver_id)}
    assert await column(stores[0], "approver_id", "approval_votes") == [winner.approver_id]
    token = await approved(stores[0])
    using = (each.approvals.consume_token(token, caller_id="dev-agent", tool_call=CALL) for each in stores * 25)
    answers = await asyncio.gather(*using, return_exceptions=True)
    assert Counter(type(answer) for answer in answers) == {ApprovalResult: 1, errors.ApprovalAlreadyUsedError: 49}


async def test_two_voters_decide_exactly_once(stores: list[GatewayStore]) -> None:
    """With two required and two voting at once, one leaves it pending and one decides, every time."""
    for _ in range(20):
        token = await stores[0].approvals.issue_token(make_request(required_approvals=2))
        results = await asyncio.gather(
            *(store.approvals.approve(token, f"approver-{number}") for number, store in enumerate(stores))
        )

        assert sorted(result.status for result in results) == ["APPROVED", "PENDING"]
        assert (await stores[0].approvals.check_token(token, fresh=True)).status == "APPROVED"


async def test_voice_raised_twice_at_once_counts_once(stores: list[GatewayStore]) -> None:
    for _ in range(5):
        token = await stores[0].approvals.issue_token(make_request(required_approvals=2))
        answers = await asyncio.gather(
            *(store.approvals.approve(token, "approver-1") for store in stores), return_exceptions=True
        )

        kinds = Counter(type(answer) for answer in answers)
        assert kinds == {ApprovalResult: 1, errors.ApprovalAlreadyVotedError: 1}
        assert (await stores[0].approvals.check_token(token, fresh=True)).status == "PENDING"


async def test_asking_at_once_makes_one_approval(stores: list[GatewayStore]) -> None:
    """Of twenty concurrent requests for one call all get a token, one approval is made, and one token is left."""

    async def ask(number: int) -> str:
        return await stores[number % 2].approvals.issue_token(make_request(request_id="r-1"))

    tokens = await asyncio.gather(*map(ask, range(20)))

    async def is_known(token: str) -> bool:
        try:
            await stores[0].approvals.check_token(token, fresh=True)
        except errors.ApprovalNotFoundError:
            return False
        return True

    assert len(set(tokens)) == 20
    assert len(await stores[0].approvals.list_requests()) == 1
    assert sum([await is_known(token) for token in tokens]) == 1


async def test_asking_again_races_with_the_decision(stores: list[GatewayStore]) -> None:
    """A retry beside a decision is of the decided approval or of a new one, and never revives the old."""
    for round_ in range(10):
        first = await stores[0].approvals.issue_token(make_request(request_id=f"r-{round_}"))
        found = (await stores[0].approvals.check_token(first)).approval_id
        again, decided = await asyncio.gather(
            stores[0].approvals.issue_token(make_request(request_id=f"r-{round_}")),
            stores[1].approvals.deny(approval_id=found, approver_id="approver-1"),
        )
        result = await stores[0].approvals.check_token(again, fresh=True)

        assert decided.status == "DENIED"
        assert result.status == ("DENIED" if result.approval_id == found else "PENDING")


async def test_use_races_with_cancellation(stores: list[GatewayStore]) -> None:
    for _ in range(10):
        token = await approved(stores[0])
        answers = await asyncio.gather(
            stores[0].approvals.consume_token(token, caller_id="dev-agent", tool_call=CALL),
            stores[1].approvals.cancel(token, "dev-agent"),
            return_exceptions=True,
        )

        (winner,) = [answer for answer in answers if isinstance(answer, ApprovalResult)]
        (loser,) = [answer for answer in answers if isinstance(answer, errors.ApprovalError)]
        assert getattr(loser, "status", None) == winner.status
        assert (await stores[0].approvals.check_token(token, fresh=True)).status == winner.status
