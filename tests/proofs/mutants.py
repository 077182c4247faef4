"""Shows that the tests can fail: `python -m tests.proofs.mutants [NAME or NUMBER ...] [--jobs N]`.

`mutants.md` beside this file lists one-line changes, each of which breaks a guarantee, with the test that
must fail then. Each is made in a copy of the repository, alone, and its test is run there.
"""

from __future__ import annotations

import argparse
import ast
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from functools import lru_cache
from itertools import chain, count
from pathlib import Path
from queue import SimpleQueue

ROOT = Path(__file__).parents[2]
LIST = Path(__file__).with_suffix(".md")

KILLED, SURVIVED, NOT_APPLICABLE = "killed", "survived", "not applicable"

_TIMEOUT_S = 180.0  # ten times what the slowest of these tests takes; a mutant that makes its test hang is killed by it
_FAILED = 1  # what pytest returns where a test has failed; more: the tests could not be run
_LEFT_OUT = shutil.ignore_patterns(".*", "__pycache__", "*.egg-info", "build", "dist", "site")
# The options of `pyproject.toml` are left out, as they may spread the tests over processes.
_PYTEST = (
    *("-m", "pytest", "-q", "--no-header", "--tb=no", "-rfE", "-o", "addopts=", "-m", "not slow"),
    *("-p", "no:cacheprovider", "-p", "no:valkey", "-p", "no:xdist"),
)
_ENTRY = re.compile(
    r"^### (?P<name>[a-z0-9-]+)\n\n(?P<why>.+?)\n\n`(?P<path>[^`]+)`, killed by `(?P<test>[^`]+)`\n\n"
    r"```diff\n(?P<diff>.+?)```$",
    re.MULTILINE | re.DOTALL,
)


class NotApplicableError(Exception):
    """The change cannot be made, or its test cannot be run."""


@dataclass(frozen=True)
class Mutant:
    """One change.

    Attributes:
        number: Its place in the list, from 1.
        name: Unique.
        why: What breaks.
        path: The file, from the root of the repository.
        old: Text that the file holds once.
        new: What stands in its place.
        test: Id of the test that fails then.
    """

    number: int
    name: str
    why: str
    path: str
    old: str
    new: str
    test: str

    def applied(self, source: str) -> str:
        """Return the source of the file with the change.

        Raises:
            NotApplicableError: The old text is not there exactly once, or what comes out is no Python.
        """
        if (found := source.count(self.old)) != 1:
            raise NotApplicableError(f"the old text is {found} times in {self.path}")
        mutated = source.replace(self.old, self.new)
        try:
            is_same = _meaning(mutated) == _meaning(source)
        except SyntaxError as exc:
            raise NotApplicableError(f"line {exc.lineno} of {self.path} is no Python then") from exc
        if is_same:
            raise NotApplicableError("it changes nothing")
        return mutated


@lru_cache(maxsize=2)
def _meaning(source: str) -> str:
    return ast.dump(ast.parse(source))


def mutants(text: str) -> list[Mutant]:
    """Return what a list in Markdown holds.

    Raises:
        ValueError: An entry has another form.
    """
    found = [entry.groupdict() for entry in _ENTRY.finditer(text)]
    if len(found) != len(re.findall(r"^### ", text, re.MULTILINE)):
        raise ValueError(f"Of the entries in {LIST.name}, {len(found)} have the form that the others show.")
    return [
        Mutant(number, entry["name"], entry["why"], entry["path"], *_sides(entry["diff"]), entry["test"])
        for number, entry in enumerate(found, start=1)
    ]


def _sides(diff: str) -> tuple[str, str]:
    lines = diff.splitlines()
    return tuple("\n".join(line[1:] for line in lines if line[0] == sign) for sign in "-+")  # type: ignore[return-value]


