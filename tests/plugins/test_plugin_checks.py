"""`gateway-store plugins list` and `check`: settings, told by variable and never by value, and a test notice."""

from __future__ import annotations

from pathlib import Path

import pytest

import plugin_helpers
from agent_gateway_store._text import describe
from agent_gateway_store.hooks.plugin import examine_settings
from commands import Outcome, gateway_store
from plugin_helpers import Install

pytestmark = pytest.mark.integration

install = plugin_helpers.install

SECRET = "hunter2-is-secret"
PLUGIN = """
    from pathlib import Path
    from pydantic import Field, HttpUrl, SecretStr, field_validator
    from pydantic_settings import BaseSettings, SettingsConfigDict
    from agent_gateway_store import hookimpl

    class Settings(BaseSettings):
        model_config = SettingsConfigDict(env_prefix="NOTIFY_CHECKED_")
        token: SecretStr
        path: Path = Path("notices.txt")
        tries: int = 3

        @field_validator("token")
        def long(cls, value):
            if len(value.get_secret_value()) < 4 or "hunter2" in value.get_secret_value():
                raise ValueError(f"{value.get_secret_value()} is a bad token")
            return value

    class Checked:
        name = "checked"
        def __init__(self, settings):
            self.settings = settings
        async def notify_pending(self, notice):
            self.write(notice)
        async def notify_decision(self, notice):
            self.write(notice)
        def write(self, notice):
            if self.settings.tries == 0:
                raise ConnectionError(f"refused token={self.settings.token.get_secret_value()}")
            with self.settings.path.open("a") as file:
                print(notice.event, notice.status, notice.risk_explanation, file=file)

    @hookimpl
    def gateway_store_plugin_settings():
        return Settings

    @hookimpl
    def gateway_store_register_notifiers():
        return [Checked(Settings())] if "NOTIFY_CHECKED_TOKEN" in __import__("os").environ else []
"""


def plugins(command: str, *args: str, **variables: str) -> Outcome:
    """Run `plugins list` or `check` on the plugin alone, with these variables of it."""
    return gateway_store(
        *("plugins", command, *args),
        AGENT_GATEWAY_STORE_LOAD_PLUGINS="checked",
        **{f"NOTIFY_CHECKED_{name.upper()}": value for name, value in variables.items()},
    )


def test_a_configured_plugin_gets_a_test_notice(install: Install, tmp_path: Path) -> None:
    """Two notices of a made-up approval, which say that they are a test; none with `--no-send`."""
    install("checked", PLUGIN)
    assert plugins("check", "--no-send", token="good-token").code == 0
    assert not (tmp_path / "notices.txt").exists()

    outcome = plugins("check", "--json", token="good-token")

    (item,) = outcome.json["items"]
    assert (outcome.code, item["name"], item["ok"], item["notifiers"]) == (0, "checked", True, ["checked"])
    assert item["settings"] == {"prefix": "NOTIFY_CHECKED_", "state": "configured", "problems": []}
    pending, decision = (tmp_path / "notices.txt").read_text().splitlines()
    assert pending.startswith("pending PENDING This is a test by `gateway-store plugins check`.")
    assert decision.startswith("decision CANCELLED ")


def test_missing_settings_name_the_variable(install: Install) -> None:
    """A plugin that is installed and not set up is no failure, unless it is asked for by name."""
    install("checked", PLUGIN)

    listed, anybody, named = plugins("list", "--json"), plugins("check"), plugins("check", "checked")

    (item,) = [item for item in listed.json["items"] if item["name"] == "checked"]
    assert item["settings"]["state"] == "missing"
    assert item["settings"]["problems"] == ["NOTIFY_CHECKED_TOKEN: field required"]
    assert anybody.code == 0
    assert named.code == 1
    assert "NOTIFY_CHECKED_TOKEN: field required" in named.out


