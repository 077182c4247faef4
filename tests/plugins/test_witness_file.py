"""The plugin `witness-file`: every checkpoint is kept, in a form that `evidence verify --against` reads."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from agent_gateway_store.evidence.notes import parse_note, split_notes
from agent_gateway_store.plugins.witness_file import WitnessFileSettings, gateway_store_checkpoint
from sealed_log import KEY, SealedLog

pytestmark = pytest.mark.unit

LOG, UNSIGNED = SealedLog(leaves=9), SealedLog(leaves=9, key=None)


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "witness.txt"
    monkeypatch.setenv("WITNESS_FILE_PATH", f" {path}\n")
    return path


def test_each_checkpoint_is_appended_and_read_back(file: Path) -> None:
    kept = [LOG.checkpoint(3), LOG.checkpoint(7), UNSIGNED.checkpoint(8), UNSIGNED.checkpoint(9), LOG.checkpoint(9)]
    umask = os.umask(0)
    try:
        for checkpoint in kept:
            gateway_store_checkpoint(checkpoint)
    finally:
        os.umask(umask)

    notes = split_notes(file.read_text())
    assert notes == [checkpoint.note for checkpoint in kept]
    assert [parse_note(note).signed_by([KEY.verifier]) for note in notes] == [True, True, None, None, True]
    assert stat.S_IMODE(file.stat().st_mode) == 0o600


def test_one_note_alone_is_read_as_it_is() -> None:
    """As a monitor saves it, with the lines of other witnesses below; an empty file has none."""
    note = LOG.checkpoint().note + "— witness.example CMp+6LWBU0anHGH5aNDTJkH=\n"

    assert split_notes(note) == [note]
    assert [split_notes("\n" * lines) for lines in (0, 1, 3)] == [[], [], []]


def test_unset_it_does_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    gateway_store_checkpoint(LOG.checkpoint())

    assert list(tmp_path.iterdir()) == []


def test_the_prefixed_setting_wins(file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AGENT_GATEWAY_STORE_WITNESS_FILE_PATH", str(tmp_path / "other.txt"))

    assert WitnessFileSettings().path == tmp_path / "other.txt"


def test_a_folder_that_is_missing_is_an_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("WITNESS_FILE_PATH", str(tmp_path / "missing" / "witness.txt"))
    with pytest.raises(FileNotFoundError):
        gateway_store_checkpoint(LOG.checkpoint())
