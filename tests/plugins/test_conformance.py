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
    with start_blocking_portal() as portal, portal.wrap_async_context_manager(server) as running:
        yield running


@pytest.fixture
def server() -> Iterator[Server]:
    with in_thread(serving(OK)) as running:
        yield running


@pytest.fixture
def free_port() -> int:
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        return int(bound.getsockname()[1])


class TestLog(NotifierConformance):
    @pytest.fixture
    def notifier(self) -> LogNotifier:
        return LogNotifier()

    @pytest.fixture
    def sent_text(self, caplog: pytest.LogCaptureFixture) -> Callable[[], str]:
        caplog.set_level("INFO")
        return lambda: caplog.text


class TestRecording(NotifierConformance):
    @pytest.fixture
    def notifier(self) -> RecordingNotifier:
        return RecordingNotifier()


class TestWebhook(NotifierConformance):
    @pytest.fixture
    def notifier(self, server: Server) -> WebhookNotifier:
        return notifier_for(server)

    @pytest.fixture
    def unreachable_notifier(self, free_port: int) -> WebhookNotifier:
        return notifier_for(Server([], port=free_port))

    @pytest.fixture
    def sent_text(self, server: Server) -> Callable[[], str]:
        return lambda: b"\n".join(request.body for request in server.requests).decode()

    @pytest.fixture
    def secret_values(self) -> Sequence[str]:
        return SECRET, SECRET.removeprefix("whsec_"), "in-the-url"


class TestSlack(NotifierConformance):
    @pytest.fixture
    def slack(self) -> Iterator[Slack]:
        with in_thread(slack_running()) as slack:
            yield slack

    @pytest.fixture
    def notifier(self, slack: Slack) -> SlackNotifier:
        return slack_notifier(slack.api_url, timeout_seconds=4)

    @pytest.fixture
    def unreachable_notifier(self, free_port: int) -> SlackNotifier:
        return slack_notifier(f"http://127.0.0.1:{free_port}/api/", timeout_seconds=4)

    @pytest.fixture
    def sent_text(self, slack: Slack) -> Callable[[], str]:
        return lambda: json.dumps(slack.messages, ensure_ascii=False)

    @pytest.fixture
    def secret_values(self) -> Sequence[str]:
        return (TOKEN,)


# Apprise loads PGPy, which loads a module that Python is about to remove.
@pytest.mark.filterwarnings("ignore:.imghdr. is deprecated:DeprecationWarning")
class TestApprise(NotifierConformance):
    @pytest.fixture
    def notifier(self, server: Server) -> AppriseNotifier:
        return apprise_notifier(server.port)

    @pytest.fixture
    def unreachable_notifier(self, free_port: int) -> AppriseNotifier:
        return apprise_notifier(free_port)

    @pytest.fixture
    def sent_text(self, server: Server) -> Callable[[], str]:
        return lambda: "\n".join(json.dumps(request.json, ensure_ascii=False) for request in server.requests)

    @pytest.fixture
    def secret_values(self) -> Sequence[str]:
        return (PASSWORD,)
