"""What the bundled plugins load, and what they say where their libraries are missing."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

pytestmark = pytest.mark.unit

OPTIONAL = ("apprise", "httpcore", "slack_sdk", "standardwebhooks")

LOADED = """
import json, sys
from agent_gateway_store.plugins import apprise, log, slack, webhook
for module in (apprise, slack, webhook):
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


def run(code: str, **environment: str) -> list[str]:
    """Run code in a fresh interpreter; return what it printed."""
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)  # type: ignore[no-any-return]


def test_unconfigured_plugins_load_no_optional_library() -> None:
    """Everybody has these plugins installed; who does not use them pays next to nothing."""
    loaded = run(LOADED)

    assert not set(OPTIONAL) & set(loaded)
    assert not {"requests", "httpx", "aiohttp", "sqlmodel", "sqlalchemy"} & set(loaded)


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

    extras = ("apprise", "slack", "webhook", "webhook", "slack")
    assert len(faults) == len(extras)
    for fault, extra in zip(faults, extras, strict=True):
        assert f"agent-gateway-store[{extra}]" in fault
