"""What holds of each bundled notifier: its settings, its libraries, its secrets, and that it works as a plugin."""

from __future__ import annotations

import json
import logging
import re
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
from notifier_helpers import OK, PASSWORD, apprise_notifier, serving, status
from pydantic_settings import BaseSettings
from slack_server import CHANNEL, TOKEN, slack_notifier, slack_running
from webhook_helpers import SECRET, notifier_for

from agent_gateway_store import plugins as bundled
from agent_gateway_store.errors import NotDeliveredError
from agent_gateway_store.hooks.dispatch import Dispatcher
from agent_gateway_store.hooks.manager import LOAD_VARIABLE, Plugins
from agent_gateway_store.plugins.apprise import AppriseSettings
from agent_gateway_store.plugins.http_sink import HttpSinkSettings
from agent_gateway_store.plugins.slack import SlackSettings
from agent_gateway_store.plugins.slack.api import SlackApi
from agent_gateway_store.plugins.webhook import WebhookEndpoint, WebhookSettings
from agent_gateway_store.settings import StoreSettings
from agent_gateway_store.testing import make_notice

# Apprise loads PGPy, which loads a module that Python is about to remove.
pytestmark = [pytest.mark.unit, pytest.mark.filterwarnings("ignore:.imghdr. is deprecated:DeprecationWarning")]

HOW_TO = Path(__file__).parents[2] / "docs" / "how-to"
OPTIONAL = ("apprise", "httpcore", "slack_sdk", "standardwebhooks")

LOADED = """
import json, sys
from agent_gateway_store.plugins import apprise, file_sink, http_sink, log, slack, webhook
for module in (apprise, file_sink, http_sink, slack, webhook):
    module.gateway_store_plugin_settings()
print(json.dumps(sorted(name for name in sys.modules if "." not in name)))
"""

MISSING = """
import json, sys
for name in ("apprise", "httpcore", "slack_sdk", "standardwebhooks"):
    sys.modules[name] = None
from agent_gateway_store import StoreSettings, errors
from agent_gateway_store.hooks.manager import Plugins
from agent_gateway_store.plugins import apprise, slack, webhook
plugins = Plugins([apprise, slack, webhook], environ={"AGENT_GATEWAY_STORE_LOAD_PLUGINS": ""})
assert plugins.notifiers(StoreSettings()) == {}
faults = [record.error for record in plugins.records[:3]]
for build in (
    lambda: webhook.WebhookReceiver(["whsec_" + "A" * 44]),
    lambda: slack.SlackCallback(None, plugins),
):
    try:
        build()
    except errors.MissingExtraError as exc:
        faults.append(str(exc))
print(json.dumps(faults))
"""


def loaded(name: str) -> Plugins:
    """The one bundled plugin of this name, and no other."""
    return Plugins([import_module(f"{bundled.__name__}.{name}")], environ={LOAD_VARIABLE: ""})


def set_up(monkeypatch: pytest.MonkeyPatch, name: str, values: dict[str, str]) -> None:
    """Set the variables of a plugin."""
    for key, value in values.items():
        monkeypatch.setenv(f"AGENT_GATEWAY_STORE_{name.upper()}_{key}", value)


