"""Python programs that begin with the package loaded, as children of a process that has imported it once.

To start Python and import the package takes a second, most of what such a test took. Each program is a process of its
own all the same: only modules are shared, no store, no loop, no connection. `python forks.py SOCKET` is that process.
"""

from __future__ import annotations

import asyncio
import atexit
import gc
import importlib
import json
import logging
import os
import random
import runpy
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import cache
from os import _exit
from pathlib import Path
from typing import IO, Any

_SHIM = """#!{python} -SE
import json, os, signal, socket, sys
arguments = sys.argv[1:]
if name := {names!r}.get(os.path.basename(sys.argv[0])):
    module, main = name.split(":")
    code = f"import sys; sys.argv[0] = {{sys.argv[0]!r}}; from {{module}} import {{main}}; sys.exit({{main}}())"
    arguments = ["-c", code, *arguments]
closed = []
while (number := os.open(os.devnull, os.O_RDWR)) < 3:
    closed.append(number)
with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as asking:
    asking.connect({path!r})
    request = {{"arguments": arguments, "folder": os.getcwd(), "environment": dict(os.environ), "closed": closed}}
    socket.send_fds(asking, [json.dumps(request).encode()], [0, 1, 2])
    program = int(asking.recv(100))
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, _: os.kill(program, number))
    # What it reads and writes is the program's alone.
    os.closerange(0, 3)
    status = int(asking.recv(100) or 1)
if status < 0:
    signal.signal(-status, signal.SIG_DFL)
    os.kill(os.getpid(), -status)
os._exit(status)
"""
"""A command for a shell: has it run by the process that has the package loaded, and ends as it does."""
_COMMANDS = {"gateway-store": "agent_gateway_store.cli:main", "uvicorn": "uvicorn:main", "fastmcp": "fastmcp.cli:app"}
"""By the name of a command: what it calls. Beside them there is `python`."""
_codes: list[int] = []
"""In a program that has run to its end: its exit code."""


class Forks:
    """A process that has the package loaded, with the ways to have it run a program.

    Attributes:
        programs: A folder for PATH with commands that start faster: `python`, `gateway-store` and some others.
    """

    def __init__(self, path: Path) -> None:
        self._path = str(path / "socket")
        self.programs = path / "programs"
        self.programs.mkdir()
        for name in ("python", *_COMMANDS):
            (self.programs / name).write_text(_SHIM.format(python=sys.executable, path=self._path, names=_COMMANDS))
            (self.programs / name).chmod(0o755)

    def start(
        self,
        arguments: Sequence[str],
        folder: Path,
        environment: Mapping[str, str],
        *files: int,
        load: Sequence[str] = (),
    ) -> Fork:
        """Run `python ARGUMENTS`, of which `-W error`, then `-c`, `-m` or a script are understood.

        The modules of `load` are imported first, once for all that come after.
        """
        asking = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        asking.connect(self._path)
        request = {"arguments": list(arguments), "folder": str(folder), "environment": dict(environment)}
        socket.send_fds(asking, [json.dumps(request | {"load": list(load)}).encode()], files)
        return Fork(int(asking.recv(100)), asking)

    async def begin(
        self, arguments: Sequence[str], folder: Path, environment: Mapping[str, str], *, load: Sequence[str] = ()
    ) -> Fork:
        """Run a program with pipes for its input and output."""
        (input_, into), (out, output) = os.pipe(), os.pipe()
        program = self.start(arguments, folder, environment, input_, output, 2, load=load)
        os.close(input_)
        os.close(output)
        await program.connect(into, out)
        return program

    def load(self, modules: Sequence[str]) -> None:
        """Import modules, once for all programs that come after; those that refuse are left to the programs."""
        with open(os.devnull, "r+") as nothing:  # noqa: PTH123
            self.start(["-c", ""], Path("/"), {}, *[nothing.fileno()] * 3, load=modules).result(60)

    def run(
        self, arguments: Sequence[str], *, cwd: Path, env: Mapping[str, str], timeout: float
    ) -> subprocess.CompletedProcess[str]:
        """Run a program to its end, as `subprocess.run` with its output captured would."""
        with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err, open(os.devnull) as nothing:  # noqa: PTH123
            program = self.start(arguments, cwd, env, nothing.fileno(), out.fileno(), err.fileno())
            returncode = program.result(timeout)
            texts = [_all_of(each) for each in (out, err)]
        return subprocess.CompletedProcess(list(arguments), returncode, *texts)


