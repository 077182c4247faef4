"""Sending notices beside bare httpx, and what the outbox and bad plugins cost whoever asks for an approval."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import multiprocessing
import os
import statistics
import threading
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from typing import Any

import httpx

from agent_gateway_store import GatewayStore, Notice, StoreSettings, hookimpl
from agent_gateway_store._concurrency import BackgroundTasks
from agent_gateway_store.approval import ApprovalBackend, ApprovalManager
from agent_gateway_store.hooks.dispatch import Dispatcher
from agent_gateway_store.hooks.manager import Plugins
from agent_gateway_store.store import parts_of
from benchmarks.approvals import CALLERS, ask, rate
from benchmarks.report import Figure

CONCURRENCY = 16
PAUSE_S, PACE_S = 0.005, 0.05
TURNS = 5
_ANSWER = b"HTTP/1.1 204 No Content\r\n\r\n"


async def _answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
        while True:
            head = await reader.readuntil(b"\r\n\r\n")
            fields = dict(line.split(b": ", 1) for line in head.lower().split(b"\r\n")[1:] if b": " in line)
            await reader.readexactly(int(fields[b"content-length"]))
            writer.write(_ANSWER)


def _serve(port: Any) -> None:
    async def serve() -> None:
        server = await asyncio.start_server(_answer, "127.0.0.1", 0)
        port.send(server.sockets[0].getsockname()[1])
        await server.serve_forever()

    asyncio.run(serve())


@contextmanager
def http_server() -> Iterator[str]:
    """A server in a process of its own that takes every POST."""
    receiving, sending = multiprocessing.Pipe(duplex=False)
    process = multiprocessing.get_context("spawn").Process(target=_serve, args=(sending,), daemon=True)
    process.start()
    try:
        yield f"http://127.0.0.1:{receiving.recv()}/"
    finally:
        process.terminate()
        process.join()


class Posting:
    """Posts notices as JSON."""

    name = "posting"

    def __init__(self, url: str) -> None:
        self._url = url
        self._client: httpx.AsyncClient | None = None

    async def notify_pending(self, notice: Notice) -> None:
        """Post it."""
        if self._client is None:
            self._client = httpx.AsyncClient(trust_env=False)
        body = notice.model_dump_json()
        (await self._client.post(self._url, content=body)).raise_for_status()

    async def notify_decision(self, notice: Notice) -> None:
        """Post it."""
        await self.notify_pending(notice)


class Taking:
    """Takes everything.

    Attributes:
        taken: How many approvals it was asked for.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.taken = 0

    async def notify_pending(self, notice: Notice) -> None:
        """Take it."""
        self.taken += 1

    async def has_taken(self, count: int) -> None:
        """Wait until it has taken that many; it runs in another thread, so there is nothing else to wait for."""
        while self.taken < count:
            await asyncio.sleep(0.001)

    async def notify_decision(self, notice: Notice) -> None:
        """Take it."""


class Raising(Taking):
    """Takes nothing."""

    async def notify_pending(self, notice: Notice) -> None:
        """Fail."""
        raise OSError("nobody there")


class Hanging(Taking):
    """Does not come back."""

    async def notify_pending(self, notice: Notice) -> None:
        """Hang."""
        await asyncio.sleep(3600)


