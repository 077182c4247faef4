"""A database of its own with millions of events, made by the server itself."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from uuid import uuid4

import asyncpg

from agent_gateway_store.storage import migrate
from agent_gateway_store.storage.database import create_engine
from benchmarks.events import HASH, RATIONALE

_STEP = 100_000
# Fifty callers, twenty tools, ten organisations, all decisions and outcomes, an event every three seconds.
_FILL = f"""
INSERT INTO audit_events (request_id, org_id, trace_id, session_id, timestamp, caller_id, caller_role, key_id,
    environment, mcp_server, tool_name, raw_args_hash, sanitized_args, risk_labels, risk_score, matched_policy_rule,
    decision, execution_status, latency_ms, output_hash, output_decision, redaction_flags, deterministic_rationale,
    content_hash)
SELECT md5(n::text), 'org-' || (n * 7919 % 10), md5((n / 3)::text), 'session-' || (n / 50),
    '2024-01-01'::timestamptz + n * interval '3 seconds', 'agent-' || (n * 31 % 50), 'developer', '0123456789ab',
    (ARRAY['prod', 'dev', 'stage'])[1 + n * 13 % 3], 'server-' || (n % 5), 'tool_' || (n * 17 % 20), '{HASH}',
    jsonb_build_object('path', '/srv/data/report.csv', 'lines', n % 1000, 'encoding', 'utf-8'),
    CASE WHEN n % 11 = 0 THEN '["READ", "PII"]' ELSE '["READ"]' END::jsonb, (n % 100) / 100.0, 'allow-reads',
    (ARRAY['ALLOW', 'ALLOW', 'ALLOW', 'ALLOW', 'ALLOW', 'ALLOW', 'ALLOW', 'DENY', 'APPROVAL_REQUIRED',
        'SANITIZE_AND_ALLOW'])[1 + n * 7 % 10],
    CASE n * 3 % 20 WHEN 0 THEN NULL WHEN 1 THEN 'TOOL_ERROR' WHEN 2 THEN 'TIMEOUT' ELSE 'SUCCESS' END,
    (n * n) % 300, '{HASH}', 'ALLOW', '[]', '{RATIONALE}', '{HASH}'
FROM generate_series($1::bigint, $2::bigint) AS n
"""


@asynccontextmanager
async def database(url: str, *, revision: str = "head") -> AsyncIterator[str]:
    """Make an empty database beside that of `url`, with our schema; give its URL, and drop it at the end."""
    name = f"benchmark_{uuid4().hex[:12]}"
    server = await asyncpg.connect(url)
    await server.execute(f"CREATE DATABASE {name}")
    made = f"{url.rsplit('/', 1)[0]}/{name}"
    try:
        engine = create_engine(made)
        await migrate.upgrade(engine, revision)
        await engine.dispose()
        yield made
    finally:
        await server.execute(f"DROP DATABASE {name} WITH (FORCE)")
        await server.close()


async def fill(url: str, start: int, end: int) -> None:
    """Add events number `start` to `end`, and settle."""
    connection = await asyncpg.connect(url, command_timeout=3_600)
    for first in range(start, end + 1, _STEP):
        await connection.execute(_FILL, first, min(end, first + _STEP - 1))
    await connection.close()
    await settle(url)


async def settle(url: str) -> None:
    """Let the server do what it would else do in the background of what is measured."""
    connection = await asyncpg.connect(url, command_timeout=3_600)
    await connection.execute("VACUUM ANALYZE")
    await connection.execute("CHECKPOINT")
    await connection.close()
