"""Checks plugins: whether their settings are complete, and whether a notice arrives."""

from __future__ import annotations

import asyncio
from collections.abc import Container, Mapping, Sequence
from dataclasses import asdict
from datetime import timedelta
from typing import Any
from uuid import uuid4

from agent_gateway_store.clock import utc_now
from agent_gateway_store.hooks.dispatch import Dispatcher
from agent_gateway_store.hooks.manager import Plugins
from agent_gateway_store.hooks.plugin import REGISTER, PluginRecord, SettingsState
from agent_gateway_store.models.values import ApprovalStatus, Notice, ToolCall
from agent_gateway_store.settings import StoreSettings


async def check_plugins(
    plugins: Plugins,
    configured: Mapping[str, SettingsState],
    settings: StoreSettings,
    *,
    only: Container[str] = (),
    send: bool = True,
) -> list[dict[str, Any]]:
    """Check plugins, all but the blocked ones, and send two test notices through each of their notifiers.

    Args:
        plugins: Loaded, and asked for their notifiers.
        configured: Their settings.
        settings: Of the store.
        only: Names of those to check; what is not ready to work is then a failure. Empty: all.
        send: Whether to send.

    Returns:
        For each plugin its `name`, the state of its `settings` (None if it declares none), the names of its `notifiers`
        that took the test notices (without `send`: all of them), `ok`, and its `problems`, which hold no secret.
    """
    dispatcher = Dispatcher(plugins, settings)
    chosen = [each for each in plugins.records if (each.name in only if only else each.state != "blocked")]
    try:
        if send:
            await dispatcher.open()
        return await asyncio.gather(
            *(_check(each, configured.get(each.name), dispatcher if send else None, bool(only)) for each in chosen)
        )
    finally:
        await dispatcher.aclose()


async def _check(
    record: PluginRecord, settings: SettingsState | None, dispatcher: Dispatcher | None, is_named: bool
) -> dict[str, Any]:
    problems = [record.error] if record.error else []
    # Every installed plugin is checked by default; one that nobody has set up is a failure only where it was named.
    if settings is not None and (settings.state == "wrong" or (is_named and settings.state == "missing")):
        problems += settings.problems
    if is_named and record.state == "active" and REGISTER in record.hooks and not record.notifiers:
        reads = f": see the variables {settings.prefix}..." if settings is not None else ""
        problems.append(f"it offers no notifier, so it is not set up{reads}")
    reached = []
    for notifier in record.notifiers:
        error = await _send(dispatcher, notifier) if dispatcher is not None else None
        if error is None:
            reached.append(notifier)
        else:
            problems.append(f"{notifier}: {error}")
    return {
        "name": record.name,
        "settings": settings and asdict(settings),
        "notifiers": reached,
        "ok": not problems,
        "problems": problems,
    }


async def _send(dispatcher: Dispatcher, notifier: str) -> str | None:
    for notice in sample_notices():
        if (report := await dispatcher.deliver(notifier, notice)).error is not None:
            return report.error
    return None


def sample_notices() -> Sequence[Notice]:
    """Return the notices of one made-up approval: that it waits, then that it was cancelled."""
    # The second notice cancels the first, so that no channel is left with a question that nobody can answer.
    now = utc_now()
    pending = Notice(
        event="pending",
        delivery_id=uuid4(),
        approval_id=uuid4(),
        org_id="default",
        request_id="plugins-check",
        caller_id="gateway-store",
        tool_call=ToolCall(server="gateway-store", tool="plugins_check", arguments={"test": True}),
        risk_explanation="This is a test by `gateway-store plugins check`. Nobody needs to decide.",
        created_at=now,
        expires_at=now + timedelta(minutes=1),
        status=ApprovalStatus.PENDING,
    )
    decided = {
        "event": "decision",
        "delivery_id": uuid4(),
        "status": ApprovalStatus.CANCELLED,
        "approver_id": "gateway-store",
        "note": "The test is over.",
        "decided_at": now,
    }
    return pending, pending.model_copy(update=decided)
