"""The steps of `mcp-hangar`, by the Python of an environment of its own: reads a step and a count, prints seconds."""

from __future__ import annotations

import asyncio
import hashlib
import json
import sys
import time
from datetime import UTC, datetime, timedelta
from urllib.parse import urlsplit
from uuid import uuid4

from mcp_hangar.approvals.models import ApprovalRequest, ApprovalState
from mcp_hangar.infrastructure.persistence.backends.postgresql.approval_repository import PostgresApprovalRepository
from mcp_hangar.infrastructure.persistence.database_common import PostgresConfig, PostgresConnectionFactory


def ask() -> ApprovalRequest:
    """Return a request of the same call as ours."""
    arguments = {"path": "/srv/data/report.csv", "force": True}
    now = datetime.now(UTC)
    return ApprovalRequest(
        approval_id=uuid4().hex,
        mcp_server_id="files",
        tool_name="delete_file",
        arguments=arguments,
        arguments_hash=hashlib.sha256(json.dumps(arguments, sort_keys=True).encode()).hexdigest(),
        requested_at=now,
        expires_at=now + timedelta(hours=1),
        state=ApprovalState.PENDING,
        channel="api",
    )


async def main(url: str) -> None:
    """Do the steps that are asked for on standard input."""
    at = urlsplit(url)
    config = PostgresConfig(
        host=at.hostname,
        port=at.port,
        database=at.path.strip("/"),
        user=at.username,
        password=at.password or "",
    )
    kept = PostgresApprovalRepository(PostgresConnectionFactory(config))
    pending, approved = ApprovalState.PENDING, ApprovalState.APPROVED
    ids: list[str] = []
    for line in sys.stdin:
        step, count = line.split()
        start = time.perf_counter()
        for number in range(int(count)):
            if step == "issue_token":
                request = ask()
                ids.append(request.approval_id)
                await kept.save(request)
            elif step == "approve":
                assert await kept.transition(ids[number], [pending], approved, "alice", datetime.now(UTC), "ok")
            else:
                # It has no state for a use: this is the guarded UPDATE by which it withdraws what was approved.
                used = ids.pop(0)
                assert await kept.transition(used, [approved], ApprovalState.CANCELLED, None, None, None)
        print(time.perf_counter() - start, flush=True)


asyncio.run(main(sys.argv[1]))
