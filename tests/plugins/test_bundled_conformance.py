"""The bundled notifiers pass the suite that authors of others are given."""

from __future__ import annotations

import asyncio
import base64
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractAsyncContextManager, contextmanager
from typing import TypeVar

import pytest
from notifier_helpers import OK, Server, serving
from slack_server import CHANNEL, TOKEN, Slack, slack_running

from agent_gateway_store.hooks.specs import Notifier
from agent_gateway_store.plugins.apprise import AppriseNotifier, AppriseSettings
from agent_gateway_store.plugins.log import LogNotifier
from agent_gateway_store.plugins.slack import SlackNotifier, SlackSettings
from agent_gateway_store.plugins.webhook import WebhookEndpoint, WebhookNotifier, WebhookSettings
from agent_gateway_store.testing import NotifierConformance

pytestmark = pytest.mark.unit

T = TypeVar("T")

SECRET = "whsec_" + base64.b64encode(b"planted-secret-of-the-webhook!!!").decode()
DOWN = 1  # nobody listens on this port


@contextmanager
def in_its_own_thread(running: Callable[[], AbstractAsyncContextManager[T]]) -> Iterator[T]:
    """Run a server beside the tests of the suite, which are not async."""
    loop, ready, end = asyncio.new_event_loop(), threading.Event(), asyncio.Event()
    servers: list[T] = []

    async def run() -> None:
        async with running() as server:
            servers.append(server)
            ready.set()
            await end.wait()

    thread = threading.Thread(target=lambda: loop.run_until_complete(run()), daemon=True)
    thread.start()
    assert ready.wait(10)
    try:
        yield servers[0]
    finally:
        loop.call_soon_threadsafe(end.set)
        thread.join(10)
        loop.close()


@pytest.fixture
def server() -> Iterator[Server]:
    with in_its_own_thread(lambda: serving(OK)) as running:
        yield running


class TestLog(NotifierConformance):
    """The notifier `log`."""

    @pytest.fixture
    def notifier(self) -> LogNotifier:
        return LogNotifier()


class TestWebhook(NotifierConformance):
    """The notifier `webhook`."""

    @pytest.fixture
    def notifier(self, server: Server) -> WebhookNotifier:
        return self._new(server.port)

    @pytest.fixture
    def unreachable_notifier(self) -> Notifier:
        return self._new(DOWN)

    @pytest.fixture
    def sent_text(self, server: Server) -> Callable[[], str]:
        return lambda: "".join(request.body.decode() for request in server.requests)

    @pytest.fixture
    def secret_values(self) -> list[str]:
        return [SECRET, SECRET.removeprefix("whsec_"), "in-the-url"]

    def _new(self, port: int) -> WebhookNotifier:
        url = f"http://127.0.0.1:{port}/hook?key=in-the-url"
        settings = WebhookSettings(allow_http=True, allow_private=True)
        return WebhookNotifier(WebhookEndpoint(url=url, secrets=(SECRET,)), settings)  # type: ignore[arg-type]


class TestSlack(NotifierConformance):
    """The notifier `slack`."""

    @pytest.fixture
    def slack(self) -> Iterator[Slack]:
        with in_its_own_thread(slack_running) as running:
            yield running

    @pytest.fixture
    def notifier(self, slack: Slack) -> SlackNotifier:
        return self._new(slack.api_url)

    @pytest.fixture
    def unreachable_notifier(self) -> Notifier:
        return self._new(f"http://127.0.0.1:{DOWN}/api/")

    @pytest.fixture
    def sent_text(self, slack: Slack) -> Callable[[], str]:
        return lambda: str(slack.messages)

    @pytest.fixture
    def secret_values(self) -> list[str]:
        return [TOKEN]

    def _new(self, api_url: str) -> SlackNotifier:
        return SlackNotifier(SlackSettings(bot_token=TOKEN, channel=CHANNEL, api_url=api_url))  # type: ignore[arg-type]


@pytest.mark.filterwarnings("ignore:.imghdr. is deprecated:DeprecationWarning")
class TestApprise(NotifierConformance):
    """The notifier `apprise`."""

    @pytest.fixture
    def notifier(self, server: Server) -> AppriseNotifier:
        return self._new(server.port)

    @pytest.fixture
    def unreachable_notifier(self) -> Notifier:
        return self._new(DOWN)

    @pytest.fixture
    def sent_text(self, server: Server) -> Callable[[], str]:
        return lambda: "".join(request.body.decode() for request in server.requests)

    @pytest.fixture
    def secret_values(self) -> list[str]:
        return ["planted-password"]

    def _new(self, port: int) -> AppriseNotifier:
        return AppriseNotifier(AppriseSettings(urls=[f"json://user:planted-password@127.0.0.1:{port}"]))  # type: ignore
