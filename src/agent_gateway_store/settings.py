"""Settings, from arguments or the environment."""

from __future__ import annotations

import os
import re
from difflib import get_close_matches
from ipaddress import ip_network
from pathlib import Path
from typing import Annotated, Any, Literal, Self
from urllib.parse import urlsplit

from platformdirs import user_state_path
from pydantic import AfterValidator, BeforeValidator, Field, SecretStr, field_serializer, model_validator
from pydantic_settings import (
    BaseSettings,
    DotEnvSettingsSource,
    EnvSettingsSource,
    InitSettingsSource,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
)

MAX_BCRYPT_ROUNDS = 16
"""Chosen: one check takes three seconds then, and twice as long for each more."""
PREFIX = "AGENT_GATEWAY_STORE_"


# Parameters of a URL that are shown, with values of theirs. Any other value may be a password that was put there.
_SHOWN = re.compile(
    r"(?i)(?:host|user|\w+_?name|passfile|sslcert|sslrootcert|sslkey|ssl_certfile|ssl_keyfile|ssl_ca_\w+)=[^;#?=]*"
    r"|(?:port|db|protocol|max_connections|\w+_(?:timeout|interval|size))=\d{1,5}"
    r"|(?:ssl|sslmode|ssl_cert_reqs|target_session_attrs|listen|pgbouncer|uri|mode|cache)="
    r"(?:1|true|yes|on|0|false|no|off|disable|allow|prefer|require|verify-ca|verify-full|any|primary|standby|read-write"
    r"|read-only|prefer-standby|ro|rw|rwc|memory|private|shared|none|optional|required|)"
)


def mask_url(url: str) -> str:
    """Return `url`, or what was meant as one, with every password in it, and what may be one, shown as `***`."""
    # Up to the last @: a password may hold an @ that should have been escaped, and the scheme may be missing.
    login, at, place = url.rpartition("@")
    if "=" in login.partition("?")[2]:
        # A parameter with an @ in it, or a password with a ?: nobody can tell.
        return re.sub(r"(?s)^((?:[\w+.-]*://)?[^:?]*).*", r"\1***", url)
    # A quote or a name may stand before the scheme, and another sign in place of the ?.
    login = re.sub(r"(?s)^((?:[^:]*://)?[^:]*:)(?!//).*", r"\1***", login)
    place, mark, query = [*re.split(r"(\?|(?:^|[&;#\s])(?=\w+=))", place, maxsplit=1), "", ""][:3]
    parts = [each if _SHOWN.fullmatch(each) else re.sub(r"(?s)^(\w*=)?.+", r"\1***", each) for each in query.split("&")]
    return f"{login}{at}{place}{mark}{'&'.join(parts)}"


def default_hash_key() -> str | None:
    """Return HASH_KEY from the environment (the prefixed name wins), or None."""
    return os.environ.get(f"{PREFIX}HASH_KEY", os.environ.get("HASH_KEY", "")).strip() or None


def _spool_path(value: Any) -> Any:
    if not isinstance(value, str | Path):
        return value
    # Path("") is the current folder.
    if str(value).strip() in ("", "."):
        raise ValueError("it must name a file, or be left out")
    try:
        return Path(value).expanduser()
    except RuntimeError:
        raise ValueError("this user has no home folder: set AUDIT_SPOOL_PATH to a file, or HOME") from None


def _default_spool_path() -> Path:
    try:
        folder = user_state_path("agent-gateway-store")
    except RuntimeError:
        # This user has no home. So other versions of platformdirs have it, and the validator says what to set.
        folder = Path("~/.local/state/agent-gateway-store")
    return folder / "spool.db"


def _web_url(value: str | None) -> str | None:
    parts = urlsplit(value or "https://host")
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.username or parts.query or parts.fragment:
        raise ValueError("it must look like https://gateway.example/console")
    if not parts.netloc.isascii():
        raise ValueError("the host must be written in letters of ASCII, as browsers send it: xn--...")
    if parts.port == 0:
        raise ValueError("0 is not a port")
    if "//" in parts.path.rstrip("/"):
        raise ValueError("its path must do without //, with which browsers begin a host")
    if "%" in parts.path:
        raise ValueError("its path must do without percent-encoding: use letters, digits, - and _")
    return value and value.rstrip("/")


_URLS = ("database_url", "database_read_url", "redis_url")