def _all_of(file: IO[str]) -> str:
    file.seek(0)
    return file.read()


class Fork:
    """A program that runs, with the part of `asyncio.subprocess.Process` that tests need.

    Attributes:
        pid: Of the program itself.
        returncode: None until it was waited for; the negative number of a signal that ended it.
        stdin: Its input, once `connect` was called; so is `stdout`.
    """

    stdin: asyncio.StreamWriter
    stdout: asyncio.StreamReader

    def __init__(self, pid: int, asking: socket.socket) -> None:
        self.pid, self.returncode, self._asking = pid, None, asking
        self._waiting: asyncio.Future[int] | None = None

    returncode: int | None

    def result(self, timeout_s: float) -> int:
        """Wait for its end; kill it and raise TimeoutError if it does not come in time."""
        self._asking.settimeout(timeout_s)
        try:
            self.returncode = int(self._asking.recv(100))
        except TimeoutError:
            self.kill()
            raise
        finally:
            self._asking.close()
        return self.returncode

    async def connect(self, into: int, out: int) -> None:
        """Take its pipes as streams."""
        loop = asyncio.get_running_loop()
        # A line may be an approval whose arguments are as large as they can be.
        self.stdout = asyncio.StreamReader(limit=2**24)
        await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(self.stdout), os.fdopen(out, "rb", 0))
        transport, protocol = await loop.connect_write_pipe(asyncio.streams.FlowControlMixin, os.fdopen(into, "wb", 0))
        self.stdin = asyncio.StreamWriter(transport, protocol, None, loop)

    async def wait(self) -> int:
        """Wait for its end and return how it ended."""
        if self.returncode is None:
            self._asking.setblocking(False)
            self.returncode = int(await asyncio.get_running_loop().sock_recv(self._asking, 100))
            self._asking.close()
        return self.returncode

    def kill(self) -> None:
        """End it by SIGKILL; does nothing once it has ended."""
        self.send_signal(signal.SIGKILL)

    def send_signal(self, signum: int) -> None:
        if self.returncode is None:
            with suppress(ProcessLookupError):
                os.kill(self.pid, signum)

    async def communicate(self) -> tuple[bytes, None]:
        """Close its input, read the rest of its output, and wait for its end."""
        self.stdin.close()
        rest = await self.stdout.read()
        await self.wait()
        return rest, None


@cache
def forks(*, is_large: bool = False) -> Forks:
    """Start the process, once; it ends with this one.

    A large one is for what loads large libraries, which take seconds to be taken apart at the end of each program:
    there programs end without that. In the other, nothing is loaded but the package.
    """
    folder = Path(tempfile.mkdtemp(prefix="ags-forks-"))
    atexit.register(shutil.rmtree, folder)
    given = Forks(folder)
    command = [sys.executable, __file__, f"{folder}/socket", "large" if is_large else ""]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd="/")
    assert process.stdin is not None
    assert process.stdout is not None
    # Before the folder goes.
    atexit.register(process.wait, 10)
    atexit.register(process.stdin.close)
    assert process.stdout.readline() == b"ready\n"
    return given


