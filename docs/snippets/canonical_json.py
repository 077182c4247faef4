"""Reference: the hashes, recomputed from the outside."""

import asyncio

# --8<-- [start:args]
import hashlib
import json

from agent_gateway_store import AuditEvent

arguments = {"path": "/etc/hosts", "lines": 10, "ratio": 0.5}
canonical = b'{"lines":10,"path":"/etc/hosts","ratio":0.5}'  # RFC 8785

assert AuditEvent.hash_args(arguments) == hashlib.sha256(canonical).hexdigest()
# --8<-- [end:args]

# --8<-- [start:keyed]
import hmac

keyed = hmac.new(b"my secret", canonical, hashlib.sha256).hexdigest()
assert AuditEvent.hash_args(arguments, key="my secret") == keyed
# --8<-- [end:keyed]

# --8<-- [start:call]
from agent_gateway_store import ToolCall
from agent_gateway_store.models.approval import hash_tool_call

call = ToolCall(server="files", tool="delete_file", arguments={"path": "old.log"})
canonical = b'{"arguments":{"path":"old.log"},"server":"files","tool":"delete_file"}'

assert hash_tool_call(call) == hashlib.sha256(canonical).hexdigest()
# --8<-- [end:call]

# --8<-- [start:vectors]
from agent_gateway_store.encoding.canonical import canonical_json

assert canonical_json({"b": 1, "a": [True, None]}) == b'{"a":[true,null],"b":1}'
assert canonical_json({"n": 9007199254740991}) == b'{"n":9007199254740991}'
assert canonical_json({"n": 9007199254740993}) == b'{"n":"$int:9007199254740993"}'
assert canonical_json({"n": float("nan")}) == b'{"n":"$float:nan"}'
assert canonical_json({"n": -0.0}) == b'{"n":0}'
assert canonical_json({"t": "$int:5"}) == b'{"t":"$$int:5"}'
assert canonical_json({"t": "\ud800"}) == b'{"t":"$text:\\\\ud800"}'
assert canonical_json({"b": b"\x00\xff"}) == b'{"b":"$bytes:AP8="}'
assert canonical_json({1: "a", None: "b"}) == b'{"$int:1":"a","$null:none":"b"}'
# --8<-- [end:vectors]


# --8<-- [start:content]
def content_hash(event: AuditEvent) -> str:
    """Return the `content_hash` of a stored event."""
    document = event.model_dump(mode="json", exclude={"id", "content_hash"})
    for name in ("approval_id", "extra"):
        if not document[name]:
            del document[name]
    text = json.dumps(document, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()


# --8<-- [end:content]


async def main() -> None:
    from agent_gateway_store import GatewayStore

    async with GatewayStore() as store:
        for number, args in enumerate([{"path": "ü"}, {"n": 1e300, "z": -0.0, "nul": "\0"}, {"n": 2**70}]):
            event = AuditEvent(
                request_id=f"r-{number}",
                caller_id="dev-agent",
                caller_role="developer",
                environment="dev",
                mcp_server="files",
                tool_name="read_file",
                raw_args_hash=AuditEvent.hash_args(args),
                sanitized_args=args,
                risk_score=1e-7,
                matched_policy_rule="reads-are-allowed",
                decision="ALLOW",
                latency_ms=3,
                deterministic_rationale="Reads are allowed.",
            )
            assert await store.audit.write(event) == "STORED"
        for event in await store.audit.list_recent():
            assert event.content_hash == content_hash(event)


asyncio.run(main())
