import pytest
pytestmark = pytest.mark.integration
async def test_smoke(store, make_event):
    assert await store.audit.write(make_event()) == "STORED"
    assert len(await store.audit.list_recent()) == 1
