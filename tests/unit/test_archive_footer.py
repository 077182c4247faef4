"""Files of an archive that unpack to more than there is memory for are refused, or read in small steps."""

from __future__ import annotations

from hashlib import sha256
from pathlib import Path

import pyarrow as pa
import pytest
from pyarrow import parquet

from agent_gateway_store.archive import Archive, footer
from agent_gateway_store.archive.files import COLUMNS
from agent_gateway_store.archive.footer import Footer
from agent_gateway_store.archive.manifest import NAME, Entry
from agent_gateway_store.errors import ArchiveError
from agent_gateway_store.results.arrow import arrow_schema

pytestmark = pytest.mark.unit

FILE = "day=1970-01-01/000000000000000-00.parquet"


def written(folder: Path, rows: int, text: str) -> Path:
    """An archive of one file, in which each row has the same text."""
    schema = arrow_schema(COLUMNS)
    values = {"text": text, "id": 1, "timestamp": 0}
    arrays = [pa.array([values.get(field.name, values["text"] if field.type == pa.string() else 0)] * rows, field.type)
              for field in schema]  # fmt: skip
    path = folder / FILE
    path.parent.mkdir()
    parquet.write_table(pa.Table.from_arrays(arrays, schema=schema), path, compression="zstd")
    digest = sha256(path.read_bytes()).hexdigest()
    entry = Entry(file=FILE, kind="events", count=rows, positions=[[0, rows - 1]], sha256=digest)
    (folder / NAME).write_text(entry.to_line())
    return path


def test_a_file_that_unpacks_to_more_than_the_limit_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(footer, "_MOST_BYTES", 2**20)
    path = written(tmp_path, 1, "a" * 2**17)
    assert path.stat().st_size < 2**18

    with pytest.raises(ArchiveError, match="unpacks to more than 1,048,576 bytes"):
        Footer(path)

    assert "unpacks to more" in Archive(tmp_path).verify().findings[0].text


def test_a_text_that_every_row_repeats_is_unpacked_for_a_few_rows_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(footer, "_MOST_BYTES", 2**20)
    path = written(tmp_path, 1_000, "a" * 2**10)

    sizes = [batch.nbytes for batch in Footer(path).read()]

    assert len(sizes) > 10
    assert max(sizes) < 2**21


def test_a_file_gives_a_thousand_findings_and_their_number(tmp_path: Path) -> None:
    written(tmp_path, 1_500, "x")

    found = [each.text for each in Archive(tmp_path).verify().findings]

    assert sum("or its leaf, is not what was sealed" in text for text in found) == 1_000
    assert any("holds 1,500 events that are not what was sealed" in text for text in found)
