"""The bundled sinks: lines of JSON over HTTP, and to a file that is whole after any crash."""

from __future__ import annotations

import gzip
import json
import os
import stat
from pathlib import Path
from typing import Any

import pytest
from notifier_helpers import OK, Server, serving, status
from pydantic import ValidationError

from agent_gateway_store import AuditEvent, StoreSettings, hookimpl
from agent_gateway_store.errors import NotDeliveredError
from agent_gateway_store.hooks.manager import Plugins
from agent_gateway_store.plugins.file_sink import FileSink, append
from agent_gateway_store.plugins.http_sink import HttpSink, HttpSinkSettings
from builders import make_event

EVENTS = [make_event(request_id=f"r-{n}", deterministic_rationale="naïve\n\u2028") for n in range(3)]


def sink_for(server: Server, **fields: Any) -> HttpSink:
    return HttpSink(HttpSinkSettings(**{"url": server.url, "allow_http": True, "allow_private": True} | fields))


class TestHttp:
    """`http-sink`."""

    async def test_posts_lines_of_json(self) -> None:
        """With the headers of the settings, over one connection."""
        async with serving(OK) as server:
            sink = sink_for(server, headers={"Authorization": "Splunk 1234"})
            await sink.send(EVENTS)
            await sink.send(EVENTS[:1])

            first, second = server.requests
            assert (first.line, first.headers["content-type"]) == (
                "POST /hook?key=in-the-url HTTP/1.1",
                "application/x-ndjson",
            )
            assert first.headers["authorization"] == "Splunk 1234"
            lines = first.body.decode().split("\n")
            assert [AuditEvent(**json.loads(line)).request_id for line in lines[:-1]] == ["r-0", "r-1", "r-2"]
            assert (lines[-1], second.body.count(b"\n"), server.connections) == ("", 1, 1)

    async def test_compresses_where_that_is_set(self) -> None:
        async with serving(OK) as server:
            await sink_for(server, gzip=True).send(EVENTS)
            await sink_for(server).send(EVENTS)

        packed, plain = server.requests
        assert (packed.headers["content-encoding"], "content-encoding" in plain.headers) == ("gzip", False)
        assert gzip.decompress(packed.body) == plain.body

    @pytest.mark.parametrize(
        ("answer", "is_permanent", "retry_after_s"),
        [
            *((f"{code} No", True, None) for code in (400, 413, 422)),
            *((f"{code} No", False, None) for code in (301, 401, 403, 404, 410, 500)),
            ("429 Slow\r\nRetry-After: 7", False, 7.0),
            ("503 Away\r\nRetry-After: 9", False, 9.0),
        ],
    )
    async def test_what_each_answer_means(self, answer: str, is_permanent: bool, retry_after_s: float | None) -> None:
        async with serving(status(answer)) as server:
            with pytest.raises(NotDeliveredError, match=f"answered {answer[:3]}") as raised:
                await sink_for(server).send(EVENTS)

        assert (raised.value.is_permanent, raised.value.retry_after_s) == (is_permanent, retry_after_s)

    async def test_private_addresses_are_refused(self) -> None:
        """Unless the settings allow them: no connection is made."""
        async with serving(OK) as server:

            async def resolver(_host: str, _port: int) -> list[str]:
                return ["127.0.0.1"]

            settings = HttpSinkSettings(url=f"http://siem.example:{server.port}/", allow_http=True)  # type: ignore[arg-type]
            with pytest.raises(NotDeliveredError, match="not a public address"):
                await HttpSink(settings, resolver=resolver).send(EVENTS)
            assert server.connections == 0
        with pytest.raises(ValidationError, match="not public"):
            HttpSinkSettings(url="https://127.0.0.1/")  # type: ignore[arg-type]

    @pytest.mark.parametrize(
        "headers", [{"X": "a\r\nb"}, {"X\r\nY": "a"}, {"X": "é"}, {"": "a"}, {"X": "a "}, {"Content-Length": "1"}]
    )
    def test_no_header_can_end_a_line(self, headers: dict[str, str]) -> None:
        with pytest.raises(ValidationError, match="header"):
            HttpSinkSettings(url="https://siem.example/", headers=headers)  # type: ignore[arg-type]

    def test_settings_show_no_secret(self) -> None:
        settings = HttpSinkSettings(url="https://siem.example/t0ken", headers={"Authorization": "s3cret"})  # type: ignore[arg-type]
        assert "t0ken" not in repr(settings)
        assert "s3cret" not in repr(settings)


