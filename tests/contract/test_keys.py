"""API keys: shown once, stored as bcrypt, refused early, rotated with an overlap."""

from __future__ import annotations

import asyncio
import itertools
import re
import threading
from datetime import timedelta

import bcrypt
import key_cache_helpers
import pytest
from contract_helpers import POSTGRES, column, counted_statements
from key_cache_helpers import issue
from pydantic import SecretStr
from sqlalchemy import insert
from sqlalchemy.exc import IntegrityError

from agent_gateway_store import (
    ApiKey,
    CallerIdentity,
    GatewayStore,
    IssuedKey,
    StoreSettings,
    TrustLevel,
    clock,
    errors,
)
from agent_gateway_store.keys.format import new_key, new_key_id, parse_key_id

MINUTE, HOUR, MILLION_DAYS = timedelta(minutes=1), timedelta(hours=1), timedelta(days=1_000_000)


bcrypt_calls = key_cache_helpers.bcrypt_calls


async def accepts(store: GatewayStore, *keys: IssuedKey) -> list[bool]:
    """Tell which of the keys are accepted."""
    answers = [store.keys.verify(key.plaintext) for key in keys]
    return [isinstance(answer, CallerIdentity) for answer in await asyncio.gather(*answers, return_exceptions=True)]


async def test_issued_key_is_verified(store: GatewayStore) -> None:
    issued = await store.keys.issue("dev-agent", role="developer", trust_level=TrustLevel.MEDIUM, environment="staging")
    text = issued.plaintext.get_secret_value()

    for key in (text, issued.plaintext):
        assert await store.keys.verify(key) == CallerIdentity(
            caller_id="dev-agent",
            role="developer",
            trust_level=TrustLevel.MEDIUM,
            environment="staging",
            org_id="default",
            key_id=issued.api_key.key_id,
            api_key_id=issued.api_key.id,
        )
    assert text not in repr(issued) + str(issued) + repr(issued.api_key)


async def test_only_bcrypt_is_stored(store: GatewayStore) -> None:
    """The column holds a bcrypt of the cost asked for; the plaintext is nowhere in the row."""
    issued = await issue(store)
    (key_hash,) = await column(store, "key_hash", "api_keys")

    assert re.fullmatch(r"\$2b\$04\$.{53}", key_hash)
    for name in ("key_id", "caller_id", "role", "environment", "org_id", "previous_key_hash"):
        assert issued.plaintext.get_secret_value() not in str(await column(store, name, "api_keys"))


def changed(text: str, place: int) -> str:
    """Return `text` with another character at `place`."""
    return text[:place] + ("A" if text[place] != "A" else "B") + text[place + 1 :]


@POSTGRES
async def test_malformed_key_costs_no_lookup(store: GatewayStore, bcrypt_calls: list[bytes]) -> None:
    """What is no key, or fails its checksum, is refused without a statement and without bcrypt."""
    text = (await issue(store)).plaintext.get_secret_value()
    wrong = [changed(text, place) for place in range(len(text)) if text[place] != "_"]
    wrong += ["", "agw_", text[:-1], text + "A", text + "\n", " " + text, text.lower(), "\0" * 66, "\ud800", "é" * 66]
    wrong += ["a" * 2**20, text.replace("_", "-"), text.replace("agw", "AGW"), text[:20] + "٣" + text[21:]]

    with counted_statements(store, "api_keys") as statements:
        for key in [*wrong, None, 5, text.encode(), SecretStr("")]:
            with pytest.raises(errors.InvalidApiKeyError):
                await store.keys.verify(key)  # type: ignore[arg-type]

    assert statements == []
    assert bcrypt_calls == []


@POSTGRES
async def test_every_refusal_reads_the_same(store: GatewayStore, bcrypt_calls: list[bytes]) -> None:
    """Malformed, unknown, wrong, revoked, expired: one error, one text, no cause; bcrypt for the wrong one alone."""
    issued = await issue(store)
    revoked = await issue(store, "revoked")
    await store.keys.revoke("revoked")
    expired = await store.keys.issue("expired", role="r", expires_at=clock.utc_now() - HOUR)
    keys = ["x", new_key(new_key_id()), new_key(issued.api_key.key_id), revoked.plaintext, expired.plaintext]
    refusals = await asyncio.gather(*map(store.keys.verify, keys), return_exceptions=True)

    assert {(type(refusal), str(refusal), refusal.__cause__, refusal.__context__) for refusal in refusals} == {
        (errors.InvalidApiKeyError, "Invalid API key: ask the operator for a new one.", None, None)
    }
    assert len(bcrypt_calls) == 1


