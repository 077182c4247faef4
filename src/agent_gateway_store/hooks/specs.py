"""The hooks a plugin can implement, and the shape of a notifier."""

from __future__ import annotations

from collections.abc import Awaitable, Sequence
from typing import TYPE_CHECKING, Protocol, runtime_checkable

from agent_gateway_store.hooks.markers import hookspec

if TYPE_CHECKING:
    from agent_gateway_store.models.values import Notice
    from agent_gateway_store.settings import StoreSettings

__all__ = ["Notifier", "gateway_store_approval_event", "gateway_store_register_notifiers"]


@runtime_checkable
class Notifier(Protocol):
    """Tells somebody about approvals.

    Its methods run in a thread and an event loop of its own, within `PLUGIN_TIMEOUT_SECONDS`; then they are cancelled.
    Raising means "not delivered": the same notice comes again later. So a notice can arrive more than once; its
    `delivery_id` stays the same. Several notices may be under way at once.

    Attributes:
        name: Unique among all notifiers; printable, at most 100 characters.
    """

    @property
    def name(self) -> str: ...

    async def notify_pending(self, notice: Notice) -> None:
        """Tell that somebody must decide.

        Args:
            notice: What is asked, by whom, until when. A copy of its own.
        """

    async def notify_decision(self, notice: Notice) -> None:
        """Tell that it was decided or cancelled, or has expired.

        Args:
            notice: The same approval, with status, approver and time of the decision. A copy of its own.
        """


@hookspec
def gateway_store_register_notifiers(settings: StoreSettings) -> Sequence[Notifier] | None:
    """Contribute notifiers. Called once for each store that opens, in a thread; must not be async.

    Each notifier is looked at alone: one that does not fit the shape, or whose name is taken, is left out and recorded.

    Args:
        settings: Settings of the store. Holds secrets: do not log it.

    Returns:
        A list of notifiers; None or an empty list for none (say, because nothing is configured).
    """


@hookspec
def gateway_store_approval_event(notice: Notice) -> Awaitable[None] | None:
    """Hear of every notice, after the change it tells of was committed.

    May be sync or async. Runs in a thread and an event loop of the plugin's own, within `PLUGIN_TIMEOUT_SECONDS`. Not
    repeated: a process that dies after its commit skips the call. What must arrive belongs in a notifier.

    Args:
        notice: What happened. A copy of its own.

    Returns:
        Nothing that is looked at.
    """
