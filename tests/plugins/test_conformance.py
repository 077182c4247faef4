"""Every bundled notifier passes the conformance suite, against servers of its kind."""

from __future__ import annotations

import json
import socket
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractAsyncContextManager, contextmanager
from typing import TypeVar

import pytest
from anyio.from_thread import start_blocking_portal
from notifier_helpers import OK, PASSWORD, Server, apprise_notifier, serving
from slack_server import TOKEN, Slack, slack_notifier, slack_running
from webhook_helpers import SECRET, notifier_for

from agent_gateway_store.plugins.apprise import AppriseNotifier
from agent_gateway_store.plugins.log import LogNotifier
from agent_gateway_store.plugins.slack import SlackNotifier
from agent_gateway_store.plugins.webhook import WebhookNotifier
from agent_gateway_store.testing import NotifierConformance, RecordingNotifier

pytestmark = pytest.mark.unit

T = TypeVar("T")


@contextmanager
def in_thread(server: AbstractAsyncContextManager[T]) -> Iterator[T]:
    """Run a server of the tests in an event loop of its own."""
    with start_blocking_portal() as portal, portal.wrap_async_context_manager(server) as running:
        yield running


@pytest.fixture
def server() -> Iterator[Server]:
    """A receiver that takes everything."""
    with in_thread(serving(OK)) as running:
        yield running


@pytest.fixture
def free_port() -> int:
    """A port on which nothing listens."""
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        return int(bound.getsockname()[1])


class TestLog(NotifierConformance):
    """The notifier `log`."""

    @pytest.fixture
    def notifier(self) -> LogNotifier:
        """It needs nothing."""
        return LogNotifier()

    @pytest.fixture
    def sent_text(self, caplog: pytest.LogCaptureFixture) -> Callable[[], str]:
        """What it logs."""
        caplog.set_level("INFO")
        return lambda: caplog.text


class TestRecording(NotifierConformance):
    """The notifier of the kit itself."""

    @pytest.fixture
    def notifier(self) -> RecordingNotifier:
        """A fresh one."""
        return RecordingNotifier()


class TestWebhook(NotifierConformance):
    """The notifier `webhook`."""

    @pytest.fixture
    def notifier(self, server: Server) -> WebhookNotifier:
        """On that receiver."""
        return notifier_for(server)

    @pytest.fixture
    def unreachable_notifier(self, free_port: int) -> WebhookNotifier:
        """On a receiver that is down."""
        return notifier_for(Server([], port=free_port))

    @pytest.fixture
    def sent_text(self, server: Server) -> Callable[[], str]:
        """The bodies."""
        return lambda: b"\n".join(request.body for request in server.requests).decode()

    @pytest.fixture
    def secret_values(self) -> Sequence[str]:
        """The key, and the path of the URL."""
        return SECRET, SECRET.removeprefix("whsec_"), "in-the-url"


class TestSlack(NotifierConformance):
    """The notifier `slack`."""

    @pytest.fixture
    def slack(self) -> Iterator[Slack]:
        """A stand-in for Slack."""
        with in_thread(slack_running()) as slack:
            yield slack

    @pytest.fixture
    def notifier(self, slack: Slack) -> SlackNotifier:
        """On the stand-in."""
        return slack_notifier(slack.api_url, timeout_seconds=4)

    @pytest.fixture
    def unreachable_notifier(self, free_port: int) -> SlackNotifier:
        """On a Slack that is down."""
        return slack_notifier(f"http://127.0.0.1:{free_port}/api/", timeout_seconds=4)

    @pytest.fixture
    def sent_text(self, slack: Slack) -> Callable[[], str]:
        """The messages of the channel."""
        return lambda: json.dumps(slack.messages, ensure_ascii=False)

    @pytest.fixture
    def secret_values(self) -> Sequence[str]:
        """The bot's token."""
        return (TOKEN,)


# Apprise loads PGPy, which loads a module that Python is about to remove.
@pytest.mark.filterwarnings("ignore:.imghdr. is deprecated:DeprecationWarning")
class TestApprise(NotifierConformance):
    """The notifier `apprise`, on Apprise's plugin that posts JSON."""

    @pytest.fixture
    def notifier(self, server: Server) -> AppriseNotifier:
        """On that receiver."""
        return apprise_notifier(server.port)

    @pytest.fixture
    def unreachable_notifier(self, free_port: int) -> AppriseNotifier:
        """On a receiver that is down."""
        return apprise_notifier(free_port)

    @pytest.fixture
    def sent_text(self, server: Server) -> Callable[[], str]:
        """The messages."""
        return lambda: "\n".join(json.dumps(request.json, ensure_ascii=False) for request in server.requests)

    @pytest.fixture
    def secret_values(self) -> Sequence[str]:
        """The password in the URL."""
        return (PASSWORD,)