@pytest.mark.parametrize("name", ["apprise", "log", "slack", "webhook"])
async def test_it_delivers_as_soon_as_it_is_set_up(
    name: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Unset it is silent, but for `log`, which needs nothing; nothing is left open when its event loop ends."""
    plugins = loaded(name)
    assert list(plugins.notifiers(StoreSettings())) == (["log"] if name == "log" else [])
    assert plugins.records[0].state == "active"
    async with serving(OK) as server, slack_running() as slack:
        values = {
            "apprise": {"URLS": f"json://127.0.0.1:{server.port}"},
            "log": {},
            "slack": {"BOT_TOKEN": TOKEN, "CHANNEL": CHANNEL, "API_URL": slack.api_url},
            "webhook": {"URL": server.url, "SECRETS": SECRET, "ALLOW_HTTP": "true", "ALLOWED_NETWORKS": "127.0.0.0/8"},
        }
        set_up(monkeypatch, name, values[name])
        dispatcher = Dispatcher(plugins, StoreSettings())
        with caplog.at_level(logging.INFO, "agent_gateway_store.notifications"):
            reports = await dispatcher.deliver_all(make_notice())
        await dispatcher.aclose(5)

    assert [(report.notifier, report.ok) for report in reports] == [(name, True)]
    assert len(server.requests) == (name in ("apprise", "webhook"))
    assert len(slack.messages) == (name == "slack")
    assert [record.name for record in caplog.records] == ["agent_gateway_store.notifications"] * (name == "log")


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("slack", {"BOT_TOKEN": "planted"}),
        ("slack", {"CHANNEL": CHANNEL}),
        ("slack", {"BOT_TOKEN": "planted", "CHANNEL": "#planted"}),
        ("slack", {"BOT_TOKEN": "planted\u00e9", "CHANNEL": CHANNEL}),
        ("slack", {"SIGNING_SECRET": ""}),
        ("slack", {"API_URL": "ftp://planted/"}),
        ("slack", {"APPROVERS": '["planted"]'}),
        ("webhook", {"SECRETS": SECRET}),
        ("webhook", {"URL": "https://example.com/planted-path"}),
        ("webhook", {"URL": "https://example.com/planted-path", "SECRETS": "whsec_planted"}),
        ("webhook", {"URL": "https://example.com/planted-path", "SECRETS": "planted-secret-without-prefix"}),
        ("webhook", {"URL": "http://example.com/planted-path", "SECRETS": SECRET}),
        ("webhook", {"URL": "https://user:planted@example.com/", "SECRETS": SECRET}),
        ("webhook", {"URL": "https://127.0.0.1/planted-path", "SECRETS": SECRET}),
        ("webhook", {"URL": "https://example.com/planted-path", "SECRETS": SECRET, "ALLOWED_NETWORKS": "planted"}),
        ("webhook", {"URL": "https://example.com/planted-path", "SECRETS": SECRET, "PROXY": "socks5://planted:1"}),
        ("webhook", {"ENDPOINTS": '{"Bad Name": {"url": "https://example.com/planted", "secrets": "' + SECRET + '"}}'}),
    ],
)
def test_wrong_settings_are_told_without_their_values(
    name: str, values: dict[str, str], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The plugin is broken, and neither its record nor the log repeats what was set."""
    set_up(monkeypatch, name, values)
    plugins = loaded(name)

    assert plugins.notifiers(StoreSettings()) == {}
    assert plugins.records[0].state == "broken"
    for text in (plugins.records[0].error or "", caplog.text):
        assert "planted" not in text
        assert SECRET not in text


@pytest.mark.parametrize("name", ["apprise", "slack", "webhook"])
async def test_no_secret_is_in_a_log_an_error_or_a_repr(name: str, caplog: pytest.LogCaptureFixture) -> None:
    """Also at DEBUG, whether it goes well or not: no password, token or key, nor a URL, which is one, too."""
    shown: list[object] = []
    failed: list[object] = []
    answers = (OK, status("500 Oops"), status("401 No"), status("410 Gone"))
    async with serving(*answers) as server, slack_running() as slack:
        slack.answers = [None, (500, {}, b""), (200, {}, b'{"ok": false, "error": "invalid_auth"}')]
        with caplog.at_level(logging.DEBUG):
            notifier: Any
            if name == "apprise":
                notifier = apprise_notifier(server.port)
                urls: list[Any] = [f"json://user:{PASSWORD}@127.0.0.1:{server.port}/path"]
                shown.append(AppriseSettings(urls=urls))
            elif name == "slack":
                notifier = slack_notifier(slack.api_url)
                (api,) = [each for each in vars(notifier).values() if isinstance(each, SlackApi)]
                shown += [vars(api), SlackSettings(signing_secret=TOKEN)]  # type: ignore[arg-type]
            else:
                notifier = notifier_for(server)
                receiver: dict[str, Any] = {"url": server.url, "secrets": (SECRET,)}
                shown += [WebhookEndpoint(**receiver), WebhookSettings(**receiver, allow_http=True, allow_private=True)]
            for _ in range(4):
                try:
                    await notifier.notify_pending(make_notice())
                except NotDeliveredError as exc:
                    failed += [exc, str(exc), exc.__cause__]

    assert len(failed) >= 2 * 3
    for thing in (caplog.text, *failed, *shown, notifier, vars(notifier), *map(vars, caplog.records)):
        for secret in (PASSWORD, TOKEN, SECRET, SECRET.removeprefix("whsec_"), "in-the-url"):
            assert secret not in f"{thing!r}{thing}"


def run(code: str, **environment: str) -> list[str]:
    """Run code in a fresh interpreter; return what it printed."""
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)  # type: ignore[no-any-return]


