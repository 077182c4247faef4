"""`gateway-store notifications`: what was delivered and what was not, and a worker that delivers it."""

from __future__ import annotations

import logging
import signal
from collections.abc import Coroutine, Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Annotated, Any
from uuid import UUID

import typer

from agent_gateway_store.cli.context import choose, duration, in_store, read_store, settings_of
from agent_gateway_store.cli.errors import CommandError, ExitCode
from agent_gateway_store.cli.output import JsonOption, complain, print_json, print_page, print_result, say

if TYPE_CHECKING:
    from agent_gateway_store.settings import StoreSettings
    from agent_gateway_store.store import GatewayStore

app = typer.Typer(
    name="notifications", no_args_is_help=True, help="List, send, redrive and prune the notices to notifiers."
)

NotifierOption = Annotated[str | None, typer.Option(help="Only those to this notifier.")]
_COLUMNS = {
    "delivery_id": "delivery id",
    "created_at": "written",
    "notifier": "notifier",
    "event": "event",
    "status": "status",
    "attempts": "tries",
    "last_error": "last error",
}


def silent(ctx: typer.Context) -> StoreSettings:
    """Return the settings of a store that sends nothing by itself."""
    return settings_of(ctx).model_copy(update={"notification_worker": False})


@app.command("list")
def list_deliveries(
    ctx: typer.Context,
    status: Annotated[str | None, typer.Option(help="DUE, DELIVERED or DEAD; default: all.")] = None,
    notifier: NotifierOption = None,
    approval: Annotated[UUID | None, typer.Option(help="Only those about this approval, by its id.")] = None,
    limit: Annotated[int, typer.Option(min=1, max=1000)] = 50,
    cursor: Annotated[str | None, typer.Option(help="Where the previous page ended.")] = None,
    json: JsonOption = False,
) -> None:
    """List notices, newest first, and count those that have not arrived."""
    from agent_gateway_store.models.delivery import DeliveryStatus

    wanted = None if status is None else choose(DeliveryStatus, status, "--status")

    async def work(store: GatewayStore) -> Any:
        page = await store.notifications.list(
            wanted, limit=limit, cursor=cursor, notifier=notifier, approval_id=approval
        )
        return page, await store.notifications.counts()

    page, counts = read_store(ctx, work, as_json=json, settings=silent(ctx))
    if json:
        print_json({"items": page.to_dicts(), "next_cursor": page.next_cursor, "notifiers": list(counts)})
        return
    print_page(page, columns=_COLUMNS, whole={"delivery_id", "status"}, optional={"created_at"}, as_json=False)
    for count in counts:
        if count["waiting"] or count["dead"]:
            where = "" if count["is_loaded"] else "; not loaded here, left to a process that has it"
            complain(f"{count['notifier']}: {count['waiting']} wait ({count['due']} due), {count['dead']} dead{where}")


@app.command("run")
def run_worker(
    ctx: typer.Context,
    once: Annotated[bool, typer.Option("--once", help="End as soon as nothing is due.")] = False,
) -> None:
    """Send what is due, until Ctrl-C or SIGTERM; any number of workers share the work.

    At the end it waits a few seconds at most for notices that are being sent; the rest is left to other workers.
    """

    async def work(store: GatewayStore) -> int:
        loaded = [row["notifier"] for row in await store.notifications.counts() if row["is_loaded"]]
        complain(f"Sending notices to: {', '.join(loaded) or 'nobody, for no notifier is loaded'}.")
        return await until_stopped(store.notifications.run(once=once))

    with logging_shown():
        arrived = in_store(ctx, work, settings=silent(ctx))
    if once:
        say(f"{arrived} notices arrived.")


@contextmanager
def logging_shown() -> Iterator[None]:
    """Show failures, and what the notifier `log` logs, on the worker's terminal."""
    root, notices = (logging.getLogger(f"agent_gateway_store{name}") for name in ("", ".notifications"))
    handler = logging.StreamHandler()
    root.addHandler(handler)
    level = notices.level
    notices.setLevel(logging.INFO)
    try:
        yield
    finally:
        root.removeHandler(handler)
        notices.setLevel(level)


async def until_stopped(work: Coroutine[Any, Any, int]) -> int:
    """Run what sends until it ends or a signal ends it; returns how much arrived, 0 after a signal."""
    import asyncio

    # What is cancelled ends in order: it waits for the attempts under way, and records them.
    loop = asyncio.get_running_loop()
    working = loop.create_task(work)
    for number in (signal.SIGINT, signal.SIGTERM):
        # Windows has no signal handlers in its event loop; there Ctrl-C interrupts the whole run.
        with suppress(NotImplementedError):
            loop.add_signal_handler(number, working.cancel)
    with suppress(asyncio.CancelledError):
        return await working
    return 0


@app.command()
def redrive(
    ctx: typer.Context,
    delivery_id: Annotated[
        UUID | None, typer.Argument(metavar="[DELIVERY_ID]", help="As `notifications list` shows it; default: all.")
    ] = None,
    notifier: NotifierOption = None,
    json: JsonOption = False,
) -> None:
    """Send dead letters again: one, or all."""

    async def work(store: GatewayStore) -> tuple[int, set[str]]:
        count = await store.notifications.redrive(delivery_id, notifier=notifier)
        return count, {each["notifier"] for each in await store.notifications.counts()}

    count, known = in_store(ctx, work, settings=silent(ctx))
    if notifier is not None and notifier not in known:
        there = ", ".join(sorted(known)) or "nobody"
        raise CommandError(f"There is no notifier {notifier!r}: notices go to {there}.", ExitCode.NOT_FOUND)
    if delivery_id is not None and count == 0:
        raise CommandError(
            "No dead letter has this id: see `gateway-store notifications list --status DEAD`.", ExitCode.NOT_FOUND
        )
    print_result({"redriven": count}, f"{count} dead letters are due again.", as_json=json)


@app.command()
def prune(
    ctx: typer.Context,
    older_than: Annotated[str, typer.Option(help="90s, 15m, 24h, 30d or 2w.")],
    json: JsonOption = False,
) -> None:
    """Delete the record of notices that arrived long ago; those that have not arrived stay."""
    age = duration(older_than, "--older-than")
    count = in_store(ctx, lambda store: store.notifications.prune(age), settings=silent(ctx))
    print_result({"pruned": count}, f"{count} records of delivered notices are deleted.", as_json=json)
