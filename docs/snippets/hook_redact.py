"""Hooks: redact before an event is stored."""

import asyncio

# --8<-- [start:plugin]
import re

from agent_gateway_store import RedactionFlag, hookimpl

EMAIL = re.compile(r"[\w.+-]+@[\w-]+\.[\w.]+")


class HideAddresses:
    """Hides e-mail addresses in the arguments, and says where it did."""

    @hookimpl
    def gateway_store_before_audit_write(self, event):
        kept, flags = {}, list(event.redaction_flags)
        for name, value in event.sanitized_args.items():
            kept[name] = EMAIL.sub("(address)", value) if isinstance(value, str) else value
            if kept[name] != value:
                flags.append(RedactionFlag(field=f"sanitized_args.{name}", reason="EMAIL"))
        return event.model_copy(update={"sanitized_args": kept, "redaction_flags": flags})


# --8<-- [end:plugin]


from agent_gateway_store import AuditEvent, GatewayStore


async def main() -> None:
    args = {"to": "ann@example.com", "subject": "hello"}
    event = AuditEvent(
        request_id="r-1",
        caller_id="dev-agent",
        caller_role="developer",
        environment="dev",
        mcp_server="mail",
        tool_name="send",
        raw_args_hash=AuditEvent.hash_args(args),
        sanitized_args=args,
        risk_score=0.2,
        matched_policy_rule="mail-is-allowed",
        decision="ALLOW",
        latency_ms=12,
        deterministic_rationale="Mail is allowed.",
    )
    async with GatewayStore(plugins=[HideAddresses()]) as store:
        await store.audit.write(event)
        [stored] = await store.audit.list_recent()
    assert stored.sanitized_args == {"to": "(address)", "subject": "hello"}
    assert [flag.field for flag in stored.redaction_flags] == ["sanitized_args.to"]


asyncio.run(main())
