"""What a notifier says by `NotDeliveredError` is in the report."""

from __future__ import annotations

from typing import Any

import pytest
from dispatch_helpers import Doing, dispatching, make_notice

from agent_gateway_store import errors

pytestmark = pytest.mark.unit


def raising(error: Exception) -> Doing:
    def act() -> None:
        raise error

    return Doing("n", act)


@pytest.mark.parametrize(
    ("error", "retry_after_s", "is_permanent"),
    [
        (errors.NotDeliveredError("429", retry_after_s=30), 30.0, False),
        (errors.NotDeliveredError("429", retry_after_s=0.5), 0.5, False),
        (errors.NotDeliveredError("410", is_permanent=True), None, True),
        (errors.NotDeliveredError("503"), None, False),
        (OSError("no route"), None, False),
    ],
)
async def test_report_says_when_to_come_back_and_whether(
    error: Exception, retry_after_s: float | None, is_permanent: bool
) -> None:
    """Both as the notifier gave them; any other exception says neither."""
    with dispatching(raising(error)) as dispatcher:
        report = await dispatcher.deliver("n", make_notice())

    assert (report.ok, report.retry_after_s, report.is_permanent) == (False, retry_after_s, is_permanent)
    assert report.error == f"{type(error).__name__}: {error}"


@pytest.mark.parametrize("asked", [float("nan"), float("inf"), -1, 10**400, "soon", True, object()])
async def test_a_time_that_is_none_is_left_out(asked: Any) -> None:
    """A notifier may hand on what a stranger's server sent."""
    with dispatching(raising(errors.NotDeliveredError("429", retry_after_s=asked, is_permanent=asked))) as dispatcher:
        report = await dispatcher.deliver("n", make_notice())

    assert (report.retry_after_s, report.is_permanent) == (None, asked is True)


async def test_an_unknown_notifier_says_neither() -> None:
    """It may be loaded elsewhere, so it is not given up."""
    with dispatching() as dispatcher:
        report = await dispatcher.deliver("n", make_notice())

    assert (report.ok, report.retry_after_s, report.is_permanent) == (False, None, False)
