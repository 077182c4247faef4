"""The notifier `webhook` against real sockets: the right action for every answer, also of a hostile receiver."""

from __future__ import annotations

import asyncio
import logging
import socket
import struct
import time
import tracemalloc
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime

import pytest
from notifier_helpers import OK, serving, status
from webhook_helpers import notifier_for

from agent_gateway_store.errors import NotDeliveredError
from agent_gateway_store.plugins._http import retry_after_s
from agent_gateway_store.plugins.webhook import WebhookNotifier
from agent_gateway_store.testing import make_notice

pytestmark = pytest.mark.unit


async def refusal(notifier: WebhookNotifier, match: str | None = None) -> NotDeliveredError:
    """Have a notice sent that does not arrive; return why."""
    with pytest.raises(NotDeliveredError, match=match) as caught:
        await notifier.notify_pending(make_notice())
    return caught.value


class TestAnswers:
    async def test_2xx_is_delivered(self) -> None:
        lines = ("200 OK", "201 Created", "202 Accepted", "204 No Content", "299 Odd")
        async with serving(*map(status, lines)) as server:
            for _ in lines:
                await notifier_for(server).notify_pending(make_notice())

        assert len(server.requests) == len(lines)

    async def test_answer_that_was_there_before_the_request_is_none(self) -> None:
        """What a receiver sends behind an answer acknowledges no later notice; that one is sent again."""
        async with serving(b"HTTP/1.1 204 No Content\r\n\r\n" + OK, OK) as server:
            notifier = notifier_for(server)
            await notifier.notify_pending(make_notice())
            await refusal(notifier, "before it was asked")
            await notifier.notify_pending(make_notice())

        assert server.connections == 2

    async def test_redirect_is_a_failure_and_not_followed(self) -> None:
        lines = ("301 Moved", "302 Found", "303 See Other", "307 Temporary", "308 Permanent")
        async with serving(OK) as other, serving(*(status(line, f"Location: {other.url}") for line in lines)) as server:
            refusals = [await refusal(notifier_for(server), "redirects are not followed") for _ in lines]

        assert (len(server.requests), other.connections) == (len(lines), 0)
        assert not any(each.is_permanent for each in refusals)

    async def test_410_ends_it(self, caplog: pytest.LogCaptureFixture) -> None:
        """The notice is given up, the log says so, and nothing more is sent."""
        async with serving(status("410 Gone"), OK) as server:
            notifier = notifier_for(server)
            with caplog.at_level(logging.WARNING):
                refusals = [await refusal(notifier) for _ in range(2)]

        assert all(each.is_permanent for each in refusals)
        assert len(server.requests) == 1
        assert "410 Gone" in caplog.text
        assert "in-the-url" not in caplog.text

    @pytest.mark.parametrize("line", ["429 Too Many Requests", "503 Unavailable", "502 Bad Gateway", "504 Timeout"])
    async def test_retry_after_is_honoured(self, line: str) -> None:
        date = format_datetime(datetime.now(UTC) + timedelta(seconds=90), usegmt=True)
        async with serving(status(line, "Retry-After: 17"), status(line, f"Retry-After: {date}")) as server:
            seconds, moment = [await refusal(notifier_for(server)) for _ in range(2)]

        assert seconds.retry_after_s == 17
        assert 80 < (moment.retry_after_s or 0) <= 90

    @pytest.mark.parametrize(("line", "sent"), [("429 Too Many Requests", 2), ("503 Unavailable", 2), ("502 Bad", 3)])
    async def test_a_receiver_that_asks_for_it_is_left_alone(
        self, line: str, sent: int, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """429 and 503 speak for all notices; and a minute at most, then one is tried again."""
        async with serving(status(line, "Retry-After: 3000")) as server:
            notifier = notifier_for(server)
            for _ in range(2):
                assert (await refusal(notifier)).retry_after_s is not None
            now = time.monotonic()
            monkeypatch.setattr("agent_gateway_store.plugins._http.transport.time.monotonic", lambda: now + 61)
            await refusal(notifier)
            monkeypatch.undo()

        assert len(server.requests) == sent

    async def test_other_failures_are_tried_again(self) -> None:
        """They can be put right at the other end while the notice waits."""
        codes = (400, 401, 403, 404, 405, 409, 413, 500, 599)
        async with serving(*(status(f"{code} No", body=b"secret words of the receiver") for code in codes)) as server:
            for code in codes:
                caught = await refusal(notifier_for(server), f"answered {code}")
                assert (caught.is_permanent, caught.retry_after_s) == (False, None)
                assert "secret words" not in str(caught)

    def test_retry_after_is_read_with_care(self) -> None:
        """Nonsense is none, the past is now, and nobody is put off for more than a day."""
        for header in (None, "", "soon", "-5", "1.5", "٣", "Fri, 99 Dec 2026 23:59:59 GMT"):
            assert retry_after_s(header) is None
        for header, seconds in (("0", 0), ("120", 120), ("9" * 5000, 86_400)):
            assert retry_after_s(header) == seconds
        for year, seconds in ((2015, 0), (9999, 86_400)):
            assert retry_after_s(f"Wed, 21 Oct {year} 07:28:00 GMT") == seconds


class TestBadServers:
    async def test_reset(self) -> None:
        async def reset(writer: asyncio.StreamWriter) -> None:
            linger = struct.pack("ii", 1, 0)
            writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
            writer.transport.abort()
            raise ConnectionResetError

        async with serving(reset) as server:
            await refusal(notifier_for(server), "gave no answer")

    async def test_no_http(self) -> None:
        for answer in (b"SSH-2.0-OpenSSH\r\n\r\n", b"HTTP/1.1 banana\r\n\r\n", b"\x00" * 2000):
            async with serving(answer) as server:
                await refusal(notifier_for(server))

    @pytest.mark.parametrize("count", [0, 1000], ids=["nothing", "trickle"])
    async def test_hangs(self, count: int) -> None:
        """A server costs the timeout and no more; the deadline is for all that it says, not for each byte."""

        async def trickle(writer: asyncio.StreamWriter) -> None:
            for byte in (b"HTTP/1.1 200 OK\r\nX: " + b"x" * 1000)[:count]:
                writer.write(bytes([byte]))
                await asyncio.sleep(0.02)
            await asyncio.sleep(60)

        async with serving(trickle) as server:
            async with asyncio.timeout(5):
                await refusal(notifier_for(server, timeout_seconds=0.3), r"within 0.3 seconds")

    async def test_body_trickles(self) -> None:
        async def trickle(writer: asyncio.StreamWriter) -> None:
            writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n")
            for _ in range(1000):
                writer.write(b"x")
                await asyncio.sleep(0.02)

        async with serving(trickle) as server:
            async with asyncio.timeout(3):
                await notifier_for(server, timeout_seconds=0.1).notify_pending(make_notice())

        assert len(server.requests) == 1

    @pytest.mark.parametrize("head", [b"Content-Length: 1073741824", b"Content-Encoding: gzip\r\nConnection: close"])
    async def test_gigabyte(self, head: bytes) -> None:
        """A body without end is not read: neither memory nor time."""
        sent = 0

        async def flood(writer: asyncio.StreamWriter) -> None:
            nonlocal sent
            writer.write(b"HTTP/1.1 200 OK\r\n" + head + b"\r\n\r\n")
            block = b"\x1f\x8b" * 32_768
            for _ in range(16_384):
                writer.write(block)
                await writer.drain()
                sent += len(block)

        async with serving(flood) as server:
            notifier = notifier_for(server)
            await notifier.notify_pending(make_notice())  # what is loaded once is loaded
            tracemalloc.start()
            await notifier.notify_pending(make_notice())
            _, peak = tracemalloc.get_traced_memory()
            tracemalloc.stop()

        assert peak < 4_000_000
        assert sent < 100_000_000

    async def test_headers_without_end(self) -> None:
        async def flood(writer: asyncio.StreamWriter) -> None:
            writer.write(b"HTTP/1.1 200 OK\r\n")
            while True:
                writer.write(b"X-Filler: " + b"x" * 1000 + b"\r\n")
                await writer.drain()

        async with serving(flood) as server:
            tracemalloc.start()
            await refusal(notifier_for(server, timeout_seconds=3))
            _, peak = tracemalloc.get_traced_memory()
            tracemalloc.stop()

        assert peak < 8_000_000