def _load() -> None:
    """Import what the programs import, and refuse a warning of it."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        import aiosqlite  # noqa: F401
        import alembic.command
        import alembic.config  # noqa: F401
        import asyncpg  # noqa: F401
        import sqlalchemy.dialects.postgresql.asyncpg
        import sqlalchemy.dialects.sqlite.aiosqlite  # noqa: F401
        import typer.main

        from agent_gateway_store import AuditEvent, GatewayStore, SyncGatewayStore  # noqa: F401
        from agent_gateway_store.cli.app import app
        from agent_gateway_store.testing import RecordingNotifier  # noqa: F401

        # Each is imported when it is asked for.
        group = typer.main.get_group(app)
        for name in group.commands:
            group.get_command(None, name)
    gc.collect()
    gc.freeze()


def _serve(path: str) -> dict[str, Any] | None:
    """Fork for each request; returns the request in each child, None at the end."""
    # Those in between, which wait for a program, are waited for by nobody.
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listening:
        listening.bind(path)
        listening.listen(16)
        print("ready", flush=True)
        while True:
            readable, _, _ = select.select([listening, sys.stdin], [], [])
            if sys.stdin in readable:
                return None
            answering, _ = listening.accept()
            message, files, _, _ = socket.recv_fds(answering, 1 << 20, 3)
            request: dict[str, Any] = json.loads(message)
            for name in request.get("load", ()):
                # One that warns is imported by the programs, of which some make errors of warnings.
                with warnings.catch_warnings(action="error"), suppress(Exception):
                    importlib.import_module(name)
            gc.freeze()
            if os.fork():
                answering.close()
                for file in files:
                    os.close(file)
                continue
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            if (pid := os.fork()) == 0:
                answering.close()
                for number, file in enumerate(files):
                    os.dup2(file, number)
                    os.close(file)
                return request
            for file in (*files, 0, 1, 2):
                os.close(file)
            with suppress(OSError):
                answering.send(str(pid).encode())
            # The program ends, at the latest with whoever asked for it.
            ended = os.pidfd_open(pid)
            if ended not in select.select([ended, answering], [], [])[0]:
                os.kill(pid, signal.SIGKILL)
            status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
            with suppress(OSError):
                answering.send(str(status).encode())
            _exit(0)


def _run(request: dict[str, Any]) -> None:
    """Become the program of a request."""
    os.environ.clear()
    os.environ.update(request["environment"])
    os.chdir(request["folder"])
    time.tzset()
    random.seed()
    # By lines, where Python would not hold anything back, so that a reader gets whole ones.
    held_back = 1 if os.environ.get("PYTHONUNBUFFERED") else -1
    sys.stdin, sys.stdout = open(0, closefd=False), open(1, "w", buffering=held_back, closefd=False)  # noqa: SIM115
    sys.stderr = open(2, "w", buffering=1, errors="backslashreplace", closefd=False)  # noqa: SIM115
    for number in request.get("closed", ()):
        # As Python begins where it was started with one of them closed.
        os.close(number)
        for name in ("stdin", "stdout", "stderr")[number : number + 1]:
            setattr(sys, name, None)
            setattr(sys, f"__{name}__", None)
    arguments: list[str] = request["arguments"]
    # The first entry of sys.path is the folder of this module.
    sys.path[:1] = [each for each in os.environ.get("PYTHONPATH", "").split(os.pathsep) if each]
    if os.environ.get("PYTHONWARNINGS") == "error":
        warnings.simplefilter("error")
    if arguments[0] == "-W":
        warnings.simplefilter(arguments[1])  # type: ignore[arg-type]
        arguments = arguments[2:]
    if arguments[0] == "-c":
        sys.argv = ["-c", *arguments[2:]]
        sys.path.insert(0, "")
        module = type(sys)("__main__")
        sys.modules["__main__"] = module
        exec(compile(arguments[1], "<string>", "exec"), module.__dict__)
    elif arguments[0] == "-m":
        sys.argv = arguments[1:]
        sys.path.insert(0, str(Path.cwd()))
        runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = arguments
        sys.path.insert(0, str(Path(arguments[0]).resolve().parent))
        runpy.run_path(arguments[0], run_name="__main__")


def _run_to_the_end(request: dict[str, Any]) -> None:
    """Become the program of a request, and end as Python does, but for the modules, which stay."""
    code: Any = 0
    try:
        _run(request)
    except SystemExit as exc:
        code = exc.code or 0
        if not isinstance(code, int):
            print(code, file=sys.stderr)
            code = 1
    except BaseException:
        sys.excepthook(*sys.exc_info())  # type: ignore[arg-type]
        code = 1
    _codes.append(code)


def _leave() -> None:
    """End a program that has run to its end; Python has waited for its threads and called what it registered."""
    if not _codes:
        return
    # Registered before this was.
    logging.shutdown()
    # `runpy` has put this module back in its place.
    if (program := vars(sys.modules["__main__"])) is not globals():
        program.clear()
    gc.collect()
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    _exit(_codes[0])


if __name__ == "__main__":
    # Newer Pythons warn of forking beside threads; those of the libraries that are loaded here survive it.
    warnings.filterwarnings("ignore", "This process .* is multi-threaded", DeprecationWarning)
    # First, and so called last.
    atexit.register(_leave)
    _load()
    if (asked := _serve(sys.argv[1])) is not None:
        (_run_to_the_end if sys.argv[2] else _run)(asked)
