"""API keys, and the caller that a verified key belongs to."""

from __future__ import annotations

import secrets
import string
from datetime import datetime
from enum import IntEnum

from pydantic import SecretStr
from sqlalchemy import CheckConstraint, Index, Text, UniqueConstraint, text
from sqlmodel import Field

from agent_gateway_store.clock import utc_now
from agent_gateway_store.models.audit import Instant
from agent_gateway_store.models.base import StoreModel, index_where
from agent_gateway_store.models.columns import BigKey, EnumNumber, UtcDateTime
from agent_gateway_store.models.values import FrozenModel

BASE62 = string.digits + string.ascii_uppercase + string.ascii_lowercase
# 62^12 ids are 71 bits: random ones do not collide.
KEY_ID_CHARS = 12


def random_base62(length: int) -> str:
    """Return random digits and letters."""
    return "".join(secrets.choice(BASE62) for _ in range(length))


class TrustLevel(IntEnum):
    """How far a caller is trusted; levels compare."""

    UNTRUSTED = 0
    LOW = 1
    MEDIUM = 2
    HIGH = 3
    ADMIN = 4


class ApiKey(StoreModel, table=True):
    """The key of one caller in one organisation. Holds the bcrypt of the secret, never the secret.

    A caller has one active key; the rows of revoked ones stay as they were. `model_dump` and JSON, and so the response
    of an endpoint, leave the hashes out.

    Attributes:
        key_id: Public, unique, and the same after a rotation.
        key_hash: bcrypt.
        last_used_at: Written at most once a minute.
        expires_at: From this time on the key is refused; None: never.
        revoked_at: When it was revoked; `is_active` is False from then on.
        previous_key_hash: The key before the rotation, accepted until `previous_key_expires_at`.
    """

    __tablename__ = "api_keys"
    __table_args__ = (
        UniqueConstraint("key_id"),
        CheckConstraint("trust_level BETWEEN 0 AND 4", name="trust_level"),
        # At most one active key for one caller, however many processes issue at once.
        index_where(text("is_active"), "caller_id", "org_id", name="uq_api_keys_active_caller", unique=True),
        Index(None, "caller_id", "org_id"),
    )

    id: int | None = Field(default=None, sa_type=BigKey(), primary_key=True)
    key_id: str = Field(default_factory=lambda: random_base62(KEY_ID_CHARS), sa_type=Text)
    caller_id: str = Field(sa_type=Text)
    org_id: str = Field(default="default", sa_type=Text)
    key_hash: str = Field(sa_type=Text, repr=False, exclude=True)
    role: str = Field(sa_type=Text)
    trust_level: TrustLevel = Field(sa_type=EnumNumber(TrustLevel))
    environment: str = Field(sa_type=Text)
    is_active: bool = True
    created_at: Instant = Field(
        default_factory=utc_now, sa_type=UtcDateTime, sa_column_kwargs={"server_default": text("CURRENT_TIMESTAMP")}
    )
    last_used_at: Instant | None = Field(default=None, sa_type=UtcDateTime)
    expires_at: Instant | None = Field(default=None, sa_type=UtcDateTime)
    revoked_at: Instant | None = Field(default=None, sa_type=UtcDateTime)
    previous_key_hash: str | None = Field(default=None, sa_type=Text, repr=False, exclude=True)
    previous_key_expires_at: Instant | None = Field(default=None, sa_type=UtcDateTime)


class KeyReading(FrozenModel):
    """A key's row, and when it was read: what its `expires_at` and the end of an overlap are compared with.

    Attributes:
        read_at: By the database's clock, which alone judges them.
    """

    api_key: ApiKey
    read_at: datetime


class CallerIdentity(FrozenModel):
    """The caller that a verified key belongs to, or that a login of the host's own knows.

    Attributes:
        key_id: Public id of the key; None: the caller came by no key of ours.
        api_key_id: Its row in `api_keys`; None as for `key_id`.
    """

    caller_id: str
    role: str
    trust_level: TrustLevel
    environment: str
    org_id: str = "default"
    key_id: str | None = None
    api_key_id: int | None = None


class IssuedKey(FrozenModel):
    """A new key, at the only moment at which its plaintext exists.

    Attributes:
        plaintext: Hand it to the caller; it cannot be shown again. Masked in a repr.
        api_key: The stored row.
        previous_valid_until: Until when the key before a rotation is accepted; None: there is none.
    """

    plaintext: SecretStr
    api_key: ApiKey
    previous_valid_until: datetime | None = None
