"""`store.keys`: issue, verify, rotate, revoke API keys."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Mapping
from contextlib import suppress
from datetime import datetime, timedelta
from functools import partial
from typing import Any

from pydantic import SecretStr
from sqlalchemy import (
    BigInteger,
    ColumnElement,
    Executable,
    Select,
    Text,
    and_,
    bindparam,
    false,
    insert,
    null,
    or_,
    select,
    update,
)
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import AsyncConnection

from agent_gateway_store import clock
from agent_gateway_store.encoding.sanitize import MAX_KEY_BYTES, Scrubber, storable_key
from agent_gateway_store.errors import (
    ApiKeyExistsError,
    ApiKeyNotFoundError,
    InvalidApiKeyError,
    StoreNotOpenError,
    StoreUnavailableError,
)
from agent_gateway_store.keys.cache import REFUSED, Answer, KeyCache, VerifiedKey
from agent_gateway_store.keys.format import digest, new_key, new_key_id, parse_key_id
from agent_gateway_store.keys.hashing import Hasher
from agent_gateway_store.models.base import repaired
from agent_gateway_store.models.keys import ApiKey, CallerIdentity, IssuedKey, KeyReading, TrustLevel
from agent_gateway_store.results import Page
from agent_gateway_store.settings import StoreSettings
from agent_gateway_store.storage.database import Transactions
from agent_gateway_store.storage.db_clock import db_now
from agent_gateway_store.storage.errors import retry_conflicts
from agent_gateway_store.storage.filters import require_between
from agent_gateway_store.storage.statements import Statement
from agent_gateway_store.telemetry import traced

COLUMNS = (
    "key_id",
    "caller_id",
    "org_id",
    "role",
    "trust_level",
    "environment",
    "is_active",
    "last_used_at",
    "revoked_at",
)
# The documented precision of `last_used_at`: one write a minute for each key at most.
_LAST_USED_EVERY = timedelta(minutes=1)
# 2,738 years: both databases hold times until the year 9999 at least.
_LONGEST = timedelta(days=1_000_000)
# Chosen: a database that is well reads or writes one row in milliseconds.
_ONE_ROW_S = 5.0
_logger = logging.getLogger("agent_gateway_store.keys")
_keys = ApiKey.__table__


class KeyManager:
    """API keys: stored as bcrypt, shown once, at most one active per caller and organisation.

    Args:
        transactions: Where they are kept.
        hasher: bcrypt in its threads; stays the caller's.
        cache: Answers about keys; shared by the views of a store.
        settings: `environment` is stamped on keys that name none.
        org_id: See and change only this organisation; None sees all, and issues for "default".
    """

    def __init__(
        self,
        transactions: Transactions,
        hasher: Hasher,
        cache: KeyCache,
        settings: StoreSettings,
        *,
        org_id: str | None = None,
    ) -> None:
        self._transactions = transactions
        self._hasher = hasher
        self._cache = cache
        self._settings = settings
        self._org_id = org_id

    async def issue(
        self,
        caller_id: str,
        *,
        role: str,
        trust_level: TrustLevel = TrustLevel.LOW,
        environment: str | None = None,
        expires_at: datetime | None = None,
        expires_in: timedelta | None = None,
        org_id: str | None = None,
    ) -> IssuedKey:
        """Issue a key for `caller_id`. The plaintext is in the result and nowhere else.

        A caller whose key was revoked gets a new one, in a row of its own.

        Args:
            caller_id: The caller that will use the key.
            role: As the gateway's policy names it.
            trust_level: How far the gateway trusts the caller.
            environment: Default: the setting ENVIRONMENT.
            expires_at: From this time on the key is refused; None: never.
            expires_in: The same as a lifetime, up to a million days, which begins now by the database's clock.
            org_id: Organisation; default: the one this store is bound to, else "default".

        Raises:
            ApiKeyExistsError: The caller has an active key; rotate it instead.
            ValueError: The store is bound to another organisation than `org_id`, or that is empty; `expires_in` is not
                more than zero, beyond what a database holds, or given beside `expires_at`.
        """
        if expires_in is not None and expires_at is not None:
            raise ValueError("Give expires_at or expires_in, not both.")
        if expires_in is not None and not timedelta() < expires_in <= _LONGEST:
            raise ValueError("expires_in must be more than zero, and a million days at most.")
        organisation = self._organisation(org_id)
        if organisation is None:
            raise ValueError("This store is bound to another organisation: use `store.for_org` with yours.")
        scrubber = Scrubber()
        # Before bcrypt, whose threads a forked process does not have.
        self._transactions.check_owner()
        key_id = new_key_id()
        plaintext = new_key(key_id)
        checked = ApiKey(
            key_id=key_id,
            caller_id=scrubber.text("caller_id", caller_id, limit=MAX_KEY_BYTES),
            org_id=organisation,
            key_hash=await self._hasher.hash(digest(plaintext)),
            role=scrubber.text("role", role),
            trust_level=trust_level,
            environment=scrubber.text(
                "environment", self._settings.environment if environment is None else environment
            ),
            expires_at=expires_at,
        )
        values = {column.name: getattr(checked, column.name) for column in _keys.c if column.name != "id"}
        values["created_at"] = db_now()
        if expires_in is not None:
            values["expires_at"] = db_now(plus=expires_in)
        try:
            row = await self._sure(self._insert(values), key_id, checked.key_hash)
        except IntegrityError:
            # The database's own words say nothing more.
            raise ApiKeyExistsError(checked.caller_id) from None
        if row is None:
            raise StoreUnavailableError("The database dropped the API key: a trigger on api_keys does so. Drop that.")
        return IssuedKey(plaintext=SecretStr(plaintext), api_key=ApiKey.from_row(row))

    @traced("key.verify", counts="keys.verifications")
    async def verify(self, key: str | SecretStr) -> CallerIdentity:
        """Return the caller that `key` belongs to.

        A malformed key costs no lookup, an unknown one no bcrypt. bcrypt runs in threads. A key that was accepted is
        trusted for API_KEY_CACHE_SECONDS, unless it ends or this process is notified of a change before; then its row
        is read again, and bcrypt runs again only if the hash has changed.

        Raises:
            InvalidApiKeyError: The key is malformed, unknown, wrong, expired, revoked, or of another organisation; the
                error does not say which.
            StoreUnavailableError: The database is away, too many checks wait, or too many keys of the same id were
                wrong. The key itself may be valid.
        """
        cache = self._cache
        cache.check_owner()
        plaintext = key.get_secret_value() if isinstance(key, SecretStr) else key
        key_id = parse_key_id(plaintext)
        if key_id is None:
            raise InvalidApiKeyError
        fingerprint = cache.fingerprint(plaintext)
        answer = cache.find(self._org_id, key_id, fingerprint)
        if answer is None:
            read = partial(self._read, key_id, fingerprint, plaintext)
            answer = await cache.read_once(self._org_id, fingerprint, read)
        if answer == REFUSED:
            raise InvalidApiKeyError
        if answer.use_due <= clock.monotonic():
            await self._record_use(answer)
        return answer.identity

    async def _read(self, key_id: str, fingerprint: bytes, plaintext: str) -> Answer:
        cache = self._cache
        # Before the row is read: a key id that is attacked must not cost the database anything.
        cache.verifier.admit(key_id, fingerprint)
        version = cache.begin()
        async with self._transactions.read() as connection:
            row = await _READ.first(connection, {"p_key_id": key_id, "p_org_id": self._org_id})
        if row is None or not row["is_active"] or row["is_expired"]:
            cache.put_unknown(version, key_id, self._org_id)
            return REFUSED
        hashes = [row["key_hash"], *([row["previous_key_hash"]] if row["has_previous"] else [])]
        matched = await cache.verifier.matching(key_id, fingerprint, digest(plaintext), hashes)
        # The store may have been closed while bcrypt ran.
        cache.check_owner()
        if matched is None:
            cache.put_refused(version, fingerprint, self._org_id)
            return REFUSED
        ends = [row["expires_at"], None if matched == row["key_hash"] else row["previous_key_expires_at"]]
        good = VerifiedKey(_identity(row), use_due=version.at + _until_use_due(row))
        end = min((end for end in ends if end is not None), default=None)
        cache.put_verified(version, fingerprint, self._org_id, good, read_at=row["read_at"], end=end)
        return good

    async def _record_use(self, good: VerifiedKey) -> None:
        good.use_due = clock.monotonic() + _LAST_USED_EVERY.total_seconds()
        # In the background, so that a database which hangs over this write delays a caller but refuses none.
        writing = self._cache.background.start(self._write_use(good.identity.api_key_id))
        await asyncio.wait([writing], timeout=_ONE_ROW_S)

    async def _write_use(self, row_id: int | None) -> None:
        statement = update(_keys).where(_keys.c.id == row_id, _is_use_due()).values(last_used_at=db_now())
        try:
            async with self._transactions.write() as connection:
                await connection.execute(statement)
        except (StoreUnavailableError, StoreNotOpenError) as exc:
            # Verifying works all the same with a database that is read-only.
            _logger.warning("The last use of an API key could not be recorded: %s", exc)

    async def rotate(
        self, caller_id: str, overlap: timedelta = timedelta(hours=24), *, org_id: str | None = None
    ) -> IssuedKey:
        """Replace the key of `caller_id`; its key id stays. The plaintext is in the result and nowhere else.

        Args:
            caller_id: The caller that has the key.
            overlap: How long the old key is still accepted, up to a million days; zero ends it at once.
            org_id: Organisation; default: the one this store is bound to, else "default".

        Raises:
            ApiKeyNotFoundError: The caller has no active key.
            ValueError: `overlap` is negative, or its end is beyond what a database holds.
        """
        if not timedelta() <= overlap <= _LONGEST:
            raise ValueError("overlap must be zero or more, and a million days at most.")
        is_own = self._of_caller(storable_key(caller_id), self._organisation(org_id))
        current = await self.get(caller_id, org_id=org_id)
        plaintext = new_key(current.key_id)
        new_hash = await self._hasher.hash(digest(plaintext))
        statement = (
            update(_keys)
            # The key id that was read: if the key was revoked and issued again since, this one is not that.
            .where(is_own, _keys.c.is_active, _keys.c.key_id == current.key_id)
            .values(
                # Not None: a `Statement` takes that for a parameter which its caller gives.
                previous_key_hash=_keys.c.key_hash if overlap else null(),
                previous_key_expires_at=db_now(plus=overlap) if overlap else null(),
                key_hash=new_hash,
            )
            .returning(*_keys.c)
        )
        row = await self._sure(self._change(statement), current.key_id, new_hash)
        if row is None:
            raise ApiKeyNotFoundError(caller_id)
        await self._cache.publish(row["key_id"])
        api_key = ApiKey.from_row(row)
        return IssuedKey(
            plaintext=SecretStr(plaintext), api_key=api_key, previous_valid_until=api_key.previous_key_expires_at
        )

    async def revoke(self, caller_id: str, *, org_id: str | None = None) -> ApiKey:
        """End the key of `caller_id`, and the one before it, at once. A second call changes nothing.

        Raises:
            ApiKeyNotFoundError: The caller has no key.
        """
        is_own = self._of_caller(storable_key(caller_id), self._organisation(org_id))
        nothing = {"previous_key_hash": null(), "previous_key_expires_at": null()}
        ended = {"is_active": False, "revoked_at": db_now(), **nothing}
        statement = update(_keys).where(is_own, _keys.c.is_active).values(ended).returning(*_keys.c)
        row = await self._change(statement, _newest(is_own))
        if row is None:
            raise ApiKeyNotFoundError(caller_id)
        await self._cache.publish(row["key_id"])
        return ApiKey.from_row(row)

    async def _sure(
        self, change: Awaitable[Mapping[str, Any] | None], key_id: str, key_hash: str
    ) -> Mapping[str, Any] | None:
        """Return what `change` does, also where its commit succeeded and the answer was lost.

        Its plaintext is still in hand then; tried again, it would take the place of the key that is in use.
        """
        try:
            return await change
        except StoreUnavailableError:
            own = select(_keys).where(_keys.c.key_id == key_id, _keys.c.key_hash == key_hash)
            with suppress(StoreUnavailableError, TimeoutError):
                async with asyncio.timeout(_ONE_ROW_S), self._transactions.read() as connection:
                    if (row := await _first_row(connection, own)) is not None:
                        return row
            raise

    @retry_conflicts
    async def _insert(self, values: Mapping[str, Any]) -> Mapping[str, Any] | None:
        async with self._transactions.write() as connection:
            return await _first_row(connection, insert(_keys).values(values).returning(*_keys.c))

    @retry_conflicts
    async def _change(self, *statements: Executable) -> Mapping[str, Any] | None:
        """Commit the first of `statements` that gives a row, and notify others of that key.

        If it raises, the commit may have succeeded: nothing that was read before is trusted then.
        """
        try:
            async with self._transactions.write() as connection:
                for statement in statements:
                    row = await Statement(statement).first(connection, {})
                    if row is not None:
                        # It is revoked, whatever else its row holds.
                        row = repaired(row)
                        await self._cache.notify(connection, row["key_id"])
                        return row
                return None
        except BaseException:
            self._cache.drop_all()
            raise

    async def get(self, caller_id: str, *, org_id: str | None = None) -> ApiKey:
        """Return the row of the active key of `caller_id`, else of the one revoked last; a repr shows no hash.

        Raises:
            ApiKeyNotFoundError: The caller has no key.
        """
        return (await self.read(caller_id, org_id=org_id)).api_key

    async def read(self, caller_id: str, *, org_id: str | None = None) -> KeyReading:
        """Return the row that `get` returns, with the database's time, by which alone a key ends.

        Raises:
            ApiKeyNotFoundError: The caller has no key.
        """
        values = {"p_caller_id": storable_key(caller_id), "p_org_id": self._organisation(org_id)}
        async with self._transactions.connection("read") as connection:
            row = await _GET.first(connection, values)
        if row is None:
            raise ApiKeyNotFoundError(caller_id)
        read_at = row["read_at"]
        del row["read_at"]
        return KeyReading(api_key=ApiKey.from_row(row), read_at=read_at)

    async def list(self, limit: int = 100, offset: int = 0) -> Page[ApiKey]:
        """Return key rows, those of revoked keys included (`is_active` is False), newest first by id.

        Raises:
            ValueError: `limit` or `offset` is negative, or beyond what a database can count.
        """
        require_between("limit", limit, 0, hint="for more keys, call again with offset")
        require_between("offset", offset, 0, hint="count from the newest key")
        values = {"p_limit": limit, "p_offset": offset, "p_org_id": self._org_id}
        async with self._transactions.read() as connection:
            rows = await _LIST.rows(connection, values)
        return Page((ApiKey.from_row(repaired(row)) for row in rows), columns=COLUMNS, record_type=ApiKey)

    def _organisation(self, org_id: str | None) -> str | None:
        """Return the organisation that is meant; None if the store is bound to another, so that nothing is found."""
        if org_id is None:
            return self._org_id or "default"
        if not org_id:
            raise ValueError("org_id must not be empty.")
        meant = storable_key(org_id)
        return meant if self._org_id in (None, meant) else None

    def _of_caller(self, caller_id: str, org_id: str | None) -> ColumnElement[bool]:
        return and_(_keys.c.caller_id == caller_id, false() if org_id is None else _keys.c.org_id == org_id)


def _newest(condition: ColumnElement[bool]) -> Select[Any]:
    """Select the active key of one caller, else the one issued last."""
    return select(_keys).where(condition).order_by(_keys.c.is_active.desc(), _keys.c.id.desc()).limit(1)


_ORG = bindparam("p_org_id", type_=Text())
_IS_VISIBLE = or_(_ORG.is_(None), _keys.c.org_id == _ORG)
_LIST = Statement(
    select(_keys)
    .where(_IS_VISIBLE)
    .order_by(_keys.c.id.desc())
    .limit(bindparam("p_limit", type_=BigInteger()))
    .offset(bindparam("p_offset", type_=BigInteger()))
)

# No organisation is NULL: a NULL, which stands for another one than the store is bound to, finds nothing.
_GET = Statement(
    _newest(and_(_keys.c.caller_id == bindparam("p_caller_id", type_=Text()), _keys.c.org_id == _ORG)).add_columns(
        db_now().label("read_at")
    )
)


def _is_use_due() -> ColumnElement[bool]:
    return or_(_keys.c.last_used_at.is_(None), _keys.c.last_used_at < db_now(plus=-_LAST_USED_EVERY))


def _timely() -> tuple[ColumnElement[Any], ...]:
    """Return the columns that compare a key's times with the database's clock."""
    return (
        and_(_keys.c.expires_at.is_not(None), _keys.c.expires_at <= db_now()).label("is_expired"),
        and_(_keys.c.previous_key_hash.is_not(None), _keys.c.previous_key_expires_at > db_now()).label("has_previous"),
        db_now().label("read_at"),
    )


_READ = Statement(select(_keys, *_timely()).where(_keys.c.key_id == bindparam("p_key_id", type_=Text()), _IS_VISIBLE))


def _until_use_due(row: Mapping[str, Any]) -> float:
    used: datetime | None = row["last_used_at"]
    return 0.0 if used is None else (_LAST_USED_EVERY - (row["read_at"] - used)).total_seconds()


def _identity(row: Mapping[str, Any]) -> CallerIdentity:
    names = CallerIdentity.model_fields.keys() - {"api_key_id"}
    return CallerIdentity(api_key_id=row["id"], **{name: row[name] for name in names})


async def _first_row(connection: AsyncConnection, statement: Executable) -> Mapping[str, Any] | None:
    row = (await connection.execute(statement)).mappings().first()
    return None if row is None else dict(row)
