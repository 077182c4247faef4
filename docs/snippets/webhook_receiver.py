"""How-to: receive webhooks."""

import base64
import os
import secrets

os.environ["WEBHOOK_SECRET"] = "whsec_" + base64.b64encode(secrets.token_bytes(32)).decode()

# --8<-- [start:app]
import os

from fastapi import FastAPI, Request, Response

from agent_gateway_store.plugins.webhook import WebhookReceiver

receiver = WebhookReceiver([os.environ["WEBHOOK_SECRET"]])
app = FastAPI()
waiting = {}


@app.post("/approvals")
async def approvals(request: Request) -> Response:
    received = receiver.verify(await request.body(), request.headers)
    if received is None:
        return Response(status_code=401)
    if not received.is_repeat:
        if received.type == "approval.requested":
            waiting[received.data["approval_id"]] = received.data["tool_call"]
        else:
            waiting.pop(received.data["approval_id"], None)
    return Response(status_code=204)


# --8<-- [end:app]

import asyncio

import uvicorn

from agent_gateway_store import ApprovalRequest, GatewayStore, ToolCall

SECRET = os.environ["WEBHOOK_SECRET"]
PREFIX = "AGENT_GATEWAY_STORE_WEBHOOK_"


async def main() -> None:
    server = uvicorn.Server(uvicorn.Config(app, port=0, ws="none", log_level="warning"))
    serving = asyncio.create_task(server.serve())
    while not server.started:
        await asyncio.sleep(0.01)
    port = server.servers[0].sockets[0].getsockname()[1]
    os.environ |= {
        f"{PREFIX}URL": f"http://127.0.0.1:{port}/approvals",
        f"{PREFIX}SECRETS": SECRET,
        f"{PREFIX}ALLOW_HTTP": "true",
        f"{PREFIX}ALLOWED_NETWORKS": "127.0.0.0/8",
    }
    async with GatewayStore() as store:
        call = ToolCall(server="files", tool="delete_file", arguments={"path": "old.log"})
        token = await store.approvals.issue_token(
            ApprovalRequest(request_id="r-1", caller_id="dev-agent", tool_call=call, risk_explanation="Deletes a file.")
        )
        async with asyncio.timeout(30):
            while not waiting:
                await asyncio.sleep(0.01)
        assert list(waiting.values()) == [call.model_dump()]
        await store.approvals.deny(token, approver_id="alice")
        async with asyncio.timeout(30):
            while waiting:
                await asyncio.sleep(0.01)
    server.should_exit = True
    await serving


asyncio.run(main())
