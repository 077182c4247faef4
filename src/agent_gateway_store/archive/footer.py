"""The end of a Parquet file: readers leave rows out, and make room for them, by what it says, so it must be true."""

from __future__ import annotations

import struct
from collections import Counter
from collections.abc import Iterator, Sequence
from io import SEEK_CUR, SEEK_END, BytesIO
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, TypeAlias

from agent_gateway_store.archive.files import COLUMNS
from agent_gateway_store.errors import ArchiveError
from agent_gateway_store.results.arrow import arrow_schema
from agent_gateway_store.storage.files import open_regular

if TYPE_CHECKING:
    import pyarrow as pa

_Struct: TypeAlias = dict[int, Any]
"""One of Thrift: values by the numbers of their fields, which are those of parquet.thrift."""

_MAGIC = b"PAR1"
# What this package never writes, and some reader goes by: encryption; other words than the schema of Arrow; sorting;
# other files and page indexes; words on a column, index pages, Bloom filters and shapes.
_WORDS = {b"ARROW:schema"}
_NOT_IN_FILE, _NOT_IN_GROUP, _NOT_IN_CHUNK, _NOT_IN_COLUMN = {8, 9}, {4}, {1, 4, 5, 6, 7, 8, 9}, {8, 10, 14, 15, 17}
_DISTINCT_COUNT = 4
# As parquet.thrift numbers INT64, DOUBLE and BYTE_ARRAY.
_PHYSICAL = {"int64": 2, "timestamp[us, tz=UTC]": 2, "double": 5, "string": 6}
# By the kind of a page: the field of its header that says more, and in that the one of the encoding.
_DICTIONARY, _PAGES = 2, {0: (5, 2), 2: (7, 2), 3: (8, 4)}
# Chosen: a prune writes some 5 MiB to a file, and the largest event that can be imported is a line of 32 MiB.
_MOST_BYTES = 2**30
# Chosen: what a batch takes where its rows are large.
_BATCH_BYTES = 2**26
BATCH_ROWS = 10_000
"""How many are in memory at once, at most. Chosen: with rows of 5 kB about 50 MB."""
# A number of 64 bits, seven to a byte.
_MOST_SHIFT = 63


