"""`gateway-store console`: serve the console.

The command line loads this module by its name, so that only this command needs the extra.
"""

from __future__ import annotations

import logging
import os
from typing import TYPE_CHECKING, Annotated, Any
from urllib.parse import urlsplit

import typer

from agent_gateway_store.cli.context import in_store, options_of, settings_of
from agent_gateway_store.cli.output import complain, say
from agent_gateway_store.errors import StoreUnavailableError, needs_extra

if TYPE_CHECKING:
    from agent_gateway_store.models.approval import ApprovalRequest
    from agent_gateway_store.models.audit import AuditEvent
    from agent_gateway_store.settings import StoreSettings
    from agent_gateway_store.store import GatewayStore

app = typer.Typer()

_DEMO_APPROVER, _DEMO_ROLE = "demo-approver", "approver"
# Chosen: two weeks of it make charts worth a look, and take a second to write.
_DEMO_EVENTS, _DEMO_SEED = 400, 7
_ORG = "_AGENT_GATEWAY_STORE_CONSOLE_ORG"
# Seconds: pages that listen for events notice within two that the server is to stop.
_GRACE_S = 4


@app.command()
def console(
    ctx: typer.Context,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65_535, help="Port to listen on.")] = 8765,
    workers: Annotated[int, typer.Option(min=1, help="Processes that serve it.")] = 1,
    demo: Annotated[bool, typer.Option("--demo", help="Fill the demo store, and print a key to sign in with.")] = False,
) -> None:
    """Serve the pages on which people decide approvals and search the audit log.

    Holders of an API key with one of the roles of CONSOLE_ROLES may sign in. With --demo it uses
    --database-url if it is given, else the file gateway-demo.db in the current folder, whatever DATABASE_URL says.
    """
    with needs_extra("gateway-store console", extra="console"):
        import jinja2  # noqa: F401
        import starlette  # noqa: F401
        import uvicorn
    settings = settings_of(ctx)
    if demo:
        from agent_gateway_store.demo.command import DATABASE

        # What it makes up must not go to the database of a gateway, which the environment may name.
        if options_of(ctx).database_url is None:
            own = {"database_url": DATABASE, "database_read_url": None, "redis_url": ""}
            settings = settings.model_copy(update=own)
        key = in_store(ctx, prepare_demo, settings=settings)
        say("Sign in with this key; it is shown once, and a new one each time:")
        typer.echo(key)
    try:
        in_store(ctx, lambda store: store.ping(), settings=settings)
    except StoreUnavailableError as exc:
        complain(f"{exc} The console starts all the same, and waits for it.")
    where = settings.console_url or f"http://{f'[{host}]' if ':' in host else host}:{port}"
    complain(f"The console is at {where} - stop it with Ctrl+C.")
    _hand_on(settings, options_of(ctx).org)
    logging.getLogger("agent_gateway_store.console").setLevel(logging.INFO)
    uvicorn.run(
        "agent_gateway_store.console.command:serve",
        factory=True,
        host=host,
        port=port,
        workers=workers,
        log_level="warning",
        # Forwarded headers are believed by CONSOLE_TRUSTED_PROXIES alone.
        proxy_headers=False,
        server_header=False,
        root_path=urlsplit(settings.console_url or "").path,
        timeout_graceful_shutdown=_GRACE_S,
    )


def serve() -> Any:
    """Return the console of the settings in the environment: what each worker process serves."""
    from agent_gateway_store.console import create_console
    from agent_gateway_store.store import GatewayStore

    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    logger = logging.getLogger("agent_gateway_store.console")
    logger.setLevel(logging.INFO)
    logger.addHandler(handler)
    store, org = GatewayStore(), os.environ.get(_ORG)
    return create_console(store.for_org(org) if org else store)


def _hand_on(settings: StoreSettings, org: str | None) -> None:
    """Give the worker processes, which begin anew, what options and --env-file said."""
    from agent_gateway_store.settings import PREFIX

    for name in settings.model_fields_set:
        value = getattr(settings, name)
        if hasattr(value, "get_secret_value"):
            value = value.get_secret_value()
        os.environ[f"{PREFIX}{name.upper()}"] = "" if value is None else str(value)
    if org:
        os.environ[_ORG] = org


async def prepare_demo(store: GatewayStore) -> str:
    """Fill the store unless something waits in it, and return a new key of the demo's approver."""
    from agent_gateway_store.demo.fill import fill
    from agent_gateway_store.demo.gateway import new_key

    if not await store.approvals.list_requests("PENDING", limit=1):
        await fill(store, _DEMO_EVENTS, seed=_DEMO_SEED)
    for request in await store.approvals.list_requests("PENDING"):
        await store.audit.write(_stopped(request))
    key = await new_key(store, _DEMO_APPROVER, role=_DEMO_ROLE)
    return key.get_secret_value()


def _stopped(request: ApprovalRequest) -> AuditEvent:
    """Return the event that a gateway writes when it stops a call, the same one each time."""
    from agent_gateway_store.models.audit import AuditEvent, Decision

    return AuditEvent(
        request_id=request.request_id,
        org_id=request.org_id,
        timestamp=request.created_at,
        caller_id=request.caller_id,
        caller_role="agent",
        environment="demo",
        mcp_server=request.tool_call.server,
        tool_name=request.tool_call.tool,
        raw_args_hash=AuditEvent.hash_args(request.tool_call.arguments),
        sanitized_args=request.tool_call.arguments,
        risk_labels=["irreversible"],
        risk_score=0.8,
        matched_policy_rule="ask-before-changes",
        decision=Decision.APPROVAL_REQUIRED,
        latency_ms=2,
        deterministic_rationale="The tool changes what cannot be changed back.",
        approval_id=request.approval_id,
    )