def _networks(value: str | None) -> str | None:
    for each in (value or "").split(","):
        if each.strip():
            ip_network(each.strip(), strict=False)
    return value or None


class EnvironmentSettings(BaseSettings):
    """Settings of a store or a plugin, mostly from the environment."""

    model_config = SettingsConfigDict(extra="ignore", hide_input_in_errors=True)

    @model_validator(mode="before")
    @classmethod
    def _strip_texts(cls, values: Any) -> Any:
        """Leave out the blanks and line ends around texts: what is read from a file ends with one."""
        if not isinstance(values, dict):
            return values
        return {name: value.strip() if isinstance(value, str) else value for name, value in values.items()}

    @model_validator(mode="after")
    def _require_visible(self) -> Self:
        """Refuse a line end or the like inside a text, a path or a secret: it would be "set" and never work."""
        for name, value in self:
            text = value.get_secret_value() if hasattr(value, "get_secret_value") else value
            if isinstance(text, str | Path) and not str(text).isprintable():
                raise ValueError(f"{name} holds a line end or another character that cannot be seen")
        return self


class StoreSettings(EnvironmentSettings):
    """Settings of a store.

    An argument wins over the environment, and there `AGENT_GATEWAY_STORE_NAME` wins over `NAME`. A `.env` file is read
    only when asked for: `StoreSettings(_env_file=".env")`. Blanks and line ends around a value are left out. Neither a
    repr nor a dump shows a password.

    Raises:
        TypeError: An argument has the name of no setting. In the environment and in files such names are passed over.
        ValidationError: A value does not fit.

    Attributes:
        database_url: Where the store lives: `sqlite:///file.db`, `postgresql://user:password@host/name`.
        database_read_url: A streaming replica of it, where search, statistics, lists, streams, exports and `verify`
            read; None: there is none.
        database_pool_size: Most connections of a store to its PostgreSQL, of all kinds together; those that are idle
            for a minute are given back.
        redis_url: Redis that makes reads and waiting fast; None or "": no Redis.
        environment: Name of this deployment, stamped on API keys.
        approval_token_ttl_seconds: How long an approval waits for a decision by default; a million days at most.
        acquire_decision_seconds: How long an approval that `acquire` asks for waits for a decision by default.
        approval_denial_seconds: How long a denial answers callers that acquire the same call again; 0: not at all.
        approval_max_pending: How many approvals of one caller may wait for a decision at once.
        approval_cache_seconds: How old a status read through Redis may be at most.
        audit_mode: `spool`: `write` never raises, and keeps events locally while the database is away; `strict`: it
            raises.
        audit_spool_path: SQLite file for those events; `~` is the user's home.
        redis_timeout_seconds: Longest wait for one Redis command.
        plugin_timeout_seconds: Longest wait for one plugin call.
        bcrypt_rounds: Cost of the key hash, as a power of two.
        api_key_cache_seconds: How long a verified key is trusted without reading its row again.
        audit_seal_seconds: How often an open store that writes seals the log; 0: never.
        audit_retention_floor_days: How many days old an event must be at least before it may be pruned.
        audit_signing_key: Signs the checkpoints of the log, as `gateway-store evidence keygen` makes it.
        audit_log_origin: Name of the log, to which the identity of the database is added.
        hash_key: Set, argument hashes are HMAC-SHA-256 under it; otherwise SHA-256.
        allow_self_approval: Whether the caller of a tool call may decide about it.
        otel_enabled: Whether there are OpenTelemetry spans and metrics (extra `otel`).
        freeze_after_open: Whether `open` collects garbage and then has Python's collector pass by what is there, so
            that it never holds the event loop up by looking at what imports made.
        notification_worker: Whether an open store sends notices itself; off, `gateway-store notifications run` does.
        notification_concurrency: How many notices one notifier receives at once.
        notification_max_attempts: After how many failed attempts a delivery becomes a dead letter.
        notification_poll_seconds: How often a worker looks for notices that are due.
        console_roles: Roles whose keys may sign in to the console, separated by commas.
        console_session_seconds: How long a sign-in to the console lasts at most.
        console_url: Where browsers reach the console, such as `https://gateway.example/console`.
        console_trusted_proxies: Addresses and networks, separated by commas, whose forwarded headers the console
            believes; None: nobody's.
        console_require_note: Whether a decision in the console needs a note.
    """

    model_config = SettingsConfigDict(env_prefix=PREFIX)

    database_url: str = "sqlite+aiosqlite:///gateway.db"
    database_read_url: str | None = None
    # Three that commit audit events and listen, and ten times four; at least once four.
    database_pool_size: int = Field(default=43, ge=7, le=10_000)
    redis_url: str | None = None
    environment: str = "dev"
    # A million days is 2,738 years: both databases hold times until the year 9999 at least.
    approval_token_ttl_seconds: float = Field(default=3600, gt=0, le=1_000_000 * 86_400, allow_inf_nan=False)
    acquire_decision_seconds: float = Field(default=86_400, gt=0, le=1_000_000 * 86_400, allow_inf_nan=False)
    approval_denial_seconds: float = Field(default=300, ge=0, le=1_000_000 * 86_400, allow_inf_nan=False)
    approval_max_pending: int = Field(default=100, ge=1, le=2**31 - 1)
    approval_cache_seconds: float = Field(default=2, ge=0, allow_inf_nan=False)
    audit_mode: Literal["spool", "strict"] = "spool"
    audit_spool_path: Annotated[Path, BeforeValidator(_spool_path)] = Field(default_factory=_default_spool_path)
    redis_timeout_seconds: float = Field(default=0.2, gt=0, allow_inf_nan=False)
    plugin_timeout_seconds: float = Field(default=5, gt=0, allow_inf_nan=False)
    # bcrypt itself takes 4 to 31. At 10 a check takes about 50 ms.
    bcrypt_rounds: int = Field(default=10, ge=4, le=MAX_BCRYPT_ROUNDS)
    api_key_cache_seconds: float = Field(default=30, ge=0, allow_inf_nan=False)
    audit_seal_seconds: float = Field(default=60, ge=0, allow_inf_nan=False)
    # Six months, which the EU AI Act (article 26(6)) asks of deployers of high-risk systems.
    audit_retention_floor_days: float = Field(default=183, ge=0, le=1_000_000, allow_inf_nan=False)
    audit_signing_key: SecretStr | None = None
    audit_log_origin: str = "agent-gateway-store.local"
    hash_key: SecretStr | None = None
    allow_self_approval: bool = False
    otel_enabled: bool = False
    freeze_after_open: bool = False
    notification_worker: bool = True
    notification_concurrency: int = Field(default=8, ge=1)
    notification_max_attempts: int = Field(default=15, ge=1)
    notification_poll_seconds: float = Field(default=1, gt=0, allow_inf_nan=False)
    console_roles: str = "admin,approver"
    # Eight hours, a day of work; a year at most.
    console_session_seconds: float = Field(default=28_800, gt=0, le=366 * 86_400, allow_inf_nan=False)
    console_url: Annotated[str | None, AfterValidator(_web_url)] = None
    console_trusted_proxies: Annotated[str | None, AfterValidator(_networks)] = None
    console_require_note: bool = False

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Read each name with the prefix first, then without it; an argument of another name is refused."""
        given = init_settings.init_kwargs if isinstance(init_settings, InitSettingsSource) else {}
        # A subclass may take further names: what its `extra` allows, or aliases of its fields.
        takes_more = cls.model_config.get("extra") != "ignore" or any(
            each.validation_alias for each in cls.model_fields.values()
        )
        for name in () if takes_more else given.keys() - cls.model_fields.keys():
            close = get_close_matches(name, cls.model_fields, n=1)
            raise TypeError(f"There is no setting {name}{f': did you mean {close[0]}?' if close else '.'}")
        # pydantic-settings knows one prefix for each source, so each source is there twice.
        file = dotenv_settings.env_file if isinstance(dotenv_settings, DotEnvSettingsSource) else None
        return (
            init_settings,
            env_settings,
            EnvSettingsSource(settings_cls, env_prefix=""),
            dotenv_settings,
            DotEnvSettingsSource(settings_cls, env_file=file, env_prefix=""),
        )

    @field_serializer(*_URLS)
    def _masked(self, url: str | None) -> str | None:
        return url and mask_url(url)

    def __repr_args__(self) -> list[tuple[str | None, Any]]:
        """Mask the passwords in URLs."""
        return [(name, self._masked(value) if name in _URLS else value) for name, value in super().__repr_args__()]
