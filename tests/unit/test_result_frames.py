"""`to_arrow`, `to_pandas`, `to_polars`: one schema, whether there are rows or none."""

from __future__ import annotations

import json
import subprocess
import sys
from datetime import UTC, datetime, timedelta
from typing import Any

import pandas as pd
import polars as pl
import pyarrow as pa
import pytest

from agent_gateway_store import GatewayStore, Page, Stats
from agent_gateway_store.errors import MissingExtraError
from agent_gateway_store.models.approval import ApprovalRequest
from agent_gateway_store.models.audit import AuditEvent, RedactionFlag
from agent_gateway_store.models.keys import ApiKey
from agent_gateway_store.results.arrow import arrow_schema, conform
from agent_gateway_store.results.cells import columns_of
from builders import make_event

pytestmark = pytest.mark.unit

STAMP, WORDS = pa.timestamp("us", tz="UTC"), pa.dictionary(pa.int32(), pa.string())


def events() -> Page[AuditEvent]:
    """Two events that differ in what may be missing."""
    return Page(
        [
            make_event(
                timestamp=datetime(2026, 5, 1, 12, 0, 0, 123456, tzinfo=UTC),
                decision="DENY",
                risk_labels=["A", 'quote"'],
                redaction_flags=[RedactionFlag(field="x", reason="Y")],
            ),
            make_event(id=7, execution_status="SUCCESS", sanitized_args={"n": None, "ü": [1, 2.5]}),
        ]
    )


def test_the_schema_of_events() -> None:
    """The columns are the fields in their order; times, words, numbers and JSON have the types that are documented."""
    schema = arrow_schema(columns_of(AuditEvent))

    assert schema.names == list(AuditEvent.model_fields)
    for name, kind in (
        ("id", pa.int64()),
        ("timestamp", STAMP),
        ("decision", WORDS),
        ("execution_status", WORDS),
        ("output_decision", WORDS),
        ("latency_ms", pa.int64()),
        ("risk_score", pa.float64()),
        ("sanitized_args", pa.string()),
        ("risk_labels", pa.string()),
        ("redaction_flags", pa.string()),
        ("approval_id", pa.string()),
        ("extra", pa.string()),
        ("request_id", pa.string()),
    ):
        assert schema.field(name).type == kind, name


@pytest.mark.parametrize("record", [AuditEvent, ApprovalRequest, ApiKey])
def test_an_empty_page_has_the_columns_and_types_of_a_full_one(record: type[Any]) -> None:
    page = Page([], record_type=record)

    table, frame, polars = page.to_arrow(), page.to_pandas(), page.to_polars()
    assert table.schema == arrow_schema(columns_of(record))
    assert table.num_rows == len(frame) == polars.height == 0
    assert list(frame.columns) == polars.columns == table.schema.names
    assert not {"token", "key_hash", "previous_key_hash"} & set(table.schema.names)
    for name in table.schema.names:
        if table.schema.field(name).type == STAMP:
            assert frame[name].dtype == pd.DatetimeTZDtype("us", "UTC")
            assert polars.schema[name] == pl.Datetime("us", "UTC")
        if table.schema.field(name).type == WORDS:
            assert isinstance(frame[name].dtype, pd.CategoricalDtype)
            assert polars.schema[name] == pl.Categorical()


def test_rows_keep_every_value() -> None:
    """To the microsecond; missing values are null; JSON reads back."""
    page = events()
    table = page.to_arrow()

    assert table.schema == arrow_schema(columns_of(AuditEvent))
    first, second = table.to_pylist()
    assert first["timestamp"] == page[0].timestamp
    assert (first["id"], second["id"]) == (None, 7)
    assert (first["decision"], first["execution_status"]) == ("DENY", None)
    assert json.loads(first["risk_labels"]) == ["A", 'quote"']
    assert json.loads(first["redaction_flags"]) == [{"field": "x", "reason": "Y", "original_hash": None}]
    assert json.loads(second["sanitized_args"]) == {"n": None, "ü": [1, 2.5]}


def test_frames_have_the_right_types() -> None:
    """Aware times, all words of a category whether or not they occur, whole numbers that stay whole with gaps."""
    page = events()
    frame, polars = page.to_pandas(), page.to_polars()

    assert frame["timestamp"].dtype == pd.DatetimeTZDtype("us", "UTC")
    assert list(frame["decision"].cat.categories) == ["ALLOW", "DENY", "APPROVAL_REQUIRED", "SANITIZE_AND_ALLOW"]
    assert (frame["id"].dtype, frame["latency_ms"].dtype) == ("Int64", "int64")
    assert frame["execution_status"].isna().tolist() == [True, False]
    assert (polars.schema["timestamp"], polars.schema["decision"]) == (pl.Datetime("us", "UTC"), pl.Categorical())
    assert polars["decision"].to_list() == ["DENY", "ALLOW"]
    # Other libraries read a page by `__arrow_c_stream__`.
    assert pa.RecordBatchReader.from_stream(page).read_all().equals(page.to_arrow())


