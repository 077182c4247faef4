"""Asks plugins whether they object to a decision."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Literal

from agent_gateway_store.errors import DecisionVetoedError
from agent_gateway_store.hooks.lanes import Lanes, gathered
from agent_gateway_store.hooks.text import one_line, spoken

if TYPE_CHECKING:
    from agent_gateway_store.hooks.loading import Plugins
    from agent_gateway_store.models.values import PendingApproval

__all__ = ["VETO", "Vetoes"]

VETO = "gateway_store_veto_decision"

logger = logging.getLogger("agent_gateway_store.hooks")


class Vetoes:
    """Everybody who may object to a decision. One objection, or one failure, is a refusal.

    Args:
        plugins: Gives the plugins, at the first decision.
        lanes: Where they run.
    """

    def __init__(self, plugins: Callable[[], Plugins], lanes: Lanes) -> None:
        self._plugins = plugins
        self._lanes = lanes

    @property
    def is_wanted(self) -> bool:
        """True if some plugin wants to be asked. Costs next to nothing."""
        return bool(self._plugins().callers(VETO))

    async def require_none(
        self,
        request: PendingApproval,
        *,
        decision: Literal["APPROVED", "DENIED"],
        approver_id: str,
        note: str,
        channel: str,
    ) -> None:
        """Return if no plugin objects. All are asked side by side, each within PLUGIN_TIMEOUT_SECONDS.

        Raises:
            DecisionVetoedError: One objects, or raised, hung or answered what is no answer; of several, the first in
                the order of loading is named.
        """
        callers = self._plugins().callers(VETO)
        said = {"decision": decision, "approver_id": approver_id, "note": note, "channel": channel}
        answers = await asyncio.gather(
            *(
                self._lanes.ask("veto", name, partial(_objection, caller, request, said))
                for name, caller in callers.items()
            )
        )
        refusals = []
        for name, answer in zip(callers, answers, strict=True):
            if answer.error is not None:
                logger.warning("Plugin %s failed when asked about a decision: %s", one_line(name), answer.error)
                refusals.append((name, f"it failed ({answer.error})"))
            elif answer.value:
                refusals.append((name, answer.value))
        if refusals:
            plugin, reason = refusals[0]
            raise DecisionVetoedError(
                f"Plugin {one_line(plugin)} refuses this decision: {reason.rstrip('. ')}. "
                "Put that right and decide again, or cancel the approval.",
                approval_id=request.approval_id,
                plugin=plugin,
                reason=reason,
            )


async def _objection(caller: Callable[..., list[object]], request: PendingApproval, said: dict[str, str]) -> str:
    """Run in the plugin's thread: return its objection, "" for none."""
    answers = await gathered(caller(request=request.model_copy(deep=True), **said))
    for answer in answers:
        if answer is not None and not isinstance(answer, str):
            raise TypeError(f"{VETO} returned {type(answer).__name__}, not a text or None")
    objections = [spoken(answer) or "no reason given" for answer in answers if isinstance(answer, str) and answer]
    return "; ".join(objections)
