"""Passwords in URLs are shown nowhere; `tests/integration/test_planted_secrets.py` looks for the other secrets."""

from __future__ import annotations

import logging
import traceback
from collections.abc import Awaitable
from pathlib import Path
from typing import Any

import pytest

from agent_gateway_store import GatewayStore, StoreSettings, SyncGatewayStore, errors
from agent_gateway_store.storage.cache import create_redis
from builders import make_request

pytestmark = pytest.mark.unit

PASSWORDS = {"plain-pass-71": "pass-71", "p@ss:w/rd?71#x": "ss:w|rd?71|71#x", "%70ercent-71": "ercent-71"}
"""Passwords, also such as should have been escaped, and pieces by which each is recognised."""


async def refused(answer: Awaitable[Any]) -> str:
    """Return all that an error shows, with its causes and the values of a full traceback."""
    with pytest.raises(errors.GatewayStoreError) as caught:
        await answer
    return "".join(traceback.format_exception(caught.value)) + repr(caught.value) + str(vars(caught.value))


@pytest.mark.parametrize(("password", "pieces"), PASSWORDS.items())
async def test_password_of_the_database_is_not_shown(
    password: str, pieces: str, caplog: pytest.LogCaptureFixture
) -> None:
    """A password in DATABASE_URL is in no repr, error or log."""
    caplog.set_level(logging.DEBUG)
    for url in (f"postgresql://user:{password}@127.0.0.1:1/none", f"oracle://user:{password}@127.0.0.1:1/none"):
        settings = StoreSettings(database_url=url, redis_url="")
        shown = [repr(settings), str(settings)]
        try:
            store = GatewayStore(settings=settings)
        except errors.InvalidUrlError as error:
            shown.append("".join(traceback.format_exception(error)))
        else:
            shown += [repr(store), repr(store.database), repr(store.database.engine), await refused(store.open())]
            shown.append(repr(SyncGatewayStore(settings=settings)))

        assert [text for text in [*shown, caplog.text] for piece in pieces.split("|") if piece in text] == []


@pytest.mark.parametrize(("password", "pieces"), PASSWORDS.items())
async def test_password_of_redis_is_not_shown(
    password: str, pieces: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A password in REDIS_URL is in no repr, error or log, also while Redis is away."""
    caplog.set_level(logging.DEBUG)
    for url in (
        f"redis://user:{password}@127.0.0.1:1/0",
        f"rediss://:{password}@127.0.0.1:x/0",
        f"http://:{password}@h",
    ):
        settings = StoreSettings(database_url=f"sqlite:///{tmp_path}/gateway.db", redis_url=url)
        shown = [repr(settings), str(settings)]
        try:
            client = create_redis(url)
        except errors.InvalidUrlError as error:
            shown.append("".join(traceback.format_exception(error)))
        else:
            shown.append(repr(client))
            async with GatewayStore(settings=settings) as store:
                await store.approvals.issue_token(make_request())

        assert [text for text in [*shown, caplog.text] for piece in pieces.split("|") if piece in text] == []
