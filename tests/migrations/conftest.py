"""The migrations run as they are, on every database."""

from __future__ import annotations

import alembic.command
import pytest

import once


@pytest.fixture(autouse=True)
def _real_migrations(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the shortcut that the other tests take."""
    monkeypatch.setattr(alembic.command, "upgrade", once.migrate)
