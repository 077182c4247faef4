"""Every bundled notifier passes the conformance suite, and the suite finds what is wrong with bad ones."""

from __future__ import annotations

import pytest

from agent_gateway_store.plugins.log import LogNotifier
from agent_gateway_store.testing import NotifierConformance, RecordingNotifier

pytestmark = pytest.mark.unit


class TestLog(NotifierConformance):
    """The notifier `log`."""

    @pytest.fixture
    def notifier(self) -> LogNotifier:
        """It needs nothing."""
        return LogNotifier()


class TestRecording(NotifierConformance):
    """The notifier of the kit itself."""

    @pytest.fixture
    def notifier(self) -> RecordingNotifier:
        """A fresh one."""
        return RecordingNotifier()