class TestFile:
    """`file-sink`."""

    async def test_appends_lines(self, tmp_path: Path) -> None:
        """To a file for its owner alone; one that was renamed is followed by a new one."""
        path = tmp_path / "log.jsonl"
        sink = FileSink(path)
        await sink.send(EVENTS[:2])
        await sink.send(EVENTS[2:])
        path.rename(tmp_path / "log.1")
        await sink.send(EVENTS[:1])

        whole = [json.loads(line)["request_id"] for line in (tmp_path / "log.1").read_text("utf-8").split("\n")[:-1]]
        assert whole == ["r-0", "r-1", "r-2"]
        assert path.read_text("utf-8").count("\n") == 1
        assert stat.S_IMODE(path.stat().st_mode) == 0o600

    async def test_a_torn_last_line_is_taken_away(self, tmp_path: Path) -> None:
        """However long it is, also where the file holds nothing else."""
        path = tmp_path / "log.jsonl"
        for length in (1, 300, 70_000, 140_000):
            for before in ("", f"{EVENTS[0].model_dump_json()}\n"):
                path.write_text(before + "{" + "x" * (length - 1), "utf-8")
                await FileSink(path).send(EVENTS[1:2])

                assert path.read_text("utf-8") == f"{before}{EVENTS[1].model_dump_json()}\n"

    async def test_the_file_of_somebody_else_stays(self, tmp_path: Path) -> None:
        """What does not end in a line of JSON is not ours to mend."""
        path = tmp_path / "notes.txt"
        path.write_text("one\ntwo")
        with pytest.raises(ValueError, match="does not end in lines of JSON"):
            await FileSink(path).send(EVENTS)

        assert path.read_text() == "one\ntwo"

    async def test_a_full_disk_leaves_the_file_as_it_was(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        path = tmp_path / "log.jsonl"
        await FileSink(path).send(EVENTS[:1])
        before, write = path.read_text("utf-8"), os.write
        monkeypatch.setattr(os, "write", lambda to, data: write(to, data[:10]))
        with pytest.raises(OSError, match="disk is full"):
            await FileSink(path).send(EVENTS[1:])

        assert path.read_text("utf-8") == before

    def test_a_process_forked_while_it_writes_does_not_keep_the_file_from_others(self, tmp_path: Path) -> None:
        """The child has what is open at that moment for as long as it lives."""
        path, inherited = tmp_path / "log.jsonl", list[int]()
        append(path, b"{}\n", lambda file: inherited.append(os.dup(file)))
        try:
            append(path, b"{}\n")
        finally:
            os.close(inherited[0])

        assert path.read_bytes() == b"{}\n{}\n"


def test_sinks_are_there_where_they_are_set_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """By their settings; what does not fit is recorded with its plugin, and harms no other."""
    assert Plugins().sinks(StoreSettings()) == {}
    monkeypatch.setenv("AGENT_GATEWAY_STORE_HTTP_SINK_URL", "https://siem.example/")
    monkeypatch.setenv("AGENT_GATEWAY_STORE_FILE_SINK_PATH", "log.jsonl")

    class Bad:
        @hookimpl
        def gateway_store_register_sinks(self) -> list[object]:
            return [object(), FileSink("again.jsonl")]

    plugins = Plugins((Bad(),))
    found = plugins.sinks(StoreSettings())

    assert sorted(found) == ["file-sink", "http-sink"]
    [bad] = [record for record in plugins.records if record.name == "Bad"]
    assert bad.state == "broken"
    assert "a sink does not fit: TypeError: object has no name" in (bad.error or "")
