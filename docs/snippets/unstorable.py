"""Reference: what the scrubber replaces."""

import asyncio

from agent_gateway_store import AuditEvent, GatewayStore


def make_event(**fields: object) -> AuditEvent:
    return AuditEvent(
        request_id="r-1",
        caller_id="dev-agent",
        caller_role="developer",
        environment="dev",
        mcp_server="files",
        tool_name="read_file",
        raw_args_hash=AuditEvent.hash_args({}),
        risk_score=0,
        matched_policy_rule="reads-are-allowed",
        decision="ALLOW",
        latency_ms=3,
        deterministic_rationale="Reads are allowed.",
        **fields,
    )


async def main() -> None:
    async with GatewayStore() as store:
        # --8<-- [start:store]
        await store.audit.write(make_event(sanitized_args={"name": "a\0b", "size": float("nan"), "n": 2**60}))

        [stored] = await store.audit.list_recent()
        print(stored.sanitized_args)  # {'name': 'a␀b', 'size': '$float:nan', 'n': '$int:1152921504606846976'}
        for flag in stored.redaction_flags:
            print(flag.field, flag.reason, flag.original_hash)
        # --8<-- [end:store]
        assert stored.sanitized_args == {"name": "a␀b", "size": "$float:nan", "n": "$int:1152921504606846976"}
        places = ["sanitized_args.name", "sanitized_args.size", "sanitized_args.n"]
        assert [flag.field for flag in stored.redaction_flags] == places
        assert {flag.reason for flag in stored.redaction_flags} == {"UNSTORABLE"}

        # --8<-- [start:lookup]
        endless = "x" * 10_000
        await store.audit.write(make_event(sanitized_args={}).model_copy(update={"caller_id": endless}))

        [stored] = await store.audit.list_by_caller(endless)  # lookups are cut the same way
        print(len(stored.caller_id))  # 512
        # --8<-- [end:lookup]
        assert len(stored.caller_id) == 512


asyncio.run(main())
