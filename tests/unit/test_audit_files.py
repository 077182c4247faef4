"""The files of exports: what is there already stays, whenever it came."""

from __future__ import annotations

from pathlib import Path

import pytest

from agent_gateway_store.audit.files import partial

pytestmark = pytest.mark.unit


def test_a_file_that_came_meanwhile_is_not_replaced(tmp_path: Path) -> None:
    """Not even one that another process put there while the export was written; nothing of the export is left."""
    target = tmp_path / "out.jsonl"

    def export() -> None:
        with partial(target, overwrite=False) as written:
            written.write_text("ours")
            target.write_text("theirs")

    with pytest.raises(FileExistsError, match="choose another name"):
        export()
    assert target.read_text() == "theirs"
    assert list(tmp_path.iterdir()) == [target]
