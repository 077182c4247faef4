"""The receiving end: only what was signed, lately, is believed, and each delivery once."""

from __future__ import annotations

import json
import random
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from pydantic import SecretStr
from standardwebhooks import Webhook
from webhook_helpers import OLD_SECRET, SECRET

from agent_gateway_store.plugins.webhook import WebhookReceiver, body_of
from agent_gateway_store.testing import make_notice

pytestmark = pytest.mark.unit


def signed(body: bytes, *secrets: str, at: datetime | None = None, delivery_id: str = "msg-1") -> dict[str, str]:
    """Headers made by the official library."""
    at = at or datetime.now(UTC)
    signatures = [Webhook(secret).sign(delivery_id, at, body.decode()) for secret in secrets]
    return {
        "Webhook-Id": delivery_id,
        "Webhook-Timestamp": str(int(at.timestamp())),
        "Webhook-Signature": " ".join(signatures),
    }


def test_what_was_signed_is_received() -> None:
    """Type, time and content; the secret may be given as text or as a secret."""
    notice = make_notice()
    body = body_of(notice)
    received = WebhookReceiver([SecretStr(SECRET)]).verify(body, signed(body, SECRET))

    assert received is not None
    assert (received.id, received.type, received.is_repeat) == ("msg-1", "approval.requested", False)
    assert received.data["approval_id"] == str(notice.approval_id)


def test_either_of_two_secrets_will_do() -> None:
    body = body_of(make_notice())

    assert WebhookReceiver([OLD_SECRET, SECRET]).verify(body, signed(body, SECRET)) is not None
    assert WebhookReceiver([SECRET]).verify(body, signed(body, OLD_SECRET, SECRET)) is not None
    assert WebhookReceiver([SECRET]).verify(body, signed(body, OLD_SECRET)) is None


def test_odd_signatures_beside_a_good_one() -> None:
    """Versions to come (`v1a`) and nonsense do not hide the one that is right."""
    body = body_of(make_notice())
    headers = signed(body, SECRET)
    headers["Webhook-Signature"] = f"v1a,xyz nonsense v1,%%% ,,, {headers['Webhook-Signature']}"

    assert WebhookReceiver([SECRET]).verify(body, headers) is not None


def test_old_and_early_ones_are_refused() -> None:
    """A captured webhook is worth nothing after five minutes."""
    body = body_of(make_notice())
    for minutes in (-6, 6):
        headers = signed(body, SECRET, at=datetime.now(UTC) + timedelta(minutes=minutes))
        assert WebhookReceiver([SECRET]).verify(body, headers) is None


def test_repetitions_are_told_until_forgotten() -> None:
    """A delivery id counts once; one whose handling failed can be taken again."""
    receiver, body = WebhookReceiver([SECRET]), body_of(make_notice())

    def repeats() -> bool:
        received = receiver.verify(body, signed(body, SECRET))
        assert received is not None
        return received.is_repeat

    assert [repeats() for _ in range(3)] == [False, True, True]
    receiver.forget("msg-1")
    assert repeats() is False


def test_memory_is_bounded() -> None:
    receiver, body = WebhookReceiver([SECRET], remember=10), body_of(make_notice())
    for number in range(30):
        receiver.verify(body, signed(body, SECRET, delivery_id=f"msg-{number}"))

    again = [receiver.verify(body, signed(body, SECRET, delivery_id=f"msg-{number}")) for number in (29, 0)]

    assert [received.is_repeat for received in again if received] == [True, False]


def test_an_unsigned_id_is_not_remembered() -> None:
    """Nobody without the secret can make a true delivery look repeated."""
    receiver, body = WebhookReceiver([SECRET]), body_of(make_notice())
    assert receiver.verify(body, signed(body, OLD_SECRET)) is None
    received = receiver.verify(body, signed(body, SECRET))

    assert (received and received.is_repeat) is False


def test_signed_nonsense_is_not_received() -> None:
    for content in (b"[]", b"1", b'"x"', b"{}", b'{"type":1,"timestamp":"","data":{}}', b"{", b""):
        assert WebhookReceiver([SECRET]).verify(content, signed(content, SECRET)) is None


def test_fuzzed_headers_and_bodies_raise_nothing() -> None:
    rng = random.Random(20261124)
    receiver, body = WebhookReceiver([SECRET]), body_of(make_notice())
    good = signed(body, SECRET)

    def noise() -> Any:
        kind = rng.randrange(5)
        if kind == 0:
            return "".join(chr(rng.choice([rng.randrange(32, 127), rng.randrange(0xD800)])) for _ in range(12))
        return [None, "v1," + "A" * rng.randrange(50), str(10 ** rng.randrange(30)), "nan"][kind - 1]

    for _ in range(2000):
        headers: dict[Any, Any] = dict(good)
        for name in rng.sample(list(headers), rng.randrange(1, 4)):
            headers[name] = noise()
        hostile_body = rng.choice([body, rng.randbytes(30), b"", json.dumps({"type": "x"}).encode()])
        received = receiver.verify(hostile_body, headers)
        assert received is None or (hostile_body == body and headers["Webhook-Id"] == good["Webhook-Id"])

    assert receiver.verify(body, None) is None  # type: ignore[arg-type]


def test_secrets_of_the_wrong_form() -> None:
    for secrets in ([], ["planted"], ["whsec_c2hvcnQ="], ["whsec_" + "A" * 400]):
        with pytest.raises(ValueError) as caught:
            WebhookReceiver(secrets)
        assert "planted" not in str(caught.value)
