"""Who is signed in. The audit log itself is the memory of sessions, so every worker process sees the same ones.

A sign-in is an audit event whose request id is a hash of the cookie, and so is a sign-out. That needs no table and no
secret of its own, survives restarts, leaves a record of who looked, and refuses a cookie that is played back after the
sign-out in every process. A signed cookie without memory could not do the last of these. To forge a sign-in event takes
the stored hash of the caller's key: the event holds an HMAC of it under the cookie, so that what the log shows of one
session opens no other.
"""

from __future__ import annotations

import hashlib
import hmac
import logging
import re
import secrets
from dataclasses import dataclass
from datetime import datetime, timedelta
from functools import partial
from ipaddress import IPv4Address, IPv6Network, ip_address
from typing import Any

from cachetools import TTLCache
from starlette.requests import Request

from agent_gateway_store import ApprovalManager, AuditQuery, _text, clock
from agent_gateway_store._concurrency import SingleFlight
from agent_gateway_store.errors import ApiKeyNotFoundError, InvalidApiKeyError, StoreUnavailableError
from agent_gateway_store.models.approval import ApprovalRequest
from agent_gateway_store.models.audit import AuditEvent, Decision, ExecutionStatus
from agent_gateway_store.models.keys import CallerIdentity, KeyReading
from agent_gateway_store.results import Page
from agent_gateway_store.store import GatewayStore

COOKIE = "gateway_store_console"
SERVER = "gateway-store"
_SIGN_IN, _SIGN_OUT = "console.sign_in", "console.sign_out"
# The form of secrets.token_urlsafe(32), 256 bits.
_SESSION_ID = re.compile(r"[A-Za-z0-9_-]{43}", re.ASCII)
# Chosen: a minute of sign-ins that need not be read again; what can end a session is read at every request.
_REMEMBERED, _REMEMBERED_S = 10_000, 60.0
# Chosen: a person who mistypes needs a few, a machine that guesses wants thousands.
_FAILURES, _FAILURES_S = 10, 60.0
_ADDRESSES = 100_000

logger = logging.getLogger("agent_gateway_store.console")


@dataclass(frozen=True)
class Session:
    """One person who is signed in.

    Attributes:
        store: The store as that person's organisation sees it.
        csrf: What every form of this session must send back.
        ends_at: When it ends by itself, UTC.
        read_at: When it was found, by the database's clock, which alone judges deadlines.
    """

    store: GatewayStore
    caller_id: str
    role: str
    key_id: str
    org_id: str
    csrf: str
    ends_at: datetime
    read_at: datetime

    @property
    def log(self) -> AuditQuery:
        """The audit log for pages that a person decides by: of the primary, where a replica may be behind or away."""
        return AuditQuery(self.store.database, org_id=self.org_id)

    async def search_approvals(self, **filters: Any) -> Page[ApprovalRequest]:
        """Search approvals where `log` reads, by the arguments of `store.approvals.search`."""
        database = self.store.database
        if database.replica is database:
            return await self.store.approvals.search(**filters)
        async with database.sessions() as session:
            approvals = ApprovalManager(session, settings=self.store.settings, org_id=self.org_id)
            return await approvals.search(**filters)