@POSTGRES
async def test_keys_that_differ_in_one_character_are_different(
    store: GatewayStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of two well-formed keys with one id, whose secrets differ in the last character only, one is accepted."""
    issued = await issue(store)
    text = issued.plaintext.get_secret_value()
    twin = text[:-6]
    twin = changed(twin, len(twin) - 1)
    monkeypatch.setattr("agent_gateway_store.keys.format._random", lambda _length: twin.rpartition("_")[2])
    other = new_key(issued.api_key.key_id)

    assert parse_key_id(other) == issued.api_key.key_id
    assert sum(a != b for a, b in zip(text[:-6], other[:-6], strict=True)) == 1
    with pytest.raises(errors.InvalidApiKeyError):
        await store.keys.verify(other)
    assert (await store.keys.verify(text)).caller_id == "dev-agent"


async def test_rotation_leaves_no_gap(store: GatewayStore) -> None:
    """During the overlap both keys are accepted, after it the new one; the public id stays."""
    old = await issue(store)
    new = await store.keys.rotate("dev-agent", overlap=HOUR)
    during = await accepts(store, old, new)
    clock.move(HOUR)
    after = await accepts(store, old, new)
    third = await store.keys.rotate("dev-agent")

    assert (during, after) == ([True, True], [False, True])
    assert await accepts(store, old, new, third) == [False, True, True]
    assert new.api_key.key_id == old.api_key.key_id
    assert new.previous_valid_until is not None
    assert abs(new.previous_valid_until + HOUR - clock.utc_now() - HOUR) < MINUTE


async def test_rotation_without_overlap_ends_the_old_key_at_once(store: GatewayStore) -> None:
    """With an overlap of zero the old key is refused from then on, and its hash is gone."""
    old = await issue(store)
    new = await store.keys.rotate("dev-agent", overlap=timedelta())

    assert await accepts(store, old, new) == [False, True]
    assert new.previous_valid_until is None
    assert await column(store, "previous_key_hash", "api_keys") == [None]


async def test_a_key_issued_while_another_is_rotated_stays(
    store: GatewayStore, other: GatewayStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between the read of the old key and its replacement it is revoked and a new one issued, which is not replaced."""
    await issue(store)
    begun, go, hashing = threading.Event(), threading.Event(), bcrypt.hashpw

    def held(*args: bytes) -> bytes:
        if not begun.is_set():
            begun.set()
            assert go.wait(10)
        return hashing(*args)

    monkeypatch.setattr(bcrypt, "hashpw", held)
    rotating = asyncio.create_task(store.keys.rotate("dev-agent"))
    assert await asyncio.to_thread(begun.wait, 10)
    await other.keys.revoke("dev-agent")
    new = await issue(other)
    go.set()

    with pytest.raises(errors.ApiKeyNotFoundError):
        await rotating
    assert await accepts(store, new) == [True]


async def test_a_key_lives_through_the_longest_overlap_and_no_longer_one_is_taken(store: GatewayStore) -> None:
    """What a database could not hold is refused before anything is written: the old key is accepted as before."""
    old = await store.keys.issue("dev-agent", role="developer")
    for overlap in (MILLION_DAYS + timedelta(days=1), timedelta.max):
        with pytest.raises(ValueError, match="a million days at most"):
            await store.keys.rotate("dev-agent", overlap=overlap)
    new = await store.keys.rotate("dev-agent", overlap=MILLION_DAYS)

    assert [(await store.keys.verify(key.plaintext)).caller_id for key in (old, new)] == ["dev-agent"] * 2


async def test_revocation_ends_every_key_at_once(store: GatewayStore) -> None:
    """A revoked key is refused, with the one in its overlap; revoking again changes nothing."""
    old = await issue(store)
    new = await store.keys.rotate("dev-agent", overlap=HOUR)
    revoked = await store.keys.revoke("dev-agent")
    clock.move(MINUTE)
    again = await store.keys.revoke("dev-agent")

    assert await accepts(store, old, new) == [False, False]
    assert not revoked.is_active
    assert revoked.revoked_at is not None
    assert again.revoked_at == revoked.revoked_at
    with pytest.raises(errors.ApiKeyNotFoundError):
        await store.keys.rotate("dev-agent")


async def test_expiry_is_judged_by_the_database_clock(store: GatewayStore) -> None:
    issued = await store.keys.issue("dev-agent", role="r", expires_at=clock.utc_now() + HOUR)
    before = await accepts(store, issued)
    clock.move(HOUR)

    assert (before, await accepts(store, issued)) == ([True], [False])


async def test_a_lifetime_is_counted_by_the_database_clock(
    store: GatewayStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`expires_in` is added to the database's time; the longest one that a database holds is taken, and no other."""
    for lifetime in (timedelta(), -HOUR, MILLION_DAYS + HOUR):
        with pytest.raises(ValueError, match="expires_in must be more than zero"):
            await issue(store, expires_in=lifetime)
    with pytest.raises(ValueError, match="not both"):
        await issue(store, expires_in=HOUR, expires_at=clock.utc_now() + HOUR)
    assert await store.keys.list() == []
    right_now = clock.utc_now
    monkeypatch.setattr(clock, "utc_now", lambda: right_now() - 5 * HOUR)
    issued = await issue(store, expires_in=HOUR)
    longest = await issue(store, "other-agent", expires_in=MILLION_DAYS)
    found = await store.keys.read("dev-agent")

    assert issued.api_key.expires_at is not None
    assert abs(issued.api_key.expires_at - right_now() - HOUR) < MINUTE
    assert found.api_key == await store.keys.get("dev-agent")
    assert abs(found.read_at - right_now()) < MINUTE
    assert await accepts(store, issued, longest) == [True, True]
    clock.move(HOUR)
    assert await accepts(store, issued, longest) == [False, True]


@POSTGRES
async def test_keys_are_listed_from_the_newest(store: GatewayStore) -> None:
    issued = [await issue(store, f"agent-{number}") for number in range(3)]

    assert [row.caller_id for row in await store.keys.list(limit=2)] == ["agent-2", "agent-1"]
    assert [row.caller_id for row in await store.keys.list(limit=2, offset=2)] == ["agent-0"]
    page = await store.keys.list(limit=2**31 - 1)
    shown = f"{page.to_dicts()}{page._repr_html_()}{page!r}"
    assert "$2b$" not in shown
    assert not any(key.plaintext.get_secret_value() in shown for key in issued)
    for name, value in itertools.product(("limit", "offset"), (-1, 2**31, 2**63, 10**5000)):
        with pytest.raises(ValueError, match=f"{name} must be 0 to 2,147,483,647: "):
            await store.keys.list(**{name: value})


async def test_second_key_of_a_caller_is_refused(store: GatewayStore) -> None:
    """A caller has one key; the error says to rotate it, and the first one still works."""
    first = await issue(store)

    with pytest.raises(errors.ApiKeyExistsError, match=r"^'dev-agent' already .* keys rotate") as caught:
        await issue(store)
    assert caught.value.caller_id == "dev-agent"
    assert await accepts(store, first) == [True]


async def test_of_concurrent_issues_one_succeeds(store: GatewayStore) -> None:
    for _ in range(2):
        answers = await asyncio.gather(*(issue(store) for _ in range(4)), return_exceptions=True)
        (issued,) = [answer for answer in answers if isinstance(answer, IssuedKey)]
        assert sum(isinstance(answer, errors.ApiKeyExistsError) for answer in answers) == 3
        assert await accepts(store, issued) == [True]
        await store.keys.revoke("dev-agent")


async def test_caller_whose_key_was_revoked_gets_a_new_one(store: GatewayStore) -> None:
    """The new key has a new id and a row of its own; the old one stays refused, and its row stays as it was."""
    old = await issue(store)
    await accepts(store, old)
    revoked = await store.keys.revoke("dev-agent")
    new = await store.keys.issue("dev-agent", role="admin")

    assert await accepts(store, old, new) == [False, True]
    assert new.api_key.key_id != old.api_key.key_id
    row = await store.keys.get("dev-agent")
    assert (row.role, row.is_active, row.revoked_at, row.last_used_at is None) == ("admin", True, None, False)
    assert [each.model_dump() for each in await store.keys.list()] == [row.model_dump(), revoked.model_dump()]


async def test_every_key_that_a_caller_had_stays_on_record(store: GatewayStore) -> None:
    """`list` has all of them with their state; `get` and `revoke` give the active one, else the one issued last."""
    for number in range(3):
        await store.keys.issue("dev-agent", role=f"role-{number}")
        clock.move(MINUTE)
        await store.keys.revoke("dev-agent")
    last = await store.keys.get("dev-agent")
    other = await issue(store.for_org("acme"))

    assert (last.role, (await store.keys.revoke("dev-agent")).model_dump()) == ("role-2", last.model_dump())
    listed = await store.for_org("default").keys.list()
    assert [(each.role, each.is_active) for each in listed] == [(f"role-{number}", False) for number in (2, 1, 0)]
    ends = [each.revoked_at for each in listed]
    assert sorted(ends, reverse=True) == ends
    assert "revoked_at" in listed._repr_html_()
    assert await accepts(store, other) == [True]
    with pytest.raises(errors.ApiKeyNotFoundError):
        await store.keys.rotate("dev-agent")


async def test_the_database_holds_one_active_key_of_a_caller(store: GatewayStore) -> None:
    await issue(store)
    await store.keys.revoke("dev-agent")
    row = (await issue(store)).api_key
    active = {name: getattr(row, name) for name in ApiKey.model_fields if name != "id"}
    taken = [active | {"key_id": "a", "org_id": "acme"}, active | {"key_id": "b", "is_active": False}]
    async with store.database.write() as connection:
        await connection.execute(insert(ApiKey), taken)

    with pytest.raises(IntegrityError):
        async with store.database.engine.begin() as connection:
            await connection.execute(insert(ApiKey), [active | {"key_id": "c"}])


async def test_a_revocation_and_an_issue_at_once_leave_one_key_or_none(
    store: GatewayStore, other: GatewayStore
) -> None:
    """Whichever is first: a new key is accepted unless it was revoked, and the old one is not."""
    for _ in range(5):
        old = await issue(store)
        _, answer = await asyncio.gather(store.keys.revoke("dev-agent"), issue(other), return_exceptions=True)

        active = [each for each in await store.keys.list() if each.is_active]
        if isinstance(answer, IssuedKey):
            assert [each.key_id for each in active] == [answer.api_key.key_id]
            assert await accepts(store, old, answer) == [False, True]
            await store.keys.revoke("dev-agent")
        else:
            assert isinstance(answer, errors.ApiKeyExistsError)
            assert active == []


@pytest.mark.parametrize("trusted_s", [30, 600])
async def test_last_use_is_noted_once_a_minute(database_url: str, trusted_s: int) -> None:
    """The first use is noted, those of the next minute cost no write, the one after it is noted again."""
    settings = StoreSettings(api_key_cache_seconds=trusted_s)
    async with GatewayStore(database_url, redis_url="", settings=settings) as store:
        issued = await issue(store)
        await store.keys.verify(issued.plaintext)
        first = (await store.keys.get("dev-agent")).last_used_at
        clock.move(50 * MINUTE / 60)
        with counted_statements(store, "api_keys") as statements:
            await store.keys.verify(issued.plaintext)
        clock.move(11 * MINUTE / 60)
        await store.keys.verify(issued.plaintext)
        third = (await store.keys.get("dev-agent")).last_used_at

    assert first is not None
    assert third is not None
    assert [statement.split()[0] for statement in statements] == ["SELECT"][: trusted_s < 50]
    assert third - first >= MINUTE


@POSTGRES
async def test_key_is_verified_although_its_use_cannot_be_noted(
    store: GatewayStore, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A database that only reads still tells good keys from bad ones; the log says what was not written."""
    issued = await issue(store)

    def refuse() -> None:
        raise errors.StoreUnavailableError("The database is read-only.")

    monkeypatch.setattr(store.database, "write", refuse)

    assert (await store.keys.verify(issued.plaintext)).caller_id == "dev-agent"
    assert "could not be recorded: The database is read-only." in caplog.text


@POSTGRES
async def test_unknown_caller_is_told(store: GatewayStore) -> None:
    for ask in (store.keys.get, store.keys.read, store.keys.rotate, store.keys.revoke):
        with pytest.raises(errors.ApiKeyNotFoundError, match="No API key for caller 'nobody': issue one") as caught:
            await ask("nobody")
        assert caught.value.caller_id == "nobody"
    with pytest.raises(ValueError, match="overlap must be zero or more"):
        await store.keys.rotate("nobody", overlap=-HOUR)
