"""An archive in Spark, on a cluster of two workers: the figures that `store.audit.stats` gave before the prune.

It needs the extra `spark` and Java; without the extra it is skipped. `pytest -m slow` runs it.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from agent_gateway_store import GatewayStore, StoreSettings
from agent_gateway_store.archive import Archive
from builders import make_event
from pages import BLOCK, PAGES

pytestmark = pytest.mark.slow

OLD = datetime(2025, 1, 1, tzinfo=UTC)
EVENTS, DAYS = 100_000, 60
# Two workers of one core and 1,024 MB each: processes of their own, so that the engine is distributed for real.
CLUSTER = "local-cluster[2,1,1024]"
GROUPS = ("decision", "tool_name", "caller_id", "environment")

FIGURES = """
import json, sys

def figures(column):
    parts = [column, "count(*)", "count_if(decision = 'DENY')", "count_if(execution_status = 'TOOL_ERROR')"]
    parts += [f"percentile_disc({each}) WITHIN GROUP (ORDER BY latency_ms)" for each in (0.5, 0.95, 0.99)]
    rows = spark.sql(f"SELECT {', '.join(parts)} FROM history GROUP BY {column}").collect()
    return {row[0]: [int(each) for each in row[1:]] for row in rows}

executors = len(spark.sparkContext._jsc.sc().statusTracker().getExecutorInfos()) - 1
positions = spark.sql("SELECT count(DISTINCT position) AS n FROM history").first()["n"]
found = {column: figures(column) for column in sys.argv[1].split(",")}
print(json.dumps({"executors": executors, "positions": positions, "figures": found}))
spark.stop()
"""


def make_events() -> Any:
    for n in range(EVENTS):
        yield make_event(
            request_id=f"r-{n}",
            timestamp=OLD + n * timedelta(days=DAYS) / EVENTS,
            caller_id=f"agent-{n % 7}",
            tool_name=f"tool-{n % 11}",
            environment=("prod", "dev", "test")[n % 3],
            decision=("ALLOW", "DENY", "APPROVAL_REQUIRED", "ALLOW")[n % 4],
            execution_status=(None, "SUCCESS", "TOOL_ERROR")[n % 3],
            latency_ms=n * 37 % 5_003,
        )


async def test_two_workers_of_spark_give_the_figures_of_stats(tmp_path: Path) -> None:
    """By decision, tool, caller and environment: calls, denials, errors, percentiles; each event once."""
    pyspark = pytest.importorskip("pyspark", reason="needs the extra `spark`")
    expected: dict[str, dict[str, list[int]]] = {}
    settings = StoreSettings(audit_seal_seconds=0)
    async with GatewayStore(f"sqlite:///{tmp_path}/gateway.db", redis_url="", settings=settings) as store:
        await store.audit.write_many(make_events())
        await store.audit.write(make_event())
        for column in GROUPS:
            rows = (await store.audit.stats(column, until=OLD + timedelta(days=DAYS + 1))).to_dicts()
            names = ("calls", "denials", "errors", *(f"latency_p{each}_ms" for each in (50, 95, 99)))
            expected[column] = {str(row[column]): [row[name] for name in names] for row in rows}
        pruned = await store.retention.prune("200d", by="ops", archive=tmp_path / "archive")
        assert (pruned.events, pruned.remaining) == (EVENTS, 0)

    source = PAGES["how-to/query-history.md"]
    [page] = [block["body"] for block in BLOCK.finditer(source) if block["title"] == "spark.py"]
    (tmp_path / "spark.py").write_text(page + FIGURES)
    submit = f"--master {CLUSTER} --conf spark.ui.enabled=false pyspark-shell"
    environment = {**os.environ, "PYSPARK_SUBMIT_ARGS": submit, "SPARK_HOME": str(Path(pyspark.__file__).parent)}
    command = [sys.executable, "spark.py", ",".join(GROUPS)]
    done = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=500, check=False
    )

    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    print(done.stdout)
    assert (found["executors"], found["positions"]) == (2, EVENTS)
    assert found["figures"] == expected
    assert Archive(tmp_path / "archive").verify().events == EVENTS
