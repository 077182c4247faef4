"""`gateway-store demo`: the main job from end to end, on real files, in a few seconds; `seed`: a first caller.

The command line loads this module by its name, so that only the demo imports the command line.
"""

from __future__ import annotations

import shlex
import time
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from agent_gateway_store.cli.context import in_store, settings_of, sqlite_file
from agent_gateway_store.cli.errors import CommandError
from agent_gateway_store.cli.keys import print_issued
from agent_gateway_store.cli.output import JsonOption, complain, console, field_text, print_json, say, to_dict
from agent_gateway_store.errors import ApiKeyExistsError

if TYPE_CHECKING:
    from agent_gateway_store.demo.gateway import Gateway
    from agent_gateway_store.models.audit import AuditEvent
    from agent_gateway_store.models.keys import ApiKey, IssuedKey, TrustLevel
    from agent_gateway_store.settings import StoreSettings
    from agent_gateway_store.store import GatewayStore

app = typer.Typer()

CALLER = "demo-agent"
FIRST_CALLER, FIRST_ROLE = "dev-agent", "developer"
DATABASE = "sqlite:///gateway-demo.db"
# From the begin of Unix time to one before the last year of `datetime`, so that deadlines after it can be computed.
_YEARS = range(1970, 9999)
_COLUMNS = ("tool", "arguments", "decision", "approver", "result", "ms")


@app.command()
def demo(
    ctx: typer.Context,
    events: Annotated[
        int | None, typer.Option(min=1, help="Fill the store with this many events of two made-up weeks instead.")
    ] = None,
    seed: Annotated[int, typer.Option(help="With --events: another seed gives another history.")] = 7,
    until: Annotated[
        str | None,
        typer.Option(
            help="With --events: end of the history, 2026-03-02T18:00Z or 24h ago; default: the last full hour."
        ),
    ] = None,
    load: Annotated[
        bool, typer.Option("--load", help="Make calls for a while instead, and send the figures by OpenTelemetry.")
    ] = False,
    seconds: Annotated[float, typer.Option(min=1, max=3600, help="With --load: for so long.")] = 60,
    rate: Annotated[float, typer.Option(min=0.1, max=1000, help="With --load: calls a second.")] = 10,
    json: JsonOption = False,
) -> None:
    """Run tools on real files, audit each call, have one deletion approved and another one denied.

    Uses DATABASE_URL or --database-url if it is given, else the file gateway-demo.db in the current folder.
    """
    end = None if until is None else _end(until, events)
    settings = settings_of(ctx)
    if "database_url" not in settings.model_fields_set:
        settings = settings.model_copy(update={"database_url": DATABASE})
    if events is not None:
        from agent_gateway_store.demo.fill import fill, show_filled

        filled = in_store(ctx, lambda store: fill(store, events, seed=seed, until=end), settings=settings)
        if json:
            print_json(filled)
        else:
            show_filled(filled)
            _show_where(f"Done in {filled['seconds']:.1f} s:", settings)
        return
    if load:
        _load(ctx, settings, seconds=seconds, rate=rate, as_json=json)
        return
    report = (lambda text: None) if json else say
    summary = in_store(ctx, lambda store: _demo(store, report), settings=settings)
    if json:
        print_json(summary)


def _load(ctx: typer.Context, settings: StoreSettings, *, seconds: float, rate: float, as_json: bool) -> None:
    from agent_gateway_store.demo.gateway import INSTALL, export_figures, load

    end = export_figures()
    if end is None:
        complain(INSTALL)
    settings = settings.model_copy(update={"otel_enabled": end is not None})
    try:
        made = in_store(ctx, lambda store: load(store, CALLER, seconds=seconds, rate=rate), settings=settings)
    finally:
        if end is not None:
            end()
    if as_json:
        print_json(made)
    else:
        say("{calls} calls in {seconds} s; {failed} failed, {left_out} left out.".format(**made))


def _end(until: str, events: int | None) -> datetime:
    from agent_gateway_store.storage.filters import instant

    if events is None:
        raise typer.BadParameter("--until is the end of a made-up history: give --events, too.")
    try:
        end = instant("--until", until)
    except ValueError as exc:
        raise typer.BadParameter(str(exc)) from None
    if end.year not in _YEARS:
        raise typer.BadParameter(f"--until must be in a year from {_YEARS[0]} to {_YEARS[-1]}.")
    return end


async def _demo(store: GatewayStore, report: Any) -> dict[str, Any]:
    from agent_gateway_store.demo.gateway import at_work

    started = time.perf_counter()
    async with at_work(store, CALLER) as gateway:
        caller = gateway.caller
        report(f"Key       {CALLER} has API key agw_{caller.key_id}_***; verified as {caller.role}.")
        await _calls(gateway, report)
        left = gateway.tools.list_files()
    await store.keys.revoke(CALLER)
    report(f"Files     {' and '.join(left)} are left; the API key is revoked.")
    # The store may hold earlier runs of the demo.
    found = await store.audit.list_by_caller(CALLER)
    events = [event for event in reversed(found) if event.session_id == gateway.session_id]
    seconds = time.perf_counter() - started
    if len(events) != 5 or left != ["customers.csv", "notes.txt"] or not gateway.replay_refused:
        raise CommandError("The demo did not end as it should: run `gateway-store doctor`.")
    if report is say:
        _show(events)
        _show_where(f"Done in {seconds:.1f} s. The audit log is in", store.settings)
    return _summary(gateway, events, left, store.settings, seconds)


