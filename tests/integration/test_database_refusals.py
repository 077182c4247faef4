"""Databases that let nobody in, or could not hold what is written: each reason has its sentence, with the next step."""

from __future__ import annotations

import asyncio
import os
import re
import shutil
import ssl
import subprocess
import tempfile
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
from sqlalchemy import make_url

import servers
from agent_gateway_store import GatewayStore, WriteOutcome
from agent_gateway_store.errors import StoreUnavailableError, UnsupportedDatabaseError
from agent_gateway_store.storage import migrate
from agent_gateway_store.storage.database import create_engine
from builders import make_event
from commands import gateway_store
from proofs.harness import execute
from servers import PostgresServer

_HBA = """
local all all      trust
host  all tls_only all reject
host  all password all scram-sha-256
host  all postgres,unknown,no_login all trust
"""
_ROLES = """
CREATE ROLE tls_only LOGIN; CREATE ROLE no_login;
CREATE ROLE password LOGIN PASSWORD 'right';
"""


def _openssl(*arguments: str, folder: Path) -> None:
    subprocess.run(["openssl", *arguments], cwd=folder, check=True, capture_output=True)


def _certificate(folder: Path, name: str, *, ca: str, subject: str, days: int = 2) -> None:
    """Write `name`.crt and `name`.key, signed by the authority `ca`."""
    extension = folder / f"{name}.ext"
    extension.write_text("subjectAltName=DNS:localhost\n")
    request = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-subj", f"/CN={subject}"]
    _openssl("req", *request, "-keyout", f"{name}.key", "-out", f"{name}.csr", folder=folder)
    signed = ["-CA", f"{ca}.crt", "-CAkey", f"{ca}.key", "-CAcreateserial", "-extfile", str(extension)]
    _openssl("x509", "-req", "-in", f"{name}.csr", "-days", str(days), "-out", f"{name}.crt", *signed, folder=folder)


@pytest.fixture(scope="module")
def certificates() -> Iterator[Path]:
    """A folder with two authorities, a server's certificate for `localhost`, and a client's of each."""
    folder = Path(tempfile.mkdtemp(prefix="ags-tls-", dir="/tmp" if os.geteuid() == 0 else None))
    folder.chmod(0o755)
    try:
        for ca in ("ours", "other"):
            made = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-subj", f"/CN={ca}"]
            _openssl("req", "-x509", *made, "-days", "2", "-keyout", f"{ca}.key", "-out", f"{ca}.crt", folder=folder)
        _certificate(folder, "server", ca="ours", subject="localhost")
        _certificate(folder, "client", ca="ours", subject="client")
        _certificate(folder, "stranger", ca="other", subject="client")
        _certificate(folder, "expired", ca="ours", subject="localhost", days=-1)
        (folder / "hba").write_text(_HBA)
        (folder / "hba").chmod(0o644)
        yield folder
    finally:
        shutil.rmtree(folder)


@pytest.fixture(scope="module")
def server(certificates: Path) -> Iterator[PostgresServer]:
    """A server that asks one role for a password and lets another one nowhere in."""
    with PostgresServer(settings={"hba_file": f"{certificates}/hba"}) as started:
        servers.run(execute(started.url, _ROLES))
        yield started


