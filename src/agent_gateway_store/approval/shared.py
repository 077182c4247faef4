"""What the organisation-bound views of one store share, so that many tasks cost few reads."""

from __future__ import annotations

from agent_gateway_store._concurrency import NextFlight
from agent_gateway_store.approval.waiting import Waiting
from agent_gateway_store.models.approval import ApprovalRequest
from agent_gateway_store.storage.pubsub import PubSub

__all__ = ["Shared"]


class Shared:
    """The tasks that check and wait, whichever view they came by.

    Args:
        pubsub: As for `Waiting`.
        trust_s: As for `Waiting`.

    Attributes:
        pubsub: As given.
        waiting: Those who wait.
        checks: Reads of approvals that Redis did not know, by organisation and token.
    """

    def __init__(self, pubsub: PubSub | None, *, trust_s: float) -> None:
        self.pubsub = pubsub
        self.waiting = Waiting(pubsub, trust_s=trust_s)
        self.checks: NextFlight[ApprovalRequest | None] = NextFlight()
