"""TLS of the webhook: the name is asked for and checked, by certificates that are trusted."""

from __future__ import annotations

import ssl
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from datetime import UTC, datetime, timedelta
from ipaddress import ip_address
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from notifier_helpers import OK, Server, running
from webhook_helpers import notifier_for as named

from agent_gateway_store.errors import NotDeliveredError
from agent_gateway_store.plugins.webhook import WebhookNotifier
from agent_gateway_store.testing import make_notice

pytestmark = pytest.mark.unit

NAME = "hooks.example"

Serve = Callable[..., AbstractAsyncContextManager[tuple[Server, list[str | None]]]]


@pytest.fixture
def ca_file(tmp_path: Path) -> Path:
    return tmp_path / "certificate.pem"


@pytest.fixture
def serve(ca_file: Path) -> Serve:
    """Run a server with a certificate for `name`, written to `ca_file`; tell which names it was asked for."""

    @asynccontextmanager
    async def run(name: str = NAME, *, age: timedelta = timedelta(0)) -> AsyncIterator[tuple[Server, list[str | None]]]:
        key = ec.generate_private_key(ec.SECP256R1())
        ca_file.write_bytes(certificate(name, key, age))
        (key_file := ca_file.with_name("key.pem")).write_bytes(
            key.private_bytes(
                serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
            )
        )
        asked: list[str | None] = []
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(ca_file, key_file)
        context.sni_callback = lambda _socket, wanted, _context: asked.append(wanted)
        async with running(Server([OK]), context=context) as server:
            yield server, asked

    return run


def certificate(name: str, key: ec.EllipticCurvePrivateKey, age: timedelta) -> bytes:
    """A self-signed certificate of a day."""
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    start = datetime.now(UTC) - timedelta(hours=1) - age
    try:
        alternative: x509.GeneralName = x509.IPAddress(ip_address(name))
    except ValueError:
        alternative = x509.DNSName(name)
    builder = x509.CertificateBuilder(subject, subject, key.public_key(), x509.random_serial_number())
    builder = builder.not_valid_before(start).not_valid_after(start + timedelta(days=1))
    builder = builder.add_extension(x509.SubjectAlternativeName([alternative]), critical=False)
    builder = builder.add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
    return builder.sign(key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)


def notifier_for(server: Server, **fields: Any) -> WebhookNotifier:
    """A notifier for which the name is 127.0.0.1."""
    return named(f"https://{NAME}:{server.port}/hook", answers=[["127.0.0.1"]], allow_private=True, **fields)


async def test_trusted_certificate_of_the_name(serve: Serve, ca_file: Path) -> None:
    """Delivered; the server was asked for the name, though the connection went to an address."""
    async with serve() as (server, asked):
        await notifier_for(server, ca_file=str(ca_file)).notify_pending(make_notice())

    assert asked == [NAME]
    assert server.requests[0].headers["host"] == f"{NAME}:{server.port}"


@pytest.mark.parametrize(
    ("name", "days", "trusts", "why"),
    [
        (NAME, 0, None, rf"{NAME} is not to be trusted \(self.signed .*CA_FILE"),
        (NAME, 0, "other.pem", "is not to be trusted"),
        (NAME, 7, "certificate.pem", "certificate has expired"),
        *((name, 0, "certificate.pem", "is not to be trusted") for name in ("other.example", "example", "127.0.0.1")),
    ],
)
async def test_a_certificate_that_is_not_trusted(
    serve: Serve, tmp_path: Path, name: str, days: int, trusts: str | None, why: str
) -> None:
    """Nobody vouches for it, another CA_FILE is set, it is of last week or of another name: nothing is sent."""
    other = certificate(NAME, ec.generate_private_key(ec.SECP256R1()), timedelta(0))
    (tmp_path / "other.pem").write_bytes(other)
    async with serve(name, age=timedelta(days=days)) as (server, _):
        notifier = notifier_for(server, ca_file=trusts and str(tmp_path / trusts))
        with pytest.raises(NotDeliveredError, match=why):
            await notifier.notify_pending(make_notice())

    assert server.requests == []


@pytest.mark.parametrize("content", [None, b"", b"no certificate"])
async def test_ca_file_that_cannot_be_read(tmp_path: Path, content: bytes | None) -> None:
    """The setting is named, not the receiver; put right, it works without a new start."""
    path = tmp_path / "planted-ca.pem"
    if content is not None:
        path.write_bytes(content)
    notifier = named("https://127.0.0.1:9/hook", allow_private=True, ca_file=str(path))
    with pytest.raises(NotDeliveredError, match="CA_FILE cannot be read") as caught:
        await notifier.notify_pending(make_notice())
    path.write_bytes(certificate(NAME, ec.generate_private_key(ec.SECP256R1()), timedelta(0)))
    with pytest.raises(NotDeliveredError, match="gave no answer"):
        await notifier.notify_pending(make_notice())

    assert not caught.value.is_permanent
    assert "planted-ca" not in str(caught.value)
