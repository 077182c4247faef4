"""Settings: where they come from, which wins, and that no password shows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from pydantic import Field, ValidationError
from pydantic_settings import SettingsConfigDict

from agent_gateway_store.plugins.slack.api import SlackSettings
from agent_gateway_store.plugins.webhook import WebhookSettings
from agent_gateway_store.settings import StoreSettings, default_hash_key, mask_url

pytestmark = pytest.mark.unit

PREFIX = "AGENT_GATEWAY_STORE_"


def test_the_prefix_wins_and_an_argument_wins_over_both(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ENVIRONMENT", "plain")
    assert StoreSettings().environment == "plain"
    monkeypatch.setenv(f"{PREFIX}ENVIRONMENT", "prefixed")
    assert StoreSettings().environment == "prefixed"

    assert StoreSettings(environment="argument").environment == "argument"


def test_an_empty_redis_url_switches_redis_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REDIS_URL", "redis://cache:6379/0")
    assert StoreSettings(redis_url="").redis_url == ""
    monkeypatch.setenv(f"{PREFIX}REDIS_URL", "")

    assert StoreSettings().redis_url == ""


def test_a_dotenv_file_is_read_only_when_asked_for(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """`.env` of the current folder counts for nothing unless named, and loses to the environment."""
    lines = ["ENVIRONMENT=plain", f"{PREFIX}AUDIT_MODE=strict", "AUDIT_MODE=spool", "BCRYPT_ROUNDS=12", "OTHER=x"]
    (tmp_path / ".env").write_text("\n".join(lines))
    asked = StoreSettings(_env_file=".env")

    assert StoreSettings().environment == "dev"
    assert (asked.environment, asked.audit_mode) == ("plain", "strict")
    assert asked.bcrypt_rounds == 4
    assert StoreSettings(_env_file=".env", environment="argument").environment == "argument"


def test_unknown_names_are_left_to_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(f"{PREFIX}NO_SUCH_SETTING", "x")

    assert not hasattr(StoreSettings(), "no_such_setting")
    with pytest.raises(TypeError, match=r"no setting audit_moed: did you mean audit_mode\?"):
        StoreSettings(audit_moed="strict")  # type: ignore[call-arg]

    class Open(StoreSettings):
        model_config = SettingsConfigDict(extra="allow")

    class Aliased(StoreSettings):
        team: str = Field("", validation_alias="OUR_TEAM")

    assert Open.model_validate({"team": "x"}).model_extra == {"team": "x"}
    assert Aliased(OUR_TEAM="x").team == "x"


PASSWORD = "s3cr3t-word"


@pytest.mark.parametrize(
    "url",
    [
        f"postgresql://user:{PASSWORD}@host/db",
        f"postgresql://user%40corp:{PASSWORD}@host/db",
        f"postgresql://user:a/{PASSWORD}@host/db",
        f"postgresql://user:a?b#{PASSWORD}@host/db",
        f"postgresql://host/db?user=u&password={PASSWORD}",
        f"postgresql://host/db?PASSWORD={PASSWORD}&sslpassword={PASSWORD}&user=u",
        f"redis://:{PASSWORD}@host:6379/0",
        f"unix://user:{PASSWORD}@/run/redis.sock",
        f"postgresql:/user:{PASSWORD}@host/db",
        f"postgresql://host/db?sslmode={PASSWORD}&port={PASSWORD}",
        f"postgresql://host/db?password=a&{PASSWORD}",
        f"postgresql://host/db?user=u;password={PASSWORD}",
        f"postgresql://host/db?password=a@{PASSWORD}",
        f"postgresql://host:{PASSWORD}?x=y@host/db",
        f"host:{PASSWORD}?x=http://y@host/db",
        f"user:a?b@host/db?bogus={PASSWORD}",
        f"postgresql://host/db;password={PASSWORD}",
        f"postgresql://host/db?host=one?password={PASSWORD}",
        f"'postgresql://user:{PASSWORD}@host/db'",
        f"DATABASE_URL=postgresql://user:{PASSWORD}@host/db",
        f"host=one password={PASSWORD}",
    ],
)
def test_no_password_shows(url: str) -> None:
    settings = StoreSettings(database_url=url, database_read_url=url, redis_url=url, hash_key=PASSWORD)

    assert PASSWORD not in f"{settings!r}{settings!s}{mask_url(url)}"
    assert PASSWORD not in f"{settings.model_dump()}{settings.model_dump(mode='json')}{settings.model_dump_json()}"
    assert "***" in mask_url(url)
    assert "host" in mask_url(url) or "redis.sock" in mask_url(url)
    assert settings.database_url == url


@pytest.mark.parametrize(
    "url",
    [
        "sqlite:///gateway.db",
        "redis://host:6379/0",
        "postgresql://user@host:5432/db",
        "postgresql://host:5432/db?sslmode=require&application_name=gateway&connect_timeout=5",
        "postgresql://user@/db?host=one:5432&host=two&target_session_attrs=any&sslrootcert=/etc/root.crt",
        "sqlite:///file:gateway.db?mode=ro&uri=true",
        "rediss://host?db=1&ssl_cert_reqs=required&ssl_ca_certs=/etc/ca.pem",
        "redis://host?db=1&ssl_cert_reqs=",
    ],
)
def test_a_url_without_a_password_shows_as_it_is(url: str) -> None:
    assert mask_url(url) == url


@pytest.mark.parametrize(
    ("model", "name", "value"),
    [
        (StoreSettings, "AUDIT_MODE", "strict"),
        (StoreSettings, "AUDIT_SPOOL_PATH", "/var/spool.db"),
        (StoreSettings, "HASH_KEY", "a key"),
        (StoreSettings, "ALLOW_SELF_APPROVAL", "true"),
        (StoreSettings, "BCRYPT_ROUNDS", "12"),
        (SlackSettings, "SIGNING_SECRET", "5ecret"),
        (WebhookSettings, "CA_FILE", "/etc/ca.pem"),
    ],
)
@pytest.mark.parametrize("around", ["\r\n", " \t\u00a0"])
def test_blanks_and_line_ends_around_a_value_are_left_out(
    monkeypatch: pytest.MonkeyPatch, model: type[Any], name: str, value: str, around: str
) -> None:
    """A secret that was read from a file ends with one, and would be set and never work."""
    variable, field = f"{model.model_config['env_prefix']}{name}", name.lower()
    monkeypatch.setenv(variable, value)
    plain = model()
    monkeypatch.setenv(variable, f"{around}{value}{around}")

    assert getattr(model(), field) == getattr(plain, field)
    assert getattr(model(**{field: f"{value}{around}"}), field) == getattr(plain, field)


@pytest.mark.parametrize(
    ("model", "field"),
    [
        (StoreSettings, "database_url"),
        (StoreSettings, "audit_spool_path"),
        (StoreSettings, "hash_key"),
        (SlackSettings, "signing_secret"),
        (WebhookSettings, "ca_file"),
    ],
)
@pytest.mark.parametrize("inside", ["\n", "\0", "\u200b"])
def test_what_cannot_be_seen_inside_a_value_is_refused(model: type[Any], field: str, inside: str) -> None:
    with pytest.raises(ValidationError, match=field) as caught:
        model(**{field: f"{PASSWORD}{inside}{PASSWORD}"})

    assert PASSWORD not in f"{caught.value}{caught.value!r}"


def test_a_hash_key_is_the_same_key_wherever_it_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HASH_KEY", " a key\n")
    settings = StoreSettings()
    assert settings.hash_key is not None
    assert default_hash_key() == settings.hash_key.get_secret_value() == "a key"
    monkeypatch.setenv("HASH_KEY", " \n")

    assert default_hash_key() is None
    assert not StoreSettings().hash_key


@pytest.mark.parametrize(
    ("field", "wrong"),
    [
        ("approval_token_ttl_seconds", "0"),
        ("approval_token_ttl_seconds", "nan"),
        ("approval_token_ttl_seconds", PASSWORD),
        ("approval_cache_seconds", "-1"),
        ("redis_timeout_seconds", "0"),
        ("api_key_cache_seconds", "-0.1"),
        ("audit_mode", PASSWORD),
        ("bcrypt_rounds", "32"),
        ("allow_self_approval", PASSWORD),
    ],
)
def test_wrong_values_are_refused_without_being_repeated(
    monkeypatch: pytest.MonkeyPatch, field: str, wrong: str
) -> None:
    with pytest.raises(ValidationError, match=field):
        StoreSettings(**{field: wrong})
    monkeypatch.setenv(field.upper(), wrong)
    with pytest.raises(ValidationError) as caught:
        StoreSettings()

    assert field in str(caught.value).lower()
    assert PASSWORD not in f"{caught.value}{caught.value!r}"


@pytest.mark.parametrize("empty", ["", " \n", Path()])
def test_a_spool_without_a_name_is_refused(empty: str | Path) -> None:
    with pytest.raises(ValidationError, match="must name a file"):
        StoreSettings(audit_spool_path=empty)


def test_the_spool_may_be_in_the_home_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """An env file is read by no shell, so `~` is expanded here; a user without a home is told so."""
    monkeypatch.setenv("HOME", str(tmp_path))
    assert StoreSettings(audit_spool_path="~/spool.db").audit_spool_path == tmp_path / "spool.db"
    with pytest.raises(ValidationError, match="no home folder"):
        StoreSettings(audit_spool_path="~nobody-has-this-name/spool.db")


def test_a_user_without_a_home_folder_is_told_what_to_set(monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown(_uid: int) -> None:
        raise KeyError

    monkeypatch.delenv("HOME")
    for name in ("XDG_STATE_HOME", "AUDIT_SPOOL_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("pwd.getpwuid", unknown)
    with pytest.raises(ValidationError, match="no home folder: set AUDIT_SPOOL_PATH to a file, or HOME"):
        StoreSettings()

    assert StoreSettings(audit_spool_path="spool.db").audit_spool_path == Path("spool.db")