async def _calls(gateway: Gateway, report: Any) -> None:
    names = await gateway.call("list_files")
    text = await gateway.call("read_file", name="notes.txt", access_code="4711")
    digest = await gateway.call("hash_file", name="customers.csv")
    report(f"Tools     list_files: {len(names)} files; read_file: {len(text)} characters; hash_file: {digest[:8]}...")
    for name in ("old-export.csv", "customers.csv"):
        report(f"Approval  delete_file {name} waits for a decision of another task ...")
        await gateway.call("delete_file", name=name)
        answer = gateway.decisions[name]
        verdict = "approved" if answer.status == "APPROVED" else "denied"
        report(f"          {verdict} by {answer.approver_id}: {answer.note}.")
        if gateway.replay_refused and verdict == "approved":
            report("          The token was used once; a second use was refused.")


def _show(events: list[AuditEvent]) -> None:
    from agent_gateway_store.results import Page

    typer.echo()
    table = Page(map(_row, events), columns=_COLUMNS).__rich__()
    for name, column in zip(_COLUMNS, table.columns, strict=True):
        column.no_wrap = name != "arguments"
    # The width of a small terminal, and of most pages that quote the demo.
    console(at_most=80).print(table)
    typer.echo()


def _show_where(lead: str, settings: StoreSettings) -> None:
    from agent_gateway_store.settings import mask_url

    url = mask_url(settings.database_url)
    option = f" --database-url {shlex.quote(url)}"
    for line in (
        f"{lead} {sqlite_file(settings.database_url) or url}. Look at it:",
        "",
        f"    gateway-store{option} audit search",
        f"    gateway-store{option} approvals list",
        "",
        "in a browser, with requests that wait for you (needs the extra `console`):",
        "",
        f"    gateway-store{'' if settings.database_url == DATABASE else option} console --demo",
        "",
        "or in a notebook:",
        "",
        "    from agent_gateway_store import SyncGatewayStore",
        f'    store = SyncGatewayStore("{url}").open()',
        "    store.audit.list_recent()",
    ):
        say(line)


def _row(event: AuditEvent) -> dict[str, Any]:
    arguments = dict(event.sanitized_args)
    name = arguments.pop("name", "")
    return {
        "tool": event.tool_name,
        "arguments": " ".join(filter(None, (name, field_text("sanitized_args", arguments)))),
        "decision": event.decision,
        "approver": event.approver_id,
        "result": event.execution_status or "not run",
        "ms": event.latency_ms,
    }


def _summary(
    gateway: Gateway, events: list[AuditEvent], left: list[str], settings: StoreSettings, seconds: float
) -> dict[str, Any]:
    from agent_gateway_store.settings import mask_url

    file = sqlite_file(settings.database_url)
    return {
        "caller_id": CALLER,
        "key_id": gateway.caller.key_id,
        "session_id": gateway.session_id,
        "approvals": {name: to_dict(answer) for name, answer in gateway.decisions.items()},
        "second_use_refused": gateway.replay_refused,
        "files_left": left,
        "events": [to_dict(event) for event in events],
        "database_url": mask_url(settings.database_url),
        "database_file": None if file is None else str(file.absolute()),
        "seconds": round(seconds, 3),
    }


@app.command()
def seed(
    ctx: typer.Context,
    policies: Annotated[
        Path | None,
        typer.Option(
            exists=True,
            dir_okay=False,
            readable=True,
            help="YAML policy file; without one, the role developer has trust level MEDIUM.",
        ),
    ] = None,
    json: JsonOption = False,
) -> None:
    """Create the caller dev-agent (role developer) and print its API key, once. Safe to repeat."""
    from agent_gateway_store.models.keys import TrustLevel

    levels = {FIRST_ROLE: TrustLevel.MEDIUM} if policies is None else _trust_levels(policies)
    issued, known = in_store(ctx, lambda store: _first_key(store, levels[FIRST_ROLE]))
    if policies is not None and not json:
        complain(f"Roles in {policies.name}: {', '.join(f'{name} {level.name}' for name, level in levels.items())}.")
    roles = {name: level.name for name, level in levels.items()}
    if issued is not None:
        print_issued(issued, as_json=json, created=True, roles=roles)
    elif json:
        print_json({**to_dict(known), "created": False, "roles": roles})
    else:
        next_step = f"`gateway-store keys rotate {FIRST_CALLER}`"
        complain(f"{FIRST_CALLER} already has an API key, which cannot be shown again: {next_step}.")


async def _first_key(store: GatewayStore, level: TrustLevel) -> tuple[IssuedKey | None, ApiKey]:
    try:
        issued = await store.keys.issue(FIRST_CALLER, role=FIRST_ROLE, trust_level=level)
    except ApiKeyExistsError:
        return None, await store.keys.get(FIRST_CALLER)
    return issued, issued.api_key


def _trust_levels(path: Path) -> dict[str, TrustLevel]:
    from agent_gateway_store.demo.policies import read_policies

    levels = read_policies(path)
    if FIRST_ROLE not in levels:
        raise CommandError(
            f"{path.name} has no role {FIRST_ROLE}, which {FIRST_CALLER} is to have: add it under `roles`."
        )
    return levels