@asynccontextmanager
async def tls_front(server: PostgresServer, folder: Path, name: str = "server", *, asks: bool) -> AsyncIterator[int]:
    """Give the port of a TLS front before a server: the one of the wheel was built without TLS."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(folder / f"{name}.crt", folder / f"{name}.key")
    if asks:
        context.load_verify_locations(folder / "ours.crt")
        context.verify_mode = ssl.CERT_REQUIRED

    async def pipe(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(OSError):
            while data := await reader.read(65_536):
                writer.write(data)
                await writer.drain()
        writer.close()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        # The eight bytes of an SSLRequest.
        await reader.readexactly(8)
        writer.write(b"S")
        try:
            await writer.start_tls(context)
        except OSError:
            writer.close()
            return
        to_reader, to_writer = await asyncio.open_connection("127.0.0.1", server.port)
        await asyncio.gather(pipe(reader, to_writer), pipe(to_reader, writer))

    async with await asyncio.start_server(serve, "127.0.0.1", 0) as front:
        yield front.sockets[0].getsockname()[1]


FULL = "sslmode=verify-full&sslrootcert={0}/ours.crt"


@pytest.mark.parametrize(
    ("host", "query", "options", "sentence"),
    [
        ("localhost", FULL, {}, None),
        ("localhost", f"{FULL}&sslcert={{0}}/client.crt&sslkey={{0}}/client.key", {"asks": True}, None),
        ("localhost", "sslmode=verify-full&sslrootcert={0}/other.crt", {}, "authority that is not trusted"),
        ("127.0.0.1", "sslmode=verify-ca&sslrootcert={0}/other.crt", {}, "authority that is not trusted"),
        ("127.0.0.1", FULL, {}, "certificate is for another name"),
        ("localhost", FULL, {"name": "expired"}, "not valid at this time"),
        ("localhost", "sslmode=verify-full", {}, "no root certificate is known .* add sslrootcert="),
    ],
)
async def test_each_mistake_with_certificates_has_its_sentence(
    server: PostgresServer,
    certificates: Path,
    monkeypatch: pytest.MonkeyPatch,
    host: str,
    query: str,
    options: dict[str, Any],
    sentence: str | None,
) -> None:
    """A wrong authority, another name, an end that has passed, none to check with, and ours missing or not trusted."""
    monkeypatch.setenv("HOME", str(certificates))
    async with tls_front(server, certificates, **{"asks": False, **options}) as port:
        engine = create_engine(f"postgresql://postgres@{host}:{port}/postgres?{query.format(certificates)}")
        try:
            if sentence is None:
                assert await migrate.current(engine) is None
            else:
                with pytest.raises(StoreUnavailableError, match=sentence):
                    await migrate.upgrade(engine)
        finally:
            await engine.dispose()


@pytest.mark.parametrize(
    ("address", "sentence"),
    [
        ("tls_only@localhost/postgres", "only with TLS|pg_hba.conf lets nobody in"),
        ("nobody_s@localhost/postgres", "only with TLS|pg_hba.conf lets nobody in"),
        ("password:hunter2@localhost/postgres", "refuses the password: check DATABASE_URL"),
        ("unknown@localhost/postgres", "refuses the user: create the role"),
        ("no_login@localhost/postgres", "refuses the user: create the role"),
        ("postgres@localhost/missing", "the database does not exist: create it"),
        ("postgres@no-such-host.invalid/postgres", "server's name is not known here"),
    ],
)
def test_each_mistake_in_the_url_has_its_sentence(server: PostgresServer, address: str, sentence: str) -> None:
    url = re.sub(r"(@[^/]+)/", rf"\1:{server.port}/", f"postgresql://{address}", count=1)
    ended = gateway_store("--database-url", url, "db", "upgrade")

    assert ended.code == 5
    assert re.search(sentence, " ".join(ended.err.split())), ended.err
    assert "Traceback" not in ended.err
    assert "hunter2" not in ended.said


@pytest.mark.parametrize(
    ("answer", "sentence"),
    [
        ("connection requires a valid client certificate", "asks for a client certificate: add sslcert= and sslkey="),
        ('no pg_hba.conf entry for host "::1", user "u", database "d", no encryption', "takes this user only with TLS"),
        ('no pg_hba.conf entry for host "::1", user "u", database "d", SSL on', "pg_hba.conf lets nobody in like this"),
    ],
)
async def test_what_only_a_server_with_tls_answers(answer: str, sentence: str) -> None:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read(1_024)
        fields = b"SFATAL\0VFATAL\0C28000\0M" + answer.encode() + b"\0\0"
        writer.write(b"E" + (len(fields) + 4).to_bytes(4) + fields)
        await writer.drain()
        writer.close()

    async with await asyncio.start_server(serve, "127.0.0.1", 0) as front:
        port = front.sockets[0].getsockname()[1]
        engine = create_engine(f"postgresql://u@127.0.0.1:{port}/d?sslmode=disable")
        with pytest.raises(StoreUnavailableError, match=sentence):
            await migrate.upgrade(engine)
        await engine.dispose()


async def test_a_server_without_tls(postgres_url: str) -> None:
    engine = create_engine(postgres_url + "?sslmode=require")
    with pytest.raises(StoreUnavailableError, match="the server has no TLS"):
        await migrate.upgrade(engine)
    await engine.dispose()


@pytest.fixture
def encoded_url(postgres_url: str) -> Iterator[str]:
    """A database in an encoding that cannot hold every text."""
    name = f"test_{uuid4().hex}"
    create = f"CREATE DATABASE {name} ENCODING 'SQL_ASCII' LOCALE 'C' TEMPLATE template0"
    servers.run(execute(postgres_url, create))
    yield make_url(postgres_url).set(database=name).render_as_string(hide_password=False)
    servers.run(execute(postgres_url, f"DROP DATABASE {name} WITH (FORCE)"))


@pytest.mark.system
async def test_a_database_that_cannot_hold_every_text_is_refused(
    encoded_url: str, postgres_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By `db upgrade`, `open` and `doctor`, also where its schema is current; the command that is named makes one."""
    refused = await asyncio.to_thread(gateway_store, "--database-url", encoded_url, "db", "upgrade")
    monkeypatch.setattr(migrate, "check_server", lambda _engine: _nothing())
    engine = create_engine(encoded_url)
    await migrate.upgrade(engine)
    await engine.dispose()
    monkeypatch.undo()
    with pytest.raises(UnsupportedDatabaseError, match="cannot hold every text") as raised:
        await GatewayStore(encoded_url, redis_url="").open()
    doctor = await asyncio.to_thread(gateway_store, "--database-url", encoded_url, "doctor", "--json")
    command = re.search(r"`(CREATE DATABASE [^`]+)`", str(raised.value))
    assert command is not None
    await execute(postgres_url, command[1])
    name = command[1].split()[2]
    made = make_url(postgres_url).set(database=name).render_as_string(hide_password=False)
    async with GatewayStore(made, redis_url="", auto_migrate=True) as store:
        outcome = await store.audit.write(make_event(tool_name="\N{GRINNING FACE}"))
    await execute(postgres_url, f"DROP DATABASE {name} WITH (FORCE)")

    assert "CREATE DATABASE" in " ".join(refused.err.split()), refused
    assert doctor.code == 1
    assert doctor.json["database"]["encoding"] == raised.value.encoding
    assert any("CREATE DATABASE" in problem for problem in doctor.json["problems"])
    assert outcome is WriteOutcome.STORED


