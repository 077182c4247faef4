"""How-to: decide in Slack."""

import os

PREFIX = "AGENT_GATEWAY_STORE_SLACK_"
os.environ |= {
    f"{PREFIX}SIGNING_SECRET": "from-the-app's-basic-information",
    f"{PREFIX}APPROVERS": '{"U024BE7LH": "alice"}',
}

# --8<-- [start:app]
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fastapi import FastAPI, Request, Response

from agent_gateway_store import GatewayStore
from agent_gateway_store.plugins.slack import SlackCallback


@asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncIterator[None]:
    async with GatewayStore() as store:
        app.state.store = store
        app.state.slack = SlackCallback(store.approvals, store.plugins)
        yield
        await app.state.slack.aclose()


app = FastAPI(lifespan=lifespan)


@app.post("/slack/clicks")
async def clicks(request: Request) -> Response:
    reply = await app.state.slack.handle(await request.body(), request.headers)
    return Response(reply.body, reply.status, reply.headers)


# --8<-- [end:app]

# --8<-- [start:map]
from agent_gateway_store import hookimpl

STAFF = {"U0G9QF9C6": "bob@example.com"}


@hookimpl
async def gateway_store_map_approver(user_id: str) -> str | None:
    """Ask the directory who this is; None: nobody who may decide."""
    return STAFF.get(user_id)


# --8<-- [end:map]

import asyncio
import json
import time
from urllib.parse import urlencode

import httpx
from slack_sdk.signature import SignatureVerifier

from agent_gateway_store import ApprovalRequest, ToolCall


def click(approval_id: object) -> tuple[bytes, dict[str, str]]:
    """What Slack would send."""
    action = {"action_id": "gateway_store_approve", "value": str(approval_id), "action_ts": "1548426417.840180"}
    payload = {"type": "block_actions", "user": {"id": "U024BE7LH", "username": "al"}, "actions": [action]}
    body, now = urlencode({"payload": json.dumps(payload)}).encode(), str(int(time.time()))
    verifier = SignatureVerifier(os.environ[f"{PREFIX}SIGNING_SECRET"])
    signature = verifier.generate_signature(timestamp=now, body=body)
    return body, {"X-Slack-Request-Timestamp": now, "X-Slack-Signature": signature or ""}


async def main() -> None:
    transport = httpx.ASGITransport(app)
    async with lifespan(app), httpx.AsyncClient(transport=transport, base_url="http://gateway") as client:
        approvals = app.state.store.approvals
        call = ToolCall(server="files", tool="delete_file", arguments={"path": "old.log"})
        token = await approvals.issue_token(
            ApprovalRequest(request_id="r-1", caller_id="dev-agent", tool_call=call, risk_explanation="Deletes a file.")
        )
        body, headers = click((await approvals.check_token(token)).approval_id)
        forged = await client.post("/slack/clicks", content=body, headers=headers | {"X-Slack-Signature": "v0=00"})
        fetched = await client.get("/slack/clicks")
        assert (forged.status_code, fetched.status_code) == (401, 405)
        assert (await approvals.check_token(token)).status == "PENDING"
        replies = [await client.post("/slack/clicks", content=body, headers=headers) for _ in range(3)]
        assert [reply.status_code for reply in replies] == [200, 200, 200]
        result = await approvals.check_token(token, fresh=True)
        assert (result.status, result.approver_id) == ("APPROVED", "alice")
    assert await gateway_store_map_approver("U0G9QF9C6") == "bob@example.com"


asyncio.run(main())
