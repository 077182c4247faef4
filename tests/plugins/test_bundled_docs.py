"""The pages of the bundled notifiers name every setting, with its default."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from pydantic_settings import BaseSettings

from agent_gateway_store.plugins.slack import SlackSettings
from agent_gateway_store.plugins.webhook import WebhookSettings

pytestmark = pytest.mark.unit

HOW_TO = Path(__file__).parents[2] / "docs" / "how-to"


@pytest.mark.parametrize(("page", "model"), [("webhook.md", WebhookSettings), ("slack.md", SlackSettings)])
def test_settings_table(page: str, model: type[BaseSettings]) -> None:
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
