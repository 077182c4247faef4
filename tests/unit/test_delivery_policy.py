"""When a notice is tried again, and when it is given up."""

from __future__ import annotations

import pytest

from agent_gateway_store import StoreSettings
from agent_gateway_store.delivery.policy import LONGEST_ASKED_S, LONGEST_WAIT_S, Policy, wait_s
from agent_gateway_store.hooks.dispatch import DeliveryReport

pytestmark = pytest.mark.unit


def failed(**fields: object) -> DeliveryReport:
    return DeliveryReport(notifier="n", ok=False, error="OSError", seconds=0.1, **fields)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("attempt", "least"), [(1, 2), (2, 4), (5, 32), (11, 2048), (12, LONGEST_WAIT_S), (10**6, 3600)]
)
def test_waits_double_with_jitter_up_to_an_hour(attempt: int, least: float) -> None:
    """The formula of stamina: the wait doubles, up to two seconds are added, and there is a longest one."""
    waits = [wait_s(attempt, None) for _ in range(50)]

    assert min(waits) >= least
    assert max(waits) <= min(least + 2, LONGEST_WAIT_S)
    assert least == LONGEST_WAIT_S or len(set(waits)) > 1


def test_what_the_receiver_asks_for_wins_within_limits() -> None:
    """A day at most, so no receiver puts a notice off for ever; a second at least, so none has us in a loop."""
    policy = Policy.of(StoreSettings())

    assert policy.after(failed(retry_after_s=90.0), 1) == ("DUE", 90.0)
    assert policy.after(failed(retry_after_s=90.0), 9) == ("DUE", 90.0)
    assert policy.after(failed(retry_after_s=0.0), 1) == ("DUE", 1.0)
    assert policy.after(failed(retry_after_s=1e9), 1) == ("DUE", LONGEST_ASKED_S)


def test_giving_up() -> None:
    """At the last try, or where the notifier says so; what arrived has arrived, at the last try, too."""
    policy = Policy.of(StoreSettings(notification_max_attempts=3))
    arrived = DeliveryReport(notifier="n", ok=True, error=None, seconds=0.1)

    assert [policy.after(failed(), attempt)[0] for attempt in (1, 2, 3, 4)] == ["DUE", "DUE", "DEAD", "DEAD"]
    assert policy.after(failed(retry_after_s=5.0), 3)[0] == "DEAD"
    assert policy.after(failed(is_permanent=True), 1)[0] == "DEAD"
    assert policy.after(arrived, 3)[0] == "DELIVERED"


def test_a_try_ends_before_its_lease() -> None:
    """The last moment to begin a try leaves it time to fail, and its thread time to give way."""
    for timeout_s in (0.1, 5, 600):
        policy = Policy.of(StoreSettings(plugin_timeout_seconds=timeout_s))
        assert 0 < policy.send_within_s < policy.lease_s - timeout_s - 1
