"""Decisions about notices, and real TCP servers that answer as a test says."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from ssl import SSLContext
from typing import Any, TypeVar
from uuid import uuid4

from agent_gateway_store.models.values import ApprovalStatus, Notice
from agent_gateway_store.plugins.apprise import AppriseNotifier, AppriseSettings

PASSWORD = "planted-password"
OK = b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n"


def decided(notice: Notice, **fields: Any) -> Notice:
    """The decision about the same approval."""
    values = {"event": "decision", "delivery_id": uuid4(), "status": ApprovalStatus.DENIED, "approver_id": "ann"}
    values |= {"note": "no", "decided_at": datetime.now(UTC)}
    return Notice.model_validate(notice.model_dump() | values | fields)


def apprise_notifier(*ports: int) -> AppriseNotifier:
    """A notifier that posts JSON to ports of this machine, by Apprise's own plugin for that."""
    urls: list[Any] = [f"json://user:{PASSWORD}@127.0.0.1:{port}/path" for port in ports]
    return AppriseNotifier(AppriseSettings(urls=urls))


@dataclass
class Request:
    """What a server was sent."""

    line: str
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)


Respond = Callable[[asyncio.StreamWriter], Awaitable[None]]


@dataclass
class Server:
    """A server on 127.0.0.1. `answers` are used up one by one; the last stays.

    Attributes:
        port: Where it listens.
        connections: How many connections it has accepted.
        requests: What it was sent.
    """

    answers: list[bytes | Respond]
    port: int = 0
    connections: int = 0
    requests: list[Request] = field(default_factory=list)
    handling: set[asyncio.Task[Any]] = field(default_factory=set)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/hook?key=in-the-url"

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        task = asyncio.current_task()
        assert task is not None
        self.handling.add(task)
        try:
            while (request := await read_request(reader)) is not None:
                self.requests.append(request)
                if not await self.respond(request, writer):
                    return
        except (ConnectionError, asyncio.IncompleteReadError, asyncio.CancelledError):
            pass
        finally:
            self.handling.discard(task)
            writer.transport.abort()

    async def respond(self, request: Request, writer: asyncio.StreamWriter) -> bool:
        """Answer one request. Returns False to end the connection."""
        answer = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        if isinstance(answer, bytes):
            writer.write(answer)
            await writer.drain()
        else:
            await answer(writer)
        return True


S = TypeVar("S", bound=Server)


async def read_request(reader: asyncio.StreamReader) -> Request | None:
    """Read one HTTP request with a Content-Length; None at the end."""
    head = await reader.readuntil(b"\r\n\r\n") if not reader.at_eof() else b""
    if not head:
        return None
    line, *fields = head.decode("latin-1").split("\r\n")[:-2]
    headers = {name.lower(): value for name, _, value in (each.partition(": ") for each in fields)}
    return Request(line, headers, await reader.readexactly(int(headers.get("content-length", "0"))))


def serving(*answers: bytes | Respond) -> AbstractAsyncContextManager[Server]:
    """Run a server that answers so."""
    return running(Server(list(answers)))


@asynccontextmanager
async def running(server: S, *, context: SSLContext | None = None) -> AsyncIterator[S]:
    """Run a server, by TLS if there is a context for it."""
    listener = await asyncio.start_server(server.serve, "127.0.0.1", 0, ssl=context)
    server.port = listener.sockets[0].getsockname()[1]
    try:
        yield server
    finally:
        listener.close()
        for task in list(server.handling):
            task.cancel()
        await asyncio.sleep(0)


def status(line: str, *headers: str, body: bytes = b"") -> bytes:
    """An HTTP answer."""
    fields = "".join(f"{header}\r\n" for header in (*headers, f"Content-Length: {len(body)}"))
    return f"HTTP/1.1 {line}\r\n{fields}\r\n".encode() + body