class Copy:
    """A copy of the repository with a Redis of its own, as tests empty it.

    Args:
        folder: Where to.
        environment: Of the tests.
    """

    def __init__(self, folder: Path, environment: dict[str, str]) -> None:
        shutil.copytree(ROOT, folder, ignore=_LEFT_OUT)
        # Also for the processes that tests start: before the package that is installed here.
        self._environment = environment | {"PYTHONPATH": str(folder / "src")}
        self._folder = folder
        # Python takes a compiled file for up to date by the size and the second of its source.
        self._seconds = count(int(time.time()) - 10**6)

    def run(self, tests: Sequence[str], *options: str) -> tuple[int | None, str]:
        """Run tests and return the exit code of pytest (None: they did not end in time) and what it printed."""
        with tempfile.TemporaryFile("w+", encoding="utf-8") as said:
            process = subprocess.Popen(
                [sys.executable, *_PYTEST, *options, *tests],
                cwd=self._folder,
                env=self._environment,
                stdout=said,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
            try:
                code: int | None = process.wait(_TIMEOUT_S * len(tests))
            except subprocess.TimeoutExpired:
                code = None
            finally:
                if process.poll() is None:
                    os.killpg(process.pid, signal.SIGKILL)
                    process.wait()
            said.seek(0)
            return code, said.read()

    def broken(self, tests: Sequence[str]) -> list[str]:
        """Return those of the tests that do not pass without any change, in which no failure would mean a thing."""
        code, said = self.run(tests)
        if code not in (0, _FAILED):
            return list(tests)
        failed = re.findall(r"^(?:FAILED|ERROR) (\S+)", said, re.MULTILINE)
        return [test for test in tests if any(each.partition("[")[0] == test.partition("[")[0] for each in failed)]

    def judge(self, mutant: Mutant) -> str:
        """Return what became of a mutant.

        Raises:
            NotApplicableError: See `Mutant.applied`; or its test could not be run.
        """
        path = self._folder / mutant.path
        if not path.is_file():
            raise NotApplicableError(f"there is no {mutant.path}")
        source = path.read_text(encoding="utf-8")
        self._write(path, mutant.applied(source))
        try:
            code, said = self.run([mutant.test], "-x")
        finally:
            self._write(path, source)
        if code is not None and code > _FAILED:
            raise NotApplicableError(f"pytest ended with {code}: {said.strip().splitlines()[-1:]}")
        return SURVIVED if code == 0 else KILLED

    def _write(self, path: Path, source: str) -> None:
        path.write_text(source, encoding="utf-8")
        os.utime(path, (second := next(self._seconds), second))


def chosen(everything: Sequence[Mutant], names: Sequence[str]) -> list[Mutant]:
    """Return those that are named, by name or number; all without names.

    Raises:
        ValueError: There is none of a name.
    """
    by_name = {key: mutant for mutant in everything for key in (mutant.name, str(mutant.number))}
    if unknown := [name for name in names if name not in by_name]:
        raise ValueError(f"There is no mutant {', '.join(unknown)} in {LIST.name}.")
    return [by_name[name] for name in names] or list(everything)


def main() -> int:
    """Run the mutants that the command line names; return 0 if all of them are killed."""
    sys.path.insert(0, str(ROOT / "tests"))
    import servers

    parser = argparse.ArgumentParser(prog="python -m tests.proofs.mutants", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help="names or numbers of mutants; default: all")
    parser.add_argument("--jobs", type=int, default=1, help="how many run at the same time")
    options = parser.parse_args()
    try:
        todo = chosen(mutants(LIST.read_text(encoding="utf-8")), options.names)
    except ValueError as exc:
        parser.error(str(exc))

    with ExitStack() as stack:
        work = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="mutants-")))
        environment = os.environ | {"AGS_TEST_POSTGRES_URL": stack.enter_context(servers.postgres())}
        # Compiled modules halve the time of a run, and are kept in the copies alone.
        environment.pop("PYTHONDONTWRITEBYTECODE", None)
        free: SimpleQueue[Copy] = SimpleQueue()
        for job in range(options.jobs):
            redis_url = stack.enter_context(servers.RedisServer()).url
            free.put(Copy(work / str(job), environment | {"AGS_TEST_REDIS_URL": redis_url}))

        def broken_of(tests: Sequence[str]) -> list[str]:
            copy = free.get()
            try:
                return copy.broken(tests) if tests else []
            finally:
                free.put(copy)

        def judge(mutant: Mutant) -> tuple[Mutant, str, str, float]:
            copy, started = free.get(), time.monotonic()
            try:
                if mutant.test in broken:
                    raise NotApplicableError("its test fails without it, too")
                fate, reason = copy.judge(mutant), ""
            except NotApplicableError as exc:
                fate, reason = NOT_APPLICABLE, str(exc)
            finally:
                free.put(copy)
            return mutant, fate, reason, time.monotonic() - started

        fates: list[str] = []
        pool = ThreadPoolExecutor(options.jobs)
        stack.callback(pool.shutdown, cancel_futures=True)  # so that Ctrl-C waits for the tests under way only
        tests = sorted({mutant.test for mutant in todo})
        broken = set(chain(*pool.map(broken_of, (tests[job :: options.jobs] for job in range(options.jobs)))))
        for test in sorted(broken):
            print(f"{test} does not pass without any change.", flush=True)
        for mutant, fate, reason, seconds in pool.map(judge, todo):
            fates.append(fate)
            detail = reason or (mutant.test if fate == SURVIVED else "")
            print(f"{mutant.number:>3}  {fate:<14}  {seconds:5.1f} s  {mutant.name}  {detail}".rstrip(), flush=True)
    counts = ", ".join(f"{fates.count(fate)} {fate}" for fate in (KILLED, SURVIVED, NOT_APPLICABLE))
    print(f"{len(fates)} mutants: {counts}")
    return 0 if fates.count(KILLED) == len(fates) else 1


if __name__ == "__main__":
    sys.exit(main())
