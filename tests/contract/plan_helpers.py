"""What PostgreSQL itself says of how it runs the statements of a store, and what is wrong with that."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Iterator
from typing import Any

from sqlalchemy import event

from agent_gateway_store import GatewayStore

_REPORT = """
    LOAD 'auto_explain'; SET auto_explain.log_min_duration = 0; SET auto_explain.log_analyze = on;
    SET auto_explain.log_format = json; SET auto_explain.log_level = notice; SET auto_explain.log_timing = off
"""
TABLES = (
    "audit_events",
    "audit_leaves",
    "audit_checkpoints",
    "approval_requests",
    "approval_votes",
    "notification_deliveries",
)
# A page of a listing, and what a sweep or a claim takes at once, may cost so many rows of another kind.
FEW_ROWS = 1_000
_MOST_READ_FOR_ONE = 20
_WORST_ESTIMATE = 1_000


def copies(table: str, count: int, **columns: str) -> str:
    """SQL of `count` copies of the first row of a table, but for `columns`; `n` is the number of the copy."""
    return f"""DO $$ DECLARE names text; given text; BEGIN
        SELECT string_agg(quote_ident(column_name), ', '),
            string_agg(COALESCE('{json.dumps(columns).replace("'", "''")}'::jsonb ->> column_name,
                'old.' || quote_ident(column_name)), ', ')
        INTO names, given FROM information_schema.columns
        WHERE table_name = '{table}' AND column_name <> 'id';
        EXECUTE format('INSERT INTO {table} (%s) SELECT %s FROM generate_series(1, {count}) AS n,
            (SELECT * FROM {table} ORDER BY id LIMIT 1) AS old', names, given);
    END $$"""


class Reports:
    """What PostgreSQL says of the statements of one store."""

    def __init__(self, store: GatewayStore, setting: str) -> None:
        self.plans: list[dict[str, Any]] = []
        self._setting = setting
        event.listen(store.database.engine.sync_engine, "connect", self._listen)

    async def faults_of(
        self, name: str, work: Awaitable[Any], *, reads_all: bool, sorts_all: bool = False
    ) -> list[str]:
        """Run something, and say what is wrong with its plans."""
        self.plans.clear()
        await work
        # Notices of the server may come after the rows.
        await asyncio.sleep(0)
        return [
            f"{self._setting}: {name}: {fault}: {report['Query Text'][:300]}"
            for report in self.plans
            for fault in faults(report, reads_all=reads_all, sorts_all=sorts_all)
        ]

    def _listen(self, connection: Any, _record: Any) -> None:
        connection.driver_connection.add_log_listener(self._add)
        connection.run_async(lambda driver: driver.execute(f"{_REPORT}; SET plan_cache_mode = {self._setting}"))

    def _add(self, _connection: Any, message: Any) -> None:
        if "plan:\n" in message.message:
            self.plans.append(json.loads(message.message.split("plan:\n", 1)[1]))


def nodes(plan: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Every node of a plan that was run."""
    yield plan
    for child in plan.get("Plans", ()):
        yield from nodes(child)


def read_by(node: dict[str, Any]) -> float:
    """How many rows of one of our tables a node has read."""
    if node.get("Relation Name") not in TABLES or "Scan" not in node["Node Type"]:
        return 0
    removed = node.get("Rows Removed by Filter", 0) + node.get("Rows Removed by Index Recheck", 0)
    return float((node["Actual Rows"] + removed) * node["Actual Loops"])


def faults(report: dict[str, Any], *, reads_all: bool, sorts_all: bool = False) -> list[str]:
    """What is wrong with how a statement was run, which perhaps has to read, or to sort, everything."""
    found = ["JIT"] if "JIT" in report else []
    everything = list(nodes(report["Plan"]))
    returned = max([1.0, *(node["Actual Rows"] for node in everything if node["Node Type"] == "ModifyTable")])
    returned = max(returned, report["Plan"]["Actual Rows"])
    # What groups rows returns few for many.
    grouped = [node["Plans"][0] for node in everything if node["Node Type"] == "Aggregate"]
    returned = max([returned, *(node["Actual Rows"] * node["Actual Loops"] for node in grouped)])
    for node in everything:
        read, loops = read_by(node), node["Actual Loops"]
        if node["Node Type"] == "Seq Scan" and read > FEW_ROWS and not reads_all:
            found.append(f"sequential scan of {node['Relation Name']}: {read:.0f} rows")
        elif read > max(FEW_ROWS, _MOST_READ_FOR_ONE * returned) and not reads_all:
            found.append(f"{read:.0f} rows of {node['Relation Name']} read for {returned:.0f}")
        if node["Actual Rows"] * loops > _WORST_ESTIMATE * max(1, node["Plan Rows"] * loops) and not reads_all:
            found.append(f"{node['Actual Rows']} rows where {node['Plan Rows']} were expected")
        if node.get("Sort Space Type") == "Disk" and not sorts_all:
            found.append("a sort on disk")
    return found
