"""Rows as Arrow tables, block by block, without an object for each: by COPY on PostgreSQL, by rows on SQLite."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator, Mapping
from contextlib import aclosing
from functools import partial
from typing import TYPE_CHECKING, Any

from agent_gateway_store.results.arrow import arrow, arrow_schema, conform, text_schema
from agent_gateway_store.results.cells import Column
from agent_gateway_store.storage.database import Database
from agent_gateway_store.storage.statements import Statement
from agent_gateway_store.storage.streaming import Rows, built, copied, streamed

if TYPE_CHECKING:
    import pyarrow as pa

DAY = "%Y-%m-%d"
"""How the day of a file is written, in the name of its folder."""

# Chosen for SQLite, where each batch costs a call in a thread: of a block of the size below.
_BATCH_ROWS = 10_000
# Chosen: bounds memory, where a block is held as text and as a table.
_BLOCK_BYTES = 8 * 2**20
# Measured: to parse less in several threads takes twice the time, and more memory.
_THREADS_BYTES = 2 * 2**20


async def arrow_blocks(
    database: Database,
    statement: Statement,
    values: Mapping[str, Any],
    columns: tuple[Column, ...],
    take: Callable[[pa.Table], None],
    *,
    block_bytes: int = _BLOCK_BYTES,
    parallel: bool = True,
) -> None:
    """Hand the rows of `statement`, which holds `columns`, to `take`: in a thread, table after table, in one snapshot.

    Args:
        block_bytes: About as large is a table; larger ones are read faster and take more memory.
        parallel: As of `copied`.

    Raises:
        MissingExtraError: pyarrow is not installed.
    """
    arrow("Reading into Arrow")
    query = statement.compiled(database.engine.dialect)
    if database.dialect == "postgresql":

        def take_block(block: bytes) -> None:
            take(_from_csv(block, columns))

        await copied(database, query, values, take_block, block_bytes=block_bytes, parallel=parallel)
        return

    def take_rows(rows: Rows) -> None:
        take(built(query, rows, partial(_from_rows, columns=columns)))

    async with aclosing(streamed(database, query, values, batch=_BATCH_ROWS * block_bytes // _BLOCK_BYTES)) as batches:
        async for rows in batches:
            await in_thread(take_rows, rows)


async def whole_table(
    database: Database, statement: Statement, values: Mapping[str, Any], columns: tuple[Column, ...]
) -> pa.Table:
    """Return the rows of `statement` as one table."""
    pa = arrow()
    tables: list[Any] = []
    await arrow_blocks(database, statement, values, columns, tables.append)
    return pa.concat_tables(tables) if tables else conform(arrow_schema(columns).empty_table(), columns)


def by_day(table: pa.Table, column: str) -> Iterator[tuple[str, pa.Table]]:
    """Yield the rows of each day (UTC) of a column, in whose order they are."""
    pa = arrow()
    import pyarrow.compute as pc

    # Named only once for each day: to write a time as text takes 1.6 µs.
    days, start = pc.run_end_encode(table.column(column).cast(pa.date32()).combine_chunks()), 0
    for day, end in zip(pc.strftime(days.values, format=DAY).to_pylist(), days.run_ends.to_pylist(), strict=True):
        yield day, table.slice(start, end - start)
        start = end


async def in_thread(function: Callable[..., Any], *args: Any) -> Any:
    """Call `function` in a thread; a caller that is cancelled still waits for its end, so that it can clean up."""
    task = asyncio.create_task(asyncio.to_thread(function, *args))
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        await asyncio.wait([task])
        raise


def _from_csv(block: bytes, columns: tuple[Column, ...]) -> pa.Table:
    pa = arrow()
    from pyarrow import csv

    types = {field.name: field.type for field in text_schema(columns)}
    # One block for the parser, too, which refuses a row that is longer than its block.
    table = csv.read_csv(
        pa.BufferReader(block),
        read_options=csv.ReadOptions(
            column_names=list(types), block_size=len(block), use_threads=len(block) >= _THREADS_BYTES
        ),
        parse_options=csv.ParseOptions(newlines_in_values=True),
        convert_options=csv.ConvertOptions(
            column_types=types, null_values=[""], strings_can_be_null=True, quoted_strings_can_be_null=False
        ),
    )
    return conform(table, columns)


def _from_rows(rows: Rows, columns: tuple[Column, ...]) -> pa.Table:
    pa = arrow()
    import pyarrow.compute as pc

    schema = text_schema(columns)
    arrays = []
    for column, field, values in zip(columns, schema, zip(*rows, strict=True), strict=True):
        if column.kind == "time":
            array = pc.assume_timezone(pa.array(values, pa.string()).cast(pa.timestamp("us")), "UTC")
        else:
            array = pa.array(values, field.type)
        arrays.append(array)
    return conform(pa.Table.from_arrays(arrays, names=schema.names), columns)
