"""The console: who may enter, and until when."""

from __future__ import annotations

import asyncio
import re
from collections import Counter
from datetime import UTC, datetime, timedelta
from typing import Any

import console_helpers
import pytest
from console_helpers import Visitor, console, key_of, signed_in, status, waiting
from starlette.applications import Starlette
from starlette.routing import Mount

from agent_gateway_store import GatewayStore, clock
from agent_gateway_store.console.sessions import COOKIE
from agent_gateway_store.keys import KeyManager

url, store, app = console_helpers.url, console_helpers.store, console_helpers.app


async def test_who_holds_no_key_of_an_approver_stays_outside(store: GatewayStore, app: Any) -> None:
    for key in (await key_of(store, role="developer"), "agw_wrong", "", "x" * 9000):
        visitor = Visitor(app)
        answer = await visitor.sign_in(key)

        assert (answer.status_code, "was not accepted" in answer.text) == (403, True)
        assert not key or key not in answer.text
        assert COOKIE not in visitor.client.cookies
        assert await status(visitor) == 303


async def test_a_cookie_played_back_after_the_sign_out_is_refused_in_every_process(
    store: GatewayStore, app: Any, url: str
) -> None:
    alice = await signed_in(store, app)
    cookie = alice.client.cookies[COOKIE]
    async with console(url) as (_, elsewhere):
        thief = Visitor(elsewhere)
        thief.client.cookies.set(COOKIE, cookie)
        assert await status(thief) == 200

        await alice.post("/logout", {"csrf": await alice.csrf()})

        assert COOKIE not in alice.client.cookies
        assert await status(thief) == 303


async def test_a_session_id_is_new_with_each_sign_in_and_never_a_visitors_own(store: GatewayStore, app: Any) -> None:
    """A planted id is not taken over, and the session of the cookie that came with a sign-in ends."""
    key, planted = await key_of(store), "A" * 43
    visitor, old = Visitor(app), Visitor(app)
    visitor.client.cookies.set(COOKIE, planted, domain="console.test", path="/")
    await visitor.sign_in(key)
    first = visitor.client.cookies.get(COOKIE, domain="console.test")
    answer = await visitor.sign_in(key)
    second = visitor.client.cookies.get(COOKIE, domain="console.test")
    old.client.cookies.set(COOKIE, first or "")

    assert len({planted, first, second}) == 3
    assert (await status(visitor), await status(old)) == (200, 303)
    assert all(word in answer.headers["set-cookie"].lower() for word in ("httponly", "samesite=strict", "path=/"))


async def test_a_session_ends_with_its_key(store: GatewayStore, app: Any) -> None:
    revoked, rotated, overlapping = [await signed_in(store, app, name) for name in ("alice", "bob", "carol")]

    await store.keys.revoke("alice")
    await store.keys.rotate("bob", timedelta())
    await store.keys.rotate("carol", timedelta(hours=1))

    assert [await status(each) for each in (revoked, rotated, overlapping)] == [303, 303, 200]
    clock.move(timedelta(hours=2))
    assert await status(overlapping) == 303


def set_wrong(monkeypatch: pytest.MonkeyPatch, *, hours: int) -> None:
    """Let the clock of this process, and not the database's, be so many hours ahead."""

    class Wrong(datetime):
        @classmethod
        def now(cls, tz: Any = None) -> datetime:
            return datetime.now(tz) + timedelta(hours=hours)

    monkeypatch.setattr(clock, "datetime", Wrong)


