"""The dependencies of the FastAPI integration on WebSockets, by a client of another library over a real server."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
from fastapi import FastAPI, WebSocket
from websockets.asyncio.client import connect
from websockets.exceptions import ConnectionClosed, InvalidStatus

import asgi
from agent_gateway_store import GatewayStore, errors
from agent_gateway_store.integrations.fastapi import (
    CallerDep,
    CallerStoreDep,
    StoreDep,
    install_error_handlers,
    lifespan,
)

BROKEN = {
    "refused": (errors.ApprovalNotFoundError(), 1008, "Approval not found: check the token or the approval id."),
    "long": (errors.SelfApprovalError("ä" * 200), 1008, "ä" * 61),
    "away": (
        errors.StoreUnavailableError("db.internal"),
        1013,
        "The gateway cannot reach its records: try again later.",
    ),
    "fault": (errors.PluginError("db.internal", plugin="p"), 1011, "The gateway failed: tell its operator."),
}


def build_app(store: GatewayStore) -> FastAPI:
    """An application whose endpoints are WebSockets."""
    app = FastAPI(lifespan=lifespan(store))
    install_error_handlers(app)

    @app.websocket("/whoami")
    async def whoami(socket: WebSocket, caller: CallerDep, bound: CallerStoreDep, own: StoreDep) -> None:
        await socket.accept()
        await socket.send_json([caller.caller_id, bound.org_id, own is store])
        await socket.close()

    @app.websocket("/early/{name}")
    async def early(socket: WebSocket, name: str) -> None:
        raise BROKEN[name][0]

    @app.websocket("/late/{name}")
    async def late(socket: WebSocket, name: str) -> None:
        await socket.accept()
        raise BROKEN[name][0]

    @app.websocket("/gone")
    async def gone(socket: WebSocket) -> None:
        await socket.accept()
        await socket.close(4000)
        raise errors.ApprovalNotFoundError

    return app


@asynccontextmanager
async def serving(store: GatewayStore) -> AsyncIterator[str]:
    """Serve on a free port; yields the URL."""
    async with asgi.serving(build_app(store), ws="websockets-sansio") as place:
        yield f"ws://{place}"


async def test_key_of_the_handshake_names_the_caller() -> None:
    """Either header will do; a caller that is not accepted is answered before the socket opens, as over HTTP."""
    store = GatewayStore()
    async with serving(store) as url:
        key = (await store.keys.issue("dev-agent", role="developer", org_id="acme")).plaintext.get_secret_value()
        for headers in ({"Authorization": f"Bearer {key}"}, {"X-API-Key": key}):
            async with connect(f"{url}/whoami", additional_headers=headers) as socket:
                assert await socket.recv() == '["dev-agent","acme",true]'
        for wrong in ({}, {"X-API-Key": "x"}, {"X-API-Key": key, "Authorization": f"Bearer {key}"}):
            with pytest.raises(InvalidStatus) as refused:
                await connect(f"{url}/whoami", additional_headers=wrong)
            answer = refused.value.response
            assert (answer.status_code, answer.headers["WWW-Authenticate"]) == (401, "Bearer")
            assert answer.body == b'{"detail":"Invalid API key: ask the operator for a new one."}'


async def test_error_of_the_store_ends_an_open_socket() -> None:
    """With a code that says whether to come again, and the sentence; before it opens the answer is that of HTTP."""
    async with serving(GatewayStore()) as url:
        for name, (_, code, reason) in BROKEN.items():
            async with connect(f"{url}/late/{name}") as socket:
                with pytest.raises(ConnectionClosed) as closed:
                    await socket.recv()
            with pytest.raises(InvalidStatus) as refused:
                await connect(f"{url}/early/{name}")

            assert closed.value.rcvd is not None
            assert (closed.value.rcvd.code, closed.value.rcvd.reason) == (code, reason)
            status = refused.value.response.status_code
            assert status == {1011: 500, 1013: 503}.get(code, status) >= 403
            assert b"db.internal" not in refused.value.response.body
        async with connect(f"{url}/gone") as socket:
            with pytest.raises(ConnectionClosed) as closed:
                await socket.recv()
        # The code of the endpoint stands.
        assert closed.value.rcvd is not None
        assert closed.value.rcvd.code == 4000
