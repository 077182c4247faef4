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
    from agent_gateway_store.cli.app import app

    # A process that was started with standard output closed, as by `>&-`, has None here.
    if sys.stdout is None:
        sys.stdout = Path(os.devnull).open("w")  # noqa: SIM115  it stays open
    for stream in (sys.stdout, sys.stderr):
        with suppress(AttributeError, ValueError):
            # A terminal that cannot show a character gets its escape, where Python would raise UnicodeEncodeError.
            stream.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
    app()
    sys.exit(0)