async def test_a_key_of_a_session_ends_by_the_database_clock(
    store: GatewayStore, app: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A console whose own clock is hours behind lets in neither an expired key nor one whose overlap is over."""
    expires_at = datetime.now(UTC) + timedelta(hours=1)
    issued = await store.keys.issue("alice", role="approver", expires_at=expires_at)
    expiring, overlapping = Visitor(app), await signed_in(store, app, "bob")
    await expiring.sign_in(issued.plaintext.get_secret_value())
    await store.keys.rotate("bob", timedelta(hours=1))
    set_wrong(monkeypatch, hours=-5)
    before = [await status(each) for each in (expiring, overlapping)]

    clock.move(timedelta(hours=2))

    assert (before, [await status(each) for each in (expiring, overlapping)]) == ([200, 200], [303, 303])


@pytest.mark.parametrize(("there", "here"), [(-5, 0), (5, 0), (0, -5), (0, 5)])
async def test_a_session_lasts_as_long_on_machines_whose_clocks_differ(
    url: str, monkeypatch: pytest.MonkeyPatch, there: int, here: int
) -> None:
    """CONSOLE_SESSION_SECONDS, however busy it was, by the database's clock, which also dates the sign-in."""
    async with console(url, console_session_seconds=600) as (store, app):
        set_wrong(monkeypatch, hours=there)
        alice = await signed_in(store, app)
        set_wrong(monkeypatch, hours=here)
        [event] = await store.audit.search(tool_name="console.sign_in")
        assert abs(event.timestamp - datetime.now(UTC)) < timedelta(minutes=1)
        clock.move(timedelta(seconds=580))
        page = await alice.get("/approvals")
        # By it the script counts down, and switches off the buttons of what has expired.
        [now] = re.findall(r'data-now="([^"]+)"', page.text)
        assert abs(datetime.fromisoformat(now) - event.timestamp - timedelta(seconds=580)) < timedelta(minutes=1)

        clock.move(timedelta(seconds=40))

        assert await status(alice) == 303


async def test_the_cookie_cannot_be_read_or_sent_from_elsewhere(url: str) -> None:
    """HttpOnly and SameSite=Strict always, Secure over TLS; for the path of the console alone."""
    async with console(url, console_url="https://gateway.example/console") as (store, app):
        mounted = Starlette(routes=[Mount("/console", app)])
        visitor = Visitor(mounted, base="/console")
        answer = await visitor.sign_in(await key_of(store))

    cookie = answer.headers["set-cookie"].lower()
    for word in ("httponly", "samesite=strict", "secure", "path=/console"):
        assert word in cookie
    assert answer.headers["location"] == "/console/approvals"


async def test_keys_that_are_sent_at_once_are_refused_like_keys_one_after_another(
    store: GatewayStore,
    app: Any,
) -> None:
    """Ten of them are judged; right ones, of whom any number may come from one address, count for nothing."""
    right, wrong = await key_of(store), await key_of(store, "bob", role="developer")
    address = "198.51.100.7"
    entered = [(await Visitor(app, address=address).sign_in(right)).status_code for _ in range(12)]

    answers = await asyncio.gather(*(Visitor(app, address=address).sign_in(wrong) for _ in range(30)))

    assert entered == [303] * 12
    assert Counter(answer.status_code for answer in answers) == {403: 10, 429: 20}


async def test_who_hangs_up_while_a_wrong_key_is_checked_is_counted(
    store: GatewayStore, app: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    right, wrong, visitor = await key_of(store), await key_of(store, "bob", role="developer"), Visitor(app)
    real, begun = KeyManager.verify, asyncio.Event()

    async def noted(keys: KeyManager, key: str) -> Any:
        begun.set()
        return await real(keys, key)

    monkeypatch.setattr(KeyManager, "verify", noted)
    for _ in range(10):
        begun.clear()
        leaving = asyncio.create_task(visitor.sign_in(wrong))
        await begun.wait()
        leaving.cancel()
        await asyncio.wait([leaving])

    assert (await visitor.sign_in(right)).status_code == 429


async def test_ten_refused_keys_stop_an_address_for_a_minute_and_fewer_never(store: GatewayStore, app: Any) -> None:
    """A refusal does not lengthen the minute in which those before it count; a right key waits with it."""
    key = await key_of(store)
    slow, quick = Visitor(app, address="198.51.100.7"), Visitor(app, address="198.51.100.8")

    answers = []
    for _ in range(12):
        answers.append((await slow.sign_in("agw_typo")).status_code)
        clock.move(timedelta(seconds=50))
    assert answers == [403] * 12
    for _ in range(10):
        await quick.sign_in("agw_typo")
        clock.move(timedelta(seconds=5))
    assert [(await quick.sign_in(each)).status_code for each in ("agw_typo", key)] == [429, 429]
    clock.move(timedelta(seconds=11))
    assert (await quick.sign_in("agw_typo")).status_code == 403
    assert (await Visitor(app, address="198.51.100.9").sign_in(key)).status_code == 303


async def test_an_address_of_ipv6_counts_with_its_network(app: Any) -> None:
    """A machine has a whole /64 to choose from; one of IPv4 that is written as IPv6 stands for itself."""
    for spelling, other in (
        ("2001:DB8:0:1:0:0:0:{:04X}", "2001:db8:0:2::1"),
        ("::{:x}", "2001:db8:0:3::1"),
        ("::ffff:198.51.100.7", "::ffff:198.51.100.8"),
    ):
        visitors = [Visitor(app, address=spelling.format(number)) for number in range(1, 12)]
        assert [(await each.sign_in("agw_guess")).status_code for each in visitors] == [403] * 10 + [429]
        assert (await Visitor(app, address=other).sign_in("agw_guess")).status_code == 403


async def test_a_decision_after_the_end_of_a_session_says_that_nothing_was_recorded(
    store: GatewayStore,
    app: Any,
) -> None:
    request, key = await waiting(store), await key_of(store)
    alice = Visitor(app)
    await alice.sign_in(key)
    form = {"decision": "deny", "note": "no <b>&", "csrf": await alice.csrf()}
    await alice.post("/logout", {"csrf": form["csrf"]})

    answer = await alice.post(f"/approvals/{request.approval_id}/decision", form)
    [following] = re.findall(r'name="next" value="([^"]+)"', answer.text)
    again = await alice.post("/login", {"key": key, "next": following})

    assert answer.status_code == 401
    assert "Your session had ended: nothing was recorded." in answer.text
    assert "readonly>\nno &lt;b&gt;&amp;</textarea>" in answer.text
    assert again.headers["location"] == f"/approvals/{request.approval_id}"
    assert (await store.approvals.get(approval_id=request.approval_id)).status == "PENDING"
