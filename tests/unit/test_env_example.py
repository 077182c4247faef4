"""`.env.example` names every setting and can be loaded as it stands."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from annotated_types import Ge, Le

from agent_gateway_store import StoreSettings

pytestmark = pytest.mark.unit

ROOT = Path(__file__).parents[2]
FILE = ROOT / ".env.example"
_LINE = re.compile(r"^(# )?([A-Z][A-Z0-9_]*)=(.*)$", re.MULTILINE)


@pytest.fixture
def named() -> dict[str, str]:
    """Name to value, of lines in force and of examples alike."""
    return {name: value for _, name, value in _LINE.findall(FILE.read_text())}


def test_every_setting_of_the_example_gateway_is_named(named: dict[str, str]) -> None:
    """The gateway's own settings are in the file, and the file names nothing that nobody reads."""
    source = (ROOT / "examples/fastapi_gateway/config.py").read_text()
    fields = re.findall(r"^    ([a-z_]+): [A-Za-z]+ = ", source, re.MULTILINE)

    assert len(fields) >= 5
    assert {name for name in named if name.startswith("GATEWAY_")} == {f"GATEWAY_{field.upper()}" for field in fields}
    assert {name for name in named if not name.startswith("GATEWAY_")} == {
        field.upper() for field in StoreSettings.model_fields
    }


def test_file_holds_the_defaults(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("AUDIT_SPOOL_PATH", "BCRYPT_ROUNDS", "APPROVAL_MAX_PENDING"):
        monkeypatch.delenv(name)

    assert StoreSettings(_env_file=FILE) == StoreSettings()  # type: ignore[call-arg]


def test_examples_of_unset_settings_can_be_taken(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("AUDIT_SPOOL_PATH", "BCRYPT_ROUNDS", "APPROVAL_MAX_PENDING"):
        monkeypatch.delenv(name)
    everything = tmp_path / "all.env"
    everything.write_text(_LINE.sub(r"\2=\3", FILE.read_text()))

    settings = StoreSettings(_env_file=everything)  # type: ignore[call-arg]

    assert settings.redis_url == "redis://localhost:6379/0"
    assert settings.hash_key is not None
    assert str(settings.audit_spool_path) == "/var/lib/gateway/spool.db"


def test_each_setting_has_a_comment(named: dict[str, str]) -> None:
    lines = FILE.read_text().splitlines()

    for name in named:
        index = next(i for i, line in enumerate(lines) if line.removeprefix("# ").startswith(f"{name}="))
        assert re.match(r"# [A-Z]", lines[index - 1]), name


def test_ranges_in_comments_are_those_that_are_taken() -> None:
    ranges = re.findall(r"\((\d+) to (\d+)\)\n([A-Z_]+)=", FILE.read_text())

    assert ranges
    for low, high, name in ranges:
        bounds = StoreSettings.model_fields[name.lower()].metadata
        assert {Ge(int(low)), Le(int(high))} <= {*bounds}