def test_unconfigured_plugins_load_no_optional_library() -> None:
    """Everybody has these plugins installed; who does not use them pays next to nothing."""
    names = set(run(LOADED))

    assert not set(OPTIONAL) & names
    assert not {"requests", "httpx", "aiohttp", "sqlmodel", "sqlalchemy"} & names


def test_missing_libraries_are_told_by_the_extra() -> None:
    """Configured without its library, a plugin is broken and names what to install."""
    faults = run(
        MISSING,
        AGENT_GATEWAY_STORE_APPRISE_URLS="json://127.0.0.1",
        AGENT_GATEWAY_STORE_SLACK_BOT_TOKEN="xoxb-1",
        AGENT_GATEWAY_STORE_SLACK_CHANNEL="C024BE91L",
        AGENT_GATEWAY_STORE_SLACK_SIGNING_SECRET="x",
        AGENT_GATEWAY_STORE_WEBHOOK_URL="https://example.com/",
        AGENT_GATEWAY_STORE_WEBHOOK_SECRETS="whsec_" + "A" * 44,
    )

    for fault, extra in zip(faults, ("apprise", "slack", "webhook", "webhook", "slack"), strict=True):
        assert f"agent-gateway-store[{extra}]" in fault


def test_they_use_only_what_a_stranger_could_use() -> None:
    """Of this package, outside `plugins`: models, hooks, errors, `_text`, the base of settings; else annotations."""
    for file in Path(str(bundled.__file__)).parent.rglob("*.py"):
        text = file.read_text(encoding="utf-8")
        ours = set(re.findall(r"from agent_gateway_store\.(\w+)", text))
        assert ours <= {"_text", "models", "hooks", "errors", "plugins", "settings"}, file.name
        assert "from agent_gateway_store import" not in text, file.name
        outside = re.sub(r"if TYPE_CHECKING:\n((?:    .*\n|\n)+)", "", text)
        used = set(re.findall(r"from agent_gateway_store.settings import (.+)", outside))
        assert used <= {"EnvironmentSettings"}, file.name


@pytest.mark.parametrize(
    ("page", "model"),
    [("webhook.md", WebhookSettings), ("slack.md", SlackSettings), ("ship-events.md", HttpSinkSettings)],
)
def test_the_page_names_every_setting(page: str, model: type[BaseSettings]) -> None:
    """Neither more nor less than there are; a default that is nothing is called none."""
    text = (HOW_TO / page).read_text(encoding="utf-8")
    rows = dict(re.findall(r"^\| `([A-Z_]+)` \| (.+?) \|", text.partition("## Settings")[2], re.MULTILINE))

    assert f"`{model.model_config.get('env_prefix')}`" in text
    assert rows == {name.upper(): spoken(field.default) for name, field in model.model_fields.items()}


def spoken(default: object) -> str:
    """A default as the pages write it."""
    if isinstance(default, float):
        default = int(default)
    return "none" if default in (None, (), {}) else f"`{default if isinstance(default, str) else json.dumps(default)}`"