async def _nothing() -> None: ...


@pytest.fixture
def role(postgres_url: str) -> str:
    name = f"gateway_{uuid4().hex}"
    servers.run(execute(postgres_url, f"CREATE ROLE {name} LOGIN PASSWORD 'secret'"))
    return name


async def test_what_a_role_may_not_do_is_said_with_the_grant(postgres_database: Callable[[], str], role: str) -> None:
    """No CREATE, no schema, not the owner: three sentences; after each step that is named the next one is reached."""
    admin = postgres_database()
    url = make_url(admin).set(username=role, password="secret").render_as_string(hide_password=False)
    engine = create_engine(url)
    try:
        with pytest.raises(StoreUnavailableError, match="GRANT USAGE, CREATE ON SCHEMA") as raised:
            await migrate.upgrade(engine)
        grant = re.search(r"`(GRANT [^`]+)`", str(raised.value))
        assert grant is not None
        await execute(admin, grant[1], f"ALTER ROLE {role} SET search_path = nowhere")
        await engine.dispose()
        with pytest.raises(StoreUnavailableError, match="no schema of the role's search_path exists"):
            await migrate.upgrade(engine)
        await execute(admin, f"ALTER ROLE {role} RESET search_path")
        await engine.dispose()
        owner = create_engine(admin)
        await migrate.upgrade(owner, "0003_due_by_notifier")
        await owner.dispose()
        await execute(admin, f"GRANT ALL ON ALL TABLES IN SCHEMA public TO {role}")
        with pytest.raises(StoreUnavailableError, match="only the owner of our tables may change them"):
            await migrate.upgrade(engine)
    finally:
        await engine.dispose()
        await execute(admin, f"DROP OWNED BY {role}", f"DROP ROLE {role}")


async def test_tables_are_not_spread_over_two_schemas(postgres_database: Callable[[], str]) -> None:
    """A schema of the role's name that is made later comes first in its search_path, and in that of no other role."""
    url = postgres_database()
    name = make_url(url).database
    engine = create_engine(url)
    try:
        await migrate.upgrade(engine, "0003_due_by_notifier")
        # As `"$user"` does for a role.
        await execute(url, "CREATE SCHEMA first", f'ALTER DATABASE "{name}" SET search_path = first, public')
        await engine.dispose()
        with pytest.raises(StoreUnavailableError, match=r"tables are in the schema public.*would come into first"):
            await migrate.upgrade(engine)
        await execute(url, f'ALTER DATABASE "{name}" RESET search_path')
        await engine.dispose()
        await migrate.upgrade(engine)
        await execute(url, f'ALTER DATABASE "{name}" SET search_path = first, public')
        await engine.dispose()
        await migrate.upgrade(engine)
        assert await migrate.differences(engine) == []
    finally:
        await engine.dispose()