class Blocking(Taking):
    """Blocks its thread."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.done = threading.Event()

    async def notify_pending(self, notice: Notice) -> None:
        """Block."""
        self.done.wait(3600)


class Garbage:
    """A plugin that offers no notifier, but something else."""

    @hookimpl
    def gateway_store_register_notifiers(self) -> Any:
        """Offer it."""
        return ["nonsense", 7, object()]


class Broken:
    """A plugin that fails when it is asked."""

    @hookimpl
    def gateway_store_register_notifiers(self) -> Any:
        """Fail."""
        raise ImportError("no module named nowhere")


def twenty() -> list[object]:
    """Twenty plugins: three are good, two have a name that is taken, all others are bad in one way or another."""
    kinds: list[type[Taking]] = [Raising, Hanging, Blocking, Taking]
    notifiers = [kind(f"{kind.__name__}-{number}") for kind in kinds for number in range(3)]
    return [
        *notifiers,
        Taking("Taking-0"),
        Taking("Raising-0"),
        *(Garbage() for _ in range(3)),
        *(Broken() for _ in range(3)),
    ]


@asynccontextmanager
async def opened(url: str, plugins: Sequence[object] = (), **fields: Any) -> AsyncIterator[GatewayStore]:
    """Open a store with an empty outbox and no installed plugin."""
    os.environ["AGENT_GATEWAY_STORE_LOAD_PLUGINS"] = ""
    try:
        store = GatewayStore(url, redis_url="", settings=StoreSettings(**fields), plugins=plugins, auto_migrate=True)
        async with store:
            async with store.database.write() as connection:
                await connection.exec_driver_sql("TRUNCATE notification_deliveries")
            yield store
    finally:
        del os.environ["AGENT_GATEWAY_STORE_LOAD_PLUGINS"]


async def measure(url: str, *, repeat: int, scale: float) -> list[Figure]:
    """Measure on PostgreSQL, in turn with the limits."""
    sent = Figure(f"deliveries by one worker, {CONCURRENCY} at once", "notices/s", "bare httpx, same concurrency", 0.6)
    outbox = Figure(
        "issue_token with the outbox, median", "ms", "notifier called directly, no outbox", 1.25, more_is_better=False
    )
    busy = Figure(
        f"issue and deliver with the outbox, {CALLERS} callers",
        "ms",
        "notifier called directly, no outbox",
        1.25,
        more_is_better=False,
    )
    bad = Figure("issue_token with 20 plugins, median", "ms", "no plugin", 1.2, more_is_better=False)
    logging.getLogger("agent_gateway_store.hooks").setLevel(logging.CRITICAL)
    with http_server() as server:
        for _ in range(repeat):
            await _sending(url, server, sent, int(3_000 * scale))
    for _ in range(repeat):
        await _outbox(url, outbox, busy, int(600 * scale))
        await _plugins(url, bad, int(200 * scale))
    return [sent, outbox, busy, bad]


async def _sending(url: str, server: str, figure: Figure, count: int) -> None:
    settings = {"notification_worker": False, "notification_concurrency": CONCURRENCY}
    async with opened(url, [Posting(server)], **settings) as store:
        await rate(store.approvals.issue_token, [ask() for _ in range(count)], CALLERS)
        start = time.perf_counter()
        assert await store.notifications.run(once=True) == count
        figure.ours.append(count / (time.perf_counter() - start))
        body = Notice.model_validate((await store.notifications.list(limit=1))[0].payload).model_dump_json()
    async with httpx.AsyncClient(trust_env=False) as client:

        async def post(content: str) -> None:
            (await client.post(server, content=content)).raise_for_status()

        figure.limit.append(await rate(post, [body] * count, CONCURRENCY))
    figure.facts = {"notices": count, "at once": CONCURRENCY}


class Direct:
    """Calls the notifiers after the commit, without a row."""

    notifiers = ()
    lease_s = None

    def __init__(self, dispatcher: Dispatcher) -> None:
        self._dispatcher = dispatcher
        self._calls = BackgroundTasks()

    def send(self, notice: Notice, leased: object) -> None:
        """Call them in the background."""
        self._calls.start(self._dispatcher.deliver_all(notice))

    async def idle(self) -> None:
        """Wait until all have returned."""
        while self._calls:
            await self._calls.join()


async def _outbox(url: str, lone: Figure, busy: Figure, count: int) -> None:
    ours, other = Taking("taking"), Taking("taking")
    async with opened(url, [ours]) as store:
        dispatcher = Dispatcher(Plugins([other]), store.settings)
        await dispatcher.open()
        outbox = Direct(dispatcher)
        direct = ApprovalManager(ApprovalBackend(store.database, parts_of(store).redis, store.settings, outbox))
        await _delivered_ms(direct, 10 * CALLERS, other)  # opens the connections that both use
        # In turn, for another process may have the disk for a while.
        taken = [(await _ask_ms(store.approvals), await _ask_ms(direct)) for _ in range(count)]
        for samples, part in ((lone.ours, 0), (lone.limit, 1)):
            samples.append(statistics.median(each[part] for each in taken))
        await parts_of(store).outbox.worker.join()
        await outbox.idle()
        delivered = [
            (await _delivered_ms(store.approvals, count, ours), await _delivered_ms(direct, count, other))
            for _ in range(3)
        ]
        busy.ours.append(statistics.median(ours for ours, _ in delivered))
        busy.limit.append(statistics.median(limit for _, limit in delivered))
        await dispatcher.aclose()
    lone.facts = {"approvals": count, "seconds between": PAUSE_S}
    busy.facts = {"approvals": count, "callers": CALLERS}


async def _delivered_ms(approvals: ApprovalManager, count: int, notifier: Taking) -> float:
    """Return the time one approval takes until its notifier has it, where many callers ask at once, in ms."""
    before = notifier.taken
    asked = [ask() for _ in range(count)]
    start = time.perf_counter()
    await rate(approvals.issue_token, asked, CALLERS)
    await notifier.has_taken(before + count)
    return (time.perf_counter() - start) / count * 1000


async def _plugins(url: str, figure: Figure, count: int) -> None:
    """In turns, for another process may have the disk for a while."""
    with_plugins, without = list[float](), list[float]()
    for _ in range(TURNS):
        plugins = twenty()
        async with opened(url, plugins, plugin_timeout_seconds=1) as store:
            names = parts_of(store).outbox.notifiers
            with_plugins += [await _ask_ms(store.approvals, PACE_S) for _ in range(count // TURNS)]
            for plugin in plugins:
                if isinstance(plugin, Blocking):
                    plugin.done.set()
        async with opened(url) as store:
            without += [await _ask_ms(store.approvals, PACE_S) for _ in range(count // TURNS)]
    figure.ours.append(statistics.median(with_plugins))
    figure.limit.append(statistics.median(without))
    figure.facts = {"approvals": count, "seconds between": PACE_S, "notifiers among them": len(names)}


async def _ask_ms(approvals: ApprovalManager, pause_s: float = PAUSE_S) -> float:
    """Return the time of one `issue_token`, in ms, and pause after it."""
    request = ask()
    start = time.perf_counter()
    await approvals.issue_token(request)
    taken = time.perf_counter() - start
    await asyncio.sleep(pause_s)
    return taken * 1000