@pytest.mark.parametrize(
    ("variables", "problem"),
    [
        ({"token": SECRET}, "NOTIFY_CHECKED_TOKEN: value error, *** is a bad token"),
        ({"token": "good", "tries": SECRET}, "NOTIFY_CHECKED_TRIES: input should be a valid integer"),
        ({"tries": "2"}, "NOTIFY_CHECKED_TOKEN: field required"),
    ],
)
def test_wrong_settings_name_the_variable_and_never_the_value(
    install: Install, variables: dict[str, str], problem: str
) -> None:
    """Exit code 1; no value in what is printed, by `check` or `list`, as a table or JSON."""
    install("checked", PLUGIN)

    outcomes = [
        plugins(command, *options, **variables) for command in ("check", "list") for options in ((), ("--json",))
    ]

    assert [outcome.code for outcome in outcomes] == [1, 1, 0, 0]
    assert problem in outcomes[1].said
    assert all(SECRET not in outcome.said for outcome in outcomes)


def test_a_notice_that_does_not_get_through_fails_the_check(install: Install) -> None:
    install("checked", PLUGIN)

    outcome = plugins("check", "--json", token="good-token", tries="0")

    assert outcome.code == 1
    assert outcome.json["items"][0]["problems"] == ["checked: ConnectionError: refused token=***"]


def test_unknown_and_blocked_plugins(install: Install) -> None:
    """What is not there is exit code 4; what is blocked fails only when asked for."""
    install("checked", PLUGIN)
    blocked = {"AGENT_GATEWAY_STORE_BLOCK_PLUGINS": "checked"}

    gateway_store("plugins", "check", "nosuch").assert_fails(4, "nosuch", "plugins list")
    assert gateway_store("plugins", "check", "checked", **blocked).code == 1
    assert "checked" not in gateway_store("plugins", "check", **blocked).out


@pytest.mark.parametrize(
    ("returned", "fault"),
    [
        ("int", "not a class of pydantic_settings.BaseSettings"),
        ("1 / 0", "ZeroDivisionError"),
        ("type('Bare', (__import__('pydantic_settings').BaseSettings,), {})", "has no env_prefix"),
    ],
)
def test_a_declaration_that_is_none_breaks_the_plugin_alone(install: Install, returned: str, fault: str) -> None:
    hook = f"@hookimpl\n    def gateway_store_plugin_settings():\n        return {returned}\n"
    install("a-odd", f"\n    from agent_gateway_store import hookimpl\n\n    {hook}")
    install("checked", PLUGIN)

    outcome = gateway_store(
        *("plugins", "check", "--json"),
        AGENT_GATEWAY_STORE_LOAD_PLUGINS="a-odd,checked",
        NOTIFY_CHECKED_TOKEN="good-token",
    )

    odd, checked = outcome.json["items"]
    assert outcome.code == 1
    assert fault in odd["problems"][0]
    assert checked["ok"]


def test_a_validation_error_is_described_without_its_input() -> None:
    """What a plugin raises when it is asked for notifiers may be a ValidationError, whose text repeats the input."""
    from pydantic import BaseModel, ValidationError

    class Model(BaseModel):
        tries: int

    with pytest.raises(ValidationError) as caught:
        Model(tries=SECRET)  # type: ignore[arg-type]

    assert SECRET in str(caught.value)
    assert SECRET not in describe(caught.value)
    assert describe(caught.value).startswith("ValidationError: Input should be a valid integer")
    assert describe(caught.value).endswith("(tries)")


def test_aliases_and_defaults(monkeypatch: pytest.MonkeyPatch) -> None:
    """A variable of another name is told by that name; a plugin that needs nothing stands at its defaults."""
    from pydantic import AliasChoices, Field
    from pydantic_settings import BaseSettings, SettingsConfigDict

    class Named(BaseSettings):
        model_config = SettingsConfigDict(env_prefix="NAMED_")
        path: str = Field(default="x", validation_alias=AliasChoices("FIRST_PATH", "SECOND_PATH"))

    class Aliased(BaseSettings):
        model_config = SettingsConfigDict(env_prefix="ALIASED_")
        token: str = Field(validation_alias="OTHER_TOKEN")

    class Optional(BaseSettings):
        model_config = SettingsConfigDict(env_prefix="OPTIONAL_")
        path: str = "x"

    assert examine_settings(Aliased).problems == ("OTHER_TOKEN: field required",)
    assert examine_settings(Optional).state == "defaults"
    monkeypatch.setenv("OPTIONAL_PATH", "y")
    assert examine_settings(Optional).state == "configured"

    assert examine_settings(Named).state == "defaults"
    monkeypatch.setenv("SECOND_PATH", "y")
    assert examine_settings(Named).state == "configured"