class Sessions:
    """Begins, finds and ends sessions of all organisations, or of the one that the store is bound to."""

    def __init__(self, store: GatewayStore) -> None:
        self._store = store
        self._roles = {role.strip() for role in store.settings.console_roles.split(",") if role.strip()}
        self._lasts = timedelta(seconds=store.settings.console_session_seconds)
        self._sign_ins: TTLCache[str, AuditEvent] = TTLCache(_REMEMBERED, _REMEMBERED_S)
        self._failures: TTLCache[str, list[int]] = TTLCache(_ADDRESSES, _FAILURES_S, timer=clock.monotonic)
        self._judging: SingleFlight[CallerIdentity] = SingleFlight(to_end=True)

    def is_limited(self, address: str) -> bool:
        """Return True while an address has failed, or is trying, too often; counted in this process."""
        return self._failures.get(_network_of(address), [0])[0] >= _FAILURES

    async def sign_in(self, key: str, *, address: str) -> str:
        """Return a new session id for the holder of `key`.

        Raises InvalidApiKeyError for a key and for a role that is not accepted alike, and StoreUnavailableError.
        """
        # An entry that is set again would begin its minute anew.
        failures = self._failures.setdefault(_network_of(address), [0])
        # Each counts until it proves right, or a thousand that are sent at once would all be judged.
        failures[0] += 1
        # To its end, or a visitor who hangs up at once could guess without being counted.
        identity = await self._judging.run(object(), partial(self._judge, key.strip(), failures, address))
        reading = await self._store.for_org(identity.org_id).keys.read(identity.caller_id)
        session_id = secrets.token_urlsafe(32)
        await self._write(_SIGN_IN, session_id, reading, address)
        logger.info("%s signed in to the console, from %s.", _text.escape(identity.caller_id), _text.escape(address))
        return session_id

    async def _judge(self, key: str, failures: list[int], address: str) -> CallerIdentity:
        try:
            identity = await self._store.keys.verify(key)
            if identity.role not in self._roles:
                raise InvalidApiKeyError
        except InvalidApiKeyError:
            failures[0] += 1
            logger.warning("Sign-in to the console refused, from %s.", _text.escape(address))
            raise
        finally:
            failures[0] -= 1
        return identity

    async def find(self, session_id: str | None) -> Session | None:
        """Return the session of this id, or None if there is none, or it or its key has ended."""
        if session_id is None or not _SESSION_ID.fullmatch(session_id):
            return None
        name = _request_id(_SIGN_IN, session_id)
        event = self._sign_ins.get(name) or await self._store.audit.get_by_request_id(name)
        if event is None or (event.mcp_server, event.tool_name) != (SERVER, _SIGN_IN):
            return None
        self._sign_ins[name] = event
        store = self._store.for_org(event.org_id)
        if await store.audit.get_by_request_id(_request_id(_SIGN_OUT, session_id)) is not None:
            return None
        try:
            reading = await store.keys.read(event.caller_id)
        except ApiKeyNotFoundError:
            return None
        row, ends_at = reading.api_key, event.timestamp + self._lasts
        if ends_at <= reading.read_at or row.key_id != event.key_id:
            return None
        if not self._may_enter(reading, session_id, event.extra.get("key")):
            return None
        csrf = _digest("csrf", session_id)
        return Session(store, row.caller_id, row.role, row.key_id, event.org_id, csrf, ends_at, reading.read_at)

    async def end(self, session: Session, session_id: str, *, address: str) -> None:
        """End a session in every process. Raises StoreUnavailableError if the database is away."""
        await self._write(_SIGN_OUT, session_id, await session.store.keys.read(session.caller_id), address)
        logger.info("%s signed out of the console.", _text.escape(session.caller_id))

    def _may_enter(self, reading: KeyReading, session_id: str, mark: object) -> bool:
        row, now = reading.api_key, reading.read_at
        if not row.is_active or row.role not in self._roles or (row.expires_at and row.expires_at <= now):
            return False
        # After a rotation the sessions of the old key end with its overlap.
        has_previous = row.previous_key_expires_at is not None and row.previous_key_expires_at > now
        hashes = [row.key_hash, *([row.previous_key_hash] if has_previous and row.previous_key_hash else [])]
        return any(hmac.compare_digest(_mark(session_id, each), str(mark)) for each in hashes)

    async def _write(self, tool: str, session_id: str, reading: KeyReading, address: str) -> None:
        row = reading.api_key
        event = AuditEvent(
            timestamp=reading.read_at,
            request_id=_request_id(tool, session_id),
            org_id=row.org_id,
            caller_id=row.caller_id,
            caller_role=row.role,
            key_id=row.key_id,
            environment=row.environment,
            mcp_server=SERVER,
            tool_name=tool,
            raw_args_hash=self._store.hash_args({"address": address}),
            sanitized_args={"address": address},
            risk_score=0.0,
            matched_policy_rule="CONSOLE_ROLES",
            decision=Decision.ALLOW,
            execution_status=ExecutionStatus.SUCCESS,
            latency_ms=0,
            deterministic_rationale="The console was entered or left with a valid API key.",
            extra={"key": _mark(session_id, row.key_hash)},
        )
        outcome = await self._store.audit.write(event)
        # A spooled sign-out would be unknown to the other processes until the spool is replayed.
        if outcome not in ("STORED", "DUPLICATE"):
            raise StoreUnavailableError("The database is away: try again when it is back.")


def is_right(session: Session, csrf: str) -> bool:
    """Return True if a form was made for this session."""
    return hmac.compare_digest(session.csrf.encode(), csrf.encode("utf-8", "replace"))


def address_of(request: Request) -> str:
    """Return where a request comes from, as far as the server and its trusted proxies know."""
    return request.client.host if request.client else "unknown"


def _network_of(address: str) -> str:
    """Return what refused keys are counted for: an address, but of IPv6 the /64 that a machine chooses one from."""
    try:
        found = ip_address(address)
    except ValueError:
        return address
    if isinstance(found, IPv4Address):
        return str(found)
    return str(found.ipv4_mapped or IPv6Network((int(found), 64), strict=False))


def _request_id(tool: str, session_id: str) -> str:
    return f"{tool}-{_digest(tool, session_id)}"


def _digest(purpose: str, session_id: str) -> str:
    return hmac.new(session_id.encode(), purpose.encode(), hashlib.sha256).hexdigest()


def _mark(session_id: str, key_hash: str) -> str:
    return _digest(key_hash, session_id)