class Footer:
    """What a file says of itself.

    Attributes:
        rows: How many there are.

    Raises:
        ArchiveError: It is not a Parquet file, or one that takes too much memory.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        try:
            with open_regular(path) as file:
                file.seek(-8, SEEK_END)
                length, magic = struct.unpack("<I4s", file.read(8))
                if magic != _MAGIC:
                    raise ValueError(magic)
                file.seek(-8 - length, SEEK_END)
                self._said = _struct(BytesIO(file.read(length)))
                self.rows: int = self._said[3]
                self._groups = [_Group(each, file) for each in self._said[4]]
        except Exception as exc:
            # What a file can be made to hold: every error means the same.
            raise _unreadable(path) from exc
        if any(group.unpacked > _MOST_BYTES for group in self._groups):
            raise ArchiveError(f"{path} unpacks to more than {_MOST_BYTES:,} bytes in one piece.", file=path.name)

    def read(self, lies: set[str] | None = None) -> Iterator[pa.RecordBatch]:
        """Yield all rows, whatever is said of them, in batches that fit in memory.

        Args:
            lies: Receives the names of columns of which the file says what is not so.

        Raises:
            ArchiveError: It has other columns than an archive, or cannot be read.
        """
        from pyarrow import parquet

        schema = arrow_schema(COLUMNS)
        try:
            with parquet.ParquetFile(self._path) as file:
                require_columns(self._path, file.schema_arrow)
                for number, group in enumerate(self._groups):
                    found = [_Bounds() for _ in schema]
                    for batch in file.iter_batches(group.batch_rows, row_groups=[number], use_threads=False):
                        if lies is not None:
                            for bounds, column in zip(found, batch.columns, strict=True):
                                bounds.add(column)
                        yield batch
                    if lies is not None:
                        lies |= group.lies(schema, found)
        except ArchiveError:
            raise
        except Exception as exc:
            raise _unreadable(self._path) from exc
        words = {each[1] for each in self._said.get(5, ())}
        rows = sum(group.rows for group in self._groups)
        if lies is not None and (words - _WORDS or self._said.keys() & _NOT_IN_FILE or rows != self.rows):
            lies.add("all")


class _Group:
    """What is said of a group of rows, how many bytes of it are unpacked at a time, and how many rows to read so."""

    def __init__(self, said: _Struct, file: IO[bytes]) -> None:
        self._said, self.rows = said, said[3]
        self._pages = [list(_pages(file, chunk[3])) for chunk in said[1]]
        # Of each column its dictionary, and one page.
        dictionaries = largest = 0
        row_bytes = 0.0
        for pages in self._pages:
            dictionaries += sum(page[2] for page in pages if page[1] == _DICTIONARY)
            data = [page for page in pages if page[1] != _DICTIONARY]
            largest += max((page[2] for page in data), default=0)
            row_bytes += max((page[2] / max(1, _values(page)) for page in data), default=0)
        self.unpacked = dictionaries + largest
        # A text of a dictionary is there once, and unpacked once for each row.
        fitting = min(_BATCH_BYTES // max(1, row_bytes), _MOST_BYTES // max(1, dictionaries))
        self.batch_rows = max(1, min(BATCH_ROWS, int(fitting)))

    def lies(self, schema: pa.Schema, found: Sequence[_Bounds]) -> set[str]:
        """Return the names of columns that hold something else than is said of them."""
        if self._said.keys() & _NOT_IN_GROUP:
            return {"all"}
        checked = zip(schema, self._said[1], self._pages, found, strict=True)
        return {field.name for field, *each in checked if not self._is_true(field, *each)}

    def _is_true(self, field: pa.Field, chunk: _Struct, pages: Sequence[_Struct], found: _Bounds) -> bool:
        column = chunk[3]
        encoded = Counter((page[1], page[at][place]) for page in pages for at, place in [_PAGES[page[1]]])
        said = Counter({(each[1], each[2]): each[3] for each in column.get(13, ())})
        return (
            not chunk.keys() & _NOT_IN_CHUNK
            and not column.keys() & _NOT_IN_COLUMN
            and column[1] == _PHYSICAL[str(field.type)]
            # Spark looks a column up by its name here, others by its place.
            and column[3] == [field.name.encode()]
            and column[5] == self.rows == found.rows
            # By these, readers look into the dictionary alone.
            and said in (Counter(), encoded)
            and found.fit(column.get(12, {}))
        )


class _Bounds:
    """The least and the greatest value of a column, and how many are NULL."""

    def __init__(self) -> None:
        self.rows = self.nulls = 0
        self.low: Any = None
        self.high: Any = None

    def add(self, column: pa.Array) -> None:
        import pyarrow as pa
        import pyarrow.compute as pc

        self.rows += len(column)
        self.nulls += column.null_count
        found = pc.min_max(column.view(pa.int64()) if pa.types.is_timestamp(column.type) else column).as_py()
        # NaN, which counts for no bound, is unlike itself.
        if found["min"] is not None and found["min"] == found["min"]:
            self.low = found["min"] if self.low is None else min(self.low, found["min"])
            self.high = found["max"] if self.high is None else max(self.high, found["max"])

    def fit(self, said: _Struct) -> bool:
        """True if the statistics of a column say this, as far as they say anything."""
        low, high = _plain(self.low, zero=-0.0), _plain(self.high, zero=0.0)
        # Bounds have two fields each, of which the first two are those of older readers; the last say: exactly that.
        expected = {1: high, 2: low, 3: self.nulls, 5: high, 6: low, 7: True, 8: True}
        return _DISTINCT_COUNT not in said and all(said.get(each, value) == value for each, value in expected.items())


def _plain(value: Any, *, zero: float) -> bytes | None:
    """Return a bound as Parquet writes it; of the two zeros, the outer one."""
    if isinstance(value, float):
        return struct.pack("<d", value or zero)
    if isinstance(value, int):
        return struct.pack("<q", value)
    return None if value is None else str(value).encode()


def require_columns(path: Path, schema: pa.Schema) -> None:
    """Raise ArchiveError unless these are the columns of an archive: other readers take each column that there is."""
    if not schema.equals(arrow_schema(COLUMNS)):
        raise ArchiveError(f"{path} has other columns than an archive: restore it from a backup.", file=path.name)


def _unreadable(path: Path) -> ArchiveError:
    return ArchiveError(f"{path} cannot be read: restore it from a backup.", file=path.name)


def _pages(file: IO[bytes], column: _Struct) -> Iterator[_Struct]:
    """Yield the headers of the pages of a column."""
    file.seek(min(column[9], column.get(11, column[9])))
    left = column[5]
    while left > 0:
        page = _struct(file)
        if min(page[2], page[3]) < 0:
            raise ValueError("A page has less than nothing.")
        if page[1] != _DICTIONARY:
            left -= _values(page)
        yield page
        file.seek(page[3], SEEK_CUR)
    if left:
        raise ValueError("A page has more values than its column.")


def _values(page: _Struct) -> int:
    """Return how many values a data page has, as its header says."""
    count: int = page[_PAGES[page[1]][0]][1]
    return count


def _struct(file: IO[bytes]) -> _Struct:
    """Read a struct in Thrift's compact protocol; ValueError if a field is there twice."""
    found: _Struct = {}
    number = 0
    while head := _byte(file):
        number = number + (head >> 4) if head >> 4 else _integer(file)
        if number in found:
            raise ValueError("A field is there twice.")
        # The value of a flag is its type.
        found[number] = (head & 15) == 1 if head & 15 in (1, 2) else _value(file, head & 15)
    return found


def _value(file: IO[bytes], kind: int) -> Any:
    match kind:
        case 1 | 2:
            return _byte(file) == 1
        case 3:
            return _byte(file)
        case 4 | 5 | 6:
            return _integer(file)
        case 7:
            return _bytes(file, 8)
        case 8:
            return _bytes(file, _varint(file))
        case 9 | 10:
            head = _byte(file)
            count = head >> 4 if head >> 4 != 15 else _varint(file)
            return [_value(file, head & 15) for _ in range(count)]
        case 12:
            return _struct(file)
    raise ValueError(f"There is no type {kind}.")


def _bytes(file: IO[bytes], length: int) -> bytes:
    found = file.read(length)
    if len(found) != length:
        raise ValueError("The file ends in the midst of a value.")
    return found


def _byte(file: IO[bytes]) -> int:
    return _bytes(file, 1)[0]


def _varint(file: IO[bytes]) -> int:
    found = shift = 0
    while shift <= _MOST_SHIFT:
        each = _byte(file)
        found |= (each & 127) << shift
        if each < 128:
            return found
        shift += 7
    raise ValueError("A number has more than 64 bits.")


def _integer(file: IO[bytes]) -> int:
    found = _varint(file)
    return (found >> 1) ^ -(found & 1)
