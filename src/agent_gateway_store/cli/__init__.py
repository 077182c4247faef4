"""The command line `gateway-store`. One module for each group of commands; the store is loaded by those that use it."""

from __future__ import annotations

import os
import sys
from contextlib import suppress
from pathlib import Path
from typing import NoReturn

__all__ = ["main"]


def main() -> NoReturn:
    """Run the command line on `sys.argv` and exit: the console entry point."""
    # A process that was started with one of them closed, as by `>&-`, has None here.
    if sys.stdout is None:
        sys.stdout = Path(os.devnull).open("w")  # noqa: SIM115  it stays open
    if sys.stderr is None:
        sys.stderr = Path(os.devnull).open("w")  # noqa: SIM115  likewise
    for stream in (sys.stdout, sys.stderr):
        with suppress(AttributeError, ValueError):
            # A terminal that cannot show a character gets its escape, where Python would raise UnicodeEncodeError.
            stream.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
    try:
        from agent_gateway_store.cli.app import app

        app()
    except KeyboardInterrupt:
        # Before a command runs, which says so by itself.
        sys.stderr.write("Stopped.\n")
        os._exit(130)
    except OSError as exc:
        # Of printing help.
        sys.stderr.write(f"The output cannot be written: {os.strerror(exc.errno or 0)}.\n")
        os._exit(1)
    sys.exit(0)