@pytest.mark.parametrize("year", [1, 1900, 2300, 9999])
def test_far_times_convert(year: int) -> None:
    page = Page([make_event(timestamp=datetime(year, 1, 1, tzinfo=UTC))])

    assert page.to_arrow()["timestamp"][0].as_py() == page[0].timestamp
    assert page.to_pandas()["timestamp"][0].year == year
    assert page.to_polars()["timestamp"][0] == page[0].timestamp


def test_text_that_arrow_cannot_hold_becomes_visible() -> None:
    assert Page([make_event(caller_id="a\ud800b")]).to_arrow()["caller_id"][0].as_py() == "a\\ud800b"


def test_plain_dicts_convert() -> None:
    """The type is that of the values; a column of mixed ones becomes text, one without any, too."""
    table = Page(
        [{"n": 1, "x": 1.5, "m": 1, "t": True, "j": {"a": 1}, "e": None}, {"n": None, "x": 2, "m": "a", "new": "b"}]
    ).to_arrow()

    assert [str(field.type) for field in table.schema] == ["int64", "double", *["string"] * 1, "bool", *["string"] * 3]
    assert table.column_names == ["n", "x", "m", "t", "j", "e", "new"]
    assert table.to_pylist()[1] == {"n": None, "x": 2.0, "m": "a", "t": None, "j": None, "e": None, "new": "b"}
    assert Page([]).to_arrow().num_columns == 0


def test_stats_know_their_columns() -> None:
    """Groups are categories, the bucket a time, counts whole, latencies not; empty, too, and in a slice."""
    row = {"bucket": datetime(2026, 5, 1, tzinfo=UTC), "caller_id": "a", "calls": 2, "denials": 0, "approvals": 0}
    stats = Stats(
        [row | {"errors": 1, "latency_p50_ms": 1.5, "latency_p95_ms": 2, "latency_p99_ms": None}],
        by=("caller_id",),
        bucket=timedelta(hours=1),
    )

    schema = stats.to_arrow().schema
    assert schema.names[:3] == ["bucket", "caller_id", "calls"]
    assert [schema.field(name).type for name in ("bucket", "caller_id", "calls", "latency_p95_ms")] == [
        *(STAMP, WORDS, pa.int64(), pa.float64()),
    ]
    assert stats[:0].to_arrow().schema == schema
    assert (stats[:0].by, stats[:0].bucket) == (("caller_id",), timedelta(hours=1))
    assert stats.to_pandas()["latency_p95_ms"][0] == 2.0


def test_settle_gives_every_chunk_the_same_words() -> None:
    """What a bulk read brings, text or dictionaries of any order, gets the one schema; a strange word is refused."""
    table = events().to_arrow()
    as_text = table.set_column(table.schema.names.index("decision"), "decision", table["decision"].cast(pa.string()))
    shuffled = as_text.select(reversed(table.schema.names))

    conformed = conform(pa.concat_tables([shuffled, shuffled]), columns_of(AuditEvent))
    assert conformed.schema == table.schema
    assert {tuple(chunk.dictionary.to_pylist()) for chunk in conformed["decision"].chunks} == {
        ("ALLOW", "DENY", "APPROVAL_REQUIRED", "SANITIZE_AND_ALLOW")
    }
    wrong = as_text.set_column(table.schema.names.index("decision"), "decision", pa.array(["MAYBE", None]))
    with pytest.raises(pa.ArrowInvalid, match="decision holds a value"):
        conform(wrong, columns_of(AuditEvent))


@pytest.mark.parametrize(
    ("method", "missing", "extra"),
    [
        ("to_arrow", ["pyarrow"], "notebook"),
        ("to_pandas", ["pandas"], "notebook"),
        ("to_pandas", ["pyarrow"], "notebook"),
        ("to_polars", ["polars"], "polars"),
        ("to_polars", ["pyarrow"], "polars"),
        ("__arrow_c_stream__", ["pyarrow"], "notebook"),
    ],
)
async def test_a_missing_library_names_its_extra(
    method: str, missing: list[str], extra: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The one that brings all that the method needs, by the method's own name; the rest of a page works."""
    page = events()
    for library in missing:
        monkeypatch.setitem(sys.modules, library, None)
    name = "to_arrow" if method.startswith("_") else method

    with pytest.raises(MissingExtraError, match=rf"^{name}\(\) needs .*agent-gateway-store\[{extra}\]") as caught:
        getattr(page, method)()
    assert caught.value.extra == extra
    assert page._repr_html_()
    assert page.to_dicts()
    if name == method:
        async with GatewayStore("sqlite://") as store:
            with pytest.raises(MissingExtraError) as of_the_log:
                await getattr(store.audit, method)()
        assert str(of_the_log.value) == str(caught.value)


def test_a_page_loads_no_optional_library() -> None:
    code = (
        "import sys; from agent_gateway_store import AuditEvent, Page, Stats\n"
        "Page([], record_type=AuditEvent)._repr_html_()\n"
        "import agent_gateway_store.notebook\n"
        "names = ('pyarrow', 'pandas', 'polars', 'numpy', 'altair', 'anywidget')\n"
        "print([name for name in names if name in sys.modules])"
    )

    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "[]"
