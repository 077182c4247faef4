"""What the tests of engines and sessions share: an empty database of each kind, and a transaction of statements."""

from __future__ import annotations

import socket
import socketserver
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from threading import Thread
from typing import Any

import asyncpg
import pytest
from sqlalchemy import make_url, text

from agent_gateway_store.storage.database import Database, SessionTransactions, create_engine


@pytest.fixture(params=["sqlite", "postgres"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """The URL of an empty database."""
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path}/test.db"
    made: str = request.getfixturevalue("postgres_database")()
    return made


def opened(url: str) -> Database:
    """A database that this event loop may use, to be closed by the test."""
    database = Database(create_engine(url), owned=True)
    database.bind_to_loop()
    return database


async def write(work: Database | SessionTransactions, *statements: str, error: Exception | None = None) -> None:
    async with work.write() as executor:
        for statement in statements:
            await executor.execute(text(statement))
        if error is not None:
            raise error


async def set_defaults(url: str, **settings: str) -> None:
    """Set what every later connection to the database of `url` begins with."""
    connection = await asyncpg.connect(url.replace("+asyncpg", ""))
    try:
        for name, value in settings.items():
            # DateStyle is a list, which quotes would make one word.
            given = value if name == "DateStyle" else f"'{value}'"
            await connection.execute(f'ALTER DATABASE "{url.rpartition("/")[2]}" SET {name} = {given}')
    finally:
        await connection.close()


class _Translation(socketserver.BaseRequestHandler):
    """Passes on what a client of PostgreSQL and its server say to each other, but for the server's errors in words."""

    def handle(self) -> None:
        with socket.create_connection(self.server.real) as server:  # type: ignore[attr-defined]
            # Else each answer of several messages waits for 40 ms.
            for end in (self.request, server):
                end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            Thread(target=self._pass_on, args=(server,), daemon=True).start()
            with server.makefile("rb") as messages, suppress(OSError):
                while head := messages.read(5):
                    body = messages.read(int.from_bytes(head[1:]) - 4)
                    if head[:1] == b"E":
                        # Message, detail and hint; and the severity, of which asyncpg has one in English, too.
                        fields = [
                            each[:1] + "Überraschung".encode() if each[:1] in b"SMDH" else each
                            for each in body.rstrip(b"\0").split(b"\0")
                        ]
                        body = b"\0".join(fields) + b"\0\0"
                    self.request.sendall(head[:1] + (len(body) + 4).to_bytes(4) + body)

    def _pass_on(self, server: socket.socket) -> None:
        with suppress(OSError):
            while data := self.request.recv(65_536):
                server.sendall(data)
            server.shutdown(socket.SHUT_WR)


@contextmanager
def translated(url: str) -> Iterator[str]:
    """Give the URL of the same database with a server whose errors are in no language that anybody expects."""
    made = make_url(url)
    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), _Translation) as server:
        server.daemon_threads = True
        server.real: Any = (made.host, made.port)  # type: ignore[attr-defined]
        Thread(target=server.serve_forever, daemon=True).start()
        there = made.set(port=server.server_address[1], query={"sslmode": "disable"})
        yield there.render_as_string(hide_password=False)
        server.shutdown()
