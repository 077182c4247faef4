"""Files and folders of the package are for their owner alone, whatever the umask allows."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest

from agent_gateway_store import GatewayStore, StoreSettings
from agent_gateway_store.audit.spool import Spool
from agent_gateway_store.storage.database import create_engine
from builders import make_event
from commands import gateway_store


@pytest.fixture(autouse=True)
def _everybody_may_read() -> Iterator[None]:
    umask = os.umask(0)
    yield
    os.umask(umask)


def modes(folder: Path) -> dict[str, int]:
    return {str(each.relative_to(folder)): stat.S_IMODE(each.stat().st_mode) for each in folder.rglob("*")}


@pytest.mark.parametrize("form", ["sqlite:///{}", "sqlite:///file:{}?mode=rwc&uri=true"])
async def test_what_a_store_makes_is_for_its_owner(tmp_path: Path, form: str) -> None:
    """The database with the files beside it, the spool with its folders, exports of every kind."""
    settings = StoreSettings(audit_spool_path=tmp_path / "state" / "gateway" / "spool.db")
    async with GatewayStore(form.format(tmp_path / "gateway.db"), redis_url="", settings=settings) as store:
        await store.audit.write(make_event())
        spool = Spool(settings.audit_spool_path, store.database.engine.url, "an identity")
        await spool.add([dict(make_event())])
        for name in ("a.jsonl", "a.csv.gz", "a.jsonl.zst", "a.parquet"):
            await store.audit.export(tmp_path / name)
        await store.audit.export(tmp_path / "days", partition_by="day")
        found = modes(tmp_path)
        await spool.close()

    assert {"gateway.db", "gateway.db-wal", "gateway.db.lock", "state/gateway/spool.db", "a.csv.gz"} <= found.keys()
    assert {
        name: mode for name, mode in found.items() if mode != (0o700 if (tmp_path / name).is_dir() else 0o600)
    } == {}


async def test_a_file_that_was_not_to_be_made_is_not_there(tmp_path: Path) -> None:
    engine = create_engine(f"sqlite:///file:{tmp_path}/gateway.db?mode=rw&uri=true")
    with pytest.raises(Exception, match="unable to open"):
        async with engine.connect():
            pass
    await engine.dispose()

    assert list(tmp_path.iterdir()) == []


def test_doctor_warns_of_files_that_others_may_read(tmp_path: Path) -> None:
    database, state = tmp_path / "gateway.db", tmp_path / "state"
    spool = state / "spool.db"
    env = {"DATABASE_URL": f"sqlite:///{database}", "AUDIT_SPOOL_PATH": str(spool)}
    assert gateway_store("db", "upgrade", **env).code == 0
    state.mkdir(0o755)
    spool.touch(0o640)
    database.chmod(0o644)
    warned = gateway_store("doctor", **env)
    for command in (f"chmod 600 {database}", f"chmod 700 {state}", f"chmod 600 {spool}"):
        assert f"run `{command}`" in warned.err
    assert "mode 0644" in warned.err
    database.chmod(0o600)
    state.chmod(0o700)
    spool.unlink()

    assert "chmod" not in gateway_store("doctor", **env).err
