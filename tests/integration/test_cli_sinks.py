"""`gateway-store audit ship` and `gateway-store sinks`."""

from __future__ import annotations

import json
import signal
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path

import cli_helpers
import pytest
from cli_helpers import Cli

import servers
from agent_gateway_store import GatewayStore
from agent_gateway_store.errors import NotDeliveredError
from builders import make_event
from commands import process

url, cli = cli_helpers.url, cli_helpers.cli


@pytest.fixture(autouse=True)
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The file of the sink; the other bundled plugins are not loaded."""
    path = tmp_path / "events.jsonl"
    monkeypatch.setenv("AGENT_GATEWAY_STORE_LOAD_PLUGINS", "file-sink")
    monkeypatch.setenv("AGENT_GATEWAY_STORE_FILE_SINK_PATH", str(path))
    return path


class Refusing:
    """A sink of the name of the file's that refuses everything for good."""

    name = "file-sink"

    async def send(self, _events: object) -> None:
        raise NotDeliveredError("no", is_permanent=True)


def write(url: str, *request_ids: str, refused: bool = False, days_old: int = 0) -> None:
    async def work() -> None:
        async with GatewayStore(url, redis_url="") as store:
            stamp = datetime.now(UTC) - timedelta(days=days_old)
            await store.audit.write_many(make_event(request_id=each, timestamp=stamp) for each in request_ids)
            if refused:
                await store.audit.ship(Refusing(), once=True)

    servers.run(work())


def ids(file: Path) -> list[str]:
    return [json.loads(line)["request_id"] for line in file.read_text().splitlines()] if file.exists() else []


def test_once_ships_to_the_end(url: str, cli: Cli, file: Path) -> None:
    write(url, "r-1", "r-2")
    first, second = cli("audit", "ship", "file-sink", "--once"), cli("audit", "ship", "file-sink", "--once", "--json")
    listed = cli("sinks", "list", "--json").json["items"]
    forgotten = cli("sinks", "forget", "file-sink"), cli("sinks", "forget", "file-sink")
    cli("audit", "ship", "file-sink", "--once", "--start", "now")

    assert (first.code, first.out, second.json) == (0, "2 events arrived.\n", {"sent": 0})
    assert ids(file) == ["r-1", "r-2"]
    assert [(row["sink"], row["lag_s"], row["dead"]) for row in listed] == [("file-sink", 0, 0)]
    assert "events.jsonl" not in cli("sinks", "list").out
    assert forgotten[0].out == "The sink file-sink begins anew.\n"
    for command in (("forget", "file-sinc"), ("redrive", "file-sinc"), ("dead", "file-sinc")):
        cli("sinks", *command).assert_fails(4, "Nothing was shipped to this sink")
    assert cli("sinks", "redrive", "file-sink").out == "0 dead letters are due again.\n"
    assert (forgotten[1].code, cli("sinks", "dead").code) == (4, 0)
    cli("audit", "ship", "nowhere", "--once").assert_fails(4, "No sink is named 'nowhere', there are 'file-sink'")


@pytest.mark.system
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_shipping_cleanly(url: str, cli: Cli, file: Path, number: signal.Signals) -> None:
    """It ships what comes until then, and ends with 0 and no traceback; meanwhile another one is refused."""
    with process("--database-url", url, "audit", "ship", "file-sink", "--interval", "0.05") as shipper:
        assert shipper.stderr is not None
        assert shipper.stderr.readline() == "Shipping to file-sink.\n"
        write(url, "r-1", "r-2")
        deadline = time.monotonic() + 20
        while len(ids(file)) < 2 and time.monotonic() < deadline:
            time.sleep(0.05)
        busy = cli("audit", "ship", "file-sink", "--once")
        shipper.send_signal(number)
        try:
            out, err = shipper.communicate(timeout=120)
        finally:
            shipper.kill()

    assert ids(file) == ["r-1", "r-2"]
    assert (shipper.returncode, out) == (0, "")
    assert "Traceback" not in err
    busy.assert_fails(5, "Another process ships to the sink 'file-sink'")


def test_dead_letters_are_shown_and_redriven(url: str, cli: Cli, file: Path) -> None:
    write(url, "r-1", "r-2", refused=True)
    dead = cli("sinks", "dead", "--json").json["items"]
    warned = cli("doctor", "--json").json
    redriven = cli("sinks", "redrive", "file-sink")
    shipped = cli("audit", "ship", "file-sink", "--once")

    assert [(row["request_id"], row["is_due"]) for row in dead] == [("r-2", False), ("r-1", False)]
    assert warned["sinks"] == {"file-sink": {"lag_s": 0, "dead": 2, "due": 0}}
    assert "The sink file-sink has refused 2 events: see `gateway-store sinks dead file-sink`." in warned["warnings"]
    assert (redriven.out, shipped.out) == ("2 dead letters are due again.\n", "2 events arrived.\n")
    assert (ids(file), cli("sinks", "dead", "--json").json["items"]) == (["r-1", "r-2"], [])


def test_doctor_ends_with_1_where_a_sink_lags(url: str, cli: Cli) -> None:
    """By more than an hour; and where its cursor leads nowhere, with the command that lets it begin anew."""
    cli("audit", "ship", "file-sink", "--once")
    write(url, "r-1", days_old=2)
    lagging = cli("doctor", "--json")
    cli("db", "restored", "--by", "ann")
    restored = cli("doctor", "--json")
    shipped = cli("audit", "ship", "file-sink", "--once")

    assert lagging.code == restored.code == 1
    (problem,) = [text for text in lagging.json["problems"] if "sink" in text]
    said = "The oldest event that the sink file-sink has not taken is 48 hours old: see whether"
    assert problem == f"{said} `gateway-store audit ship file-sink` runs."
    assert any("file-sink cannot go on: " in text and "restored" in text for text in restored.json["problems"])
    shipped.assert_fails(2, "`gateway-store sinks forget file-sink` lets it.")
