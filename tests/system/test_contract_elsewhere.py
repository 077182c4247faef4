"""The contract suite again on what stands between a gateway and its servers, or instead of them.

Each run takes minutes, so that all of this is for `pytest -m slow`.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import threading
from contextlib import ExitStack
from pathlib import Path

import pytest
from test_pgbouncer import PgBouncer

from proofs.harness import execute
from servers import PostgresServer, RedisServer, SentinelServer, run

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parent.parent.parent
# Of tests that hand the URL to a driver of their own, which knows none of our options.
OWN_DRIVER = "tampered or rewritten or written_by_any_way or who_may_not_write_seals or server_that_only_reads_verifies"
# Of tests that open a store on another database than that of the suite.
OWN_DATABASE = (
    "export_import_export or what_is_raised or come_through_unchanged or without_the_other or not_pickled or no_asyncio"
)
# Of tests that add a trigger, for which the standby waits until nobody reads there; and of a plan on a table that the
# tests before it have left their rows in.
LOCKING = "bad_row or reads_by_indexes"
KILLED_AFTER_S = 15.0
DEBIAN_15 = Path("/usr/lib/postgresql/15/bin")
# Of tests that allow no poll.
LISTENING = "wakes_every_waiter or sweep_ends_a_wait or heard_through_postgresql"


def run_suite(environment: dict[str, str], *, but: str = "", only: str = "postgres") -> None:
    """Run the tests of the contract suite that are named so, without what the machine sets for tests."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("AGS_TEST_", "PYTEST_"))}
    chosen = f"({only}) and not ({but})" if but else only
    command = [sys.executable, "-m", "pytest", "-q", "-n2", "tests/contract", "-m", "not slow", "-k", chosen]
    done = subprocess.run(command, cwd=ROOT, env=kept | environment, capture_output=True, text=True)
    print(done.stdout[-20_000:])
    assert done.returncode == 0, done.stdout[-20_000:]
    passed = re.search(r"(\d+) passed", done.stdout)
    # Lest a wrong expression makes an empty run.
    assert passed is not None
    assert int(passed[1]) > 100


def test_without_listen() -> None:
    """As behind a pooler that knows no LISTEN: a task that waits polls."""
    run_suite({"AGS_TEST_DATABASE_OPTIONS": "listen=false"}, but=f"{OWN_DRIVER} or {LISTENING}")


def test_behind_pgbouncer() -> None:
    """Each transaction may meet another connection of the server."""
    # What the store says about a server without it would be among what tests expect of the log.
    with PostgresServer(settings={"synchronous_commit": "on"}) as database:
        bouncer = PgBouncer(database, connections=20)
        bouncer.start()
        try:
            options = {"AGS_TEST_DATABASE_OPTIONS": "pgbouncer=true&sslmode=disable"}
            url = bouncer.url.partition("?")[0]
            run_suite({"AGS_TEST_POSTGRES_URL": url, **options}, but=f"{OWN_DRIVER} or {LISTENING}")
        finally:
            bouncer.remove()


def test_reading_on_a_replica() -> None:
    """On a standby that has applied every commit before it is acknowledged, every answer is the same."""
    waiting = {"synchronous_commit": "remote_apply"}
    with PostgresServer(settings=waiting) as primary, PostgresServer(standby_of=primary) as standby:
        run(execute(primary.url, "ALTER SYSTEM SET synchronous_standby_names = '*'", "SELECT pg_reload_conf()"))
        environment = {"AGS_TEST_POSTGRES_URL": primary.url, "AGS_TEST_READ_ADDRESS": f"127.0.0.1:{standby.port}"}
        run_suite(environment, but=f"{OWN_DRIVER} or {OWN_DATABASE} or {LOCKING}")


@pytest.mark.skipif(not DEBIAN_15.is_dir(), reason="needs the package postgresql-15 of Debian 12")
def test_on_postgresql_15() -> None:
    """The server of Debian 12, beside the newest one of the other tests."""
    with PostgresServer(binaries=DEBIAN_15) as database:
        run_suite({"AGS_TEST_POSTGRES_URL": database.url})


def test_over_sentinels_while_the_master_is_killed() -> None:
    """Whatever Redis knew may be gone and for a while nothing answers: no answer of the store differs."""
    with ExitStack() as stack:
        master = stack.enter_context(RedisServer())
        for _ in range(2):
            options = ("--replicaof", "127.0.0.1", str(master.port), "--repl-diskless-sync-delay", "0")
            stack.enter_context(RedisServer(options=options))
        sentinels = [stack.enter_context(SentinelServer(master, quorum=2)) for _ in range(3)]
        hosts = ",".join(f"127.0.0.1:{sentinel.port}" for sentinel in sentinels)
        # Once the suite is well under way.
        killing = threading.Timer(KILLED_AFTER_S, master.kill)
        killing.start()
        try:
            # An erasure says so where Redis does not answer, and is to be run again.
            run_suite({"AGS_TEST_REDIS_URL": f"redis+sentinel://{hosts}/gateway/0"}, only="redis", but="eras")
        finally:
            killing.cancel()
        assert not master.is_running
