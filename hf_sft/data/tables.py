"""Files of tables, read in pieces: CSV and TSV, Parquet, Arrow, and data sets that ``datasets`` has saved or loads.

Rows are objects from column to value. The values of CSV files are texts, whatever they look like: "007", "NA" and "" stay.
"""

from __future__ import annotations

import csv
import functools
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from hf_sft.data.records import BOM, BadRecord, Record, choose_list, in_list, open_bytes, parse_json, shorten

if TYPE_CHECKING:
    import pyarrow as pa
    from datasets import Dataset

_ROWS = 256  # rows in memory at once
_CELL = 1 << 26  # characters of the longest cell of a CSV file

# ---------------------------------------------------------------------------------------------------------------------
# CSV


def read_csv(path: Path, delimiter: str = ",") -> Iterator[Record]:
    """The rows of a CSV file with a header; cells are quoted by ``"``, which is doubled inside, and may go over lines.

    Blank lines are skipped. A row with more or fewer cells than the header is a BadRecord.

    Raises:
        ValueError: no usable header, JSON, or a quote that is never closed.
    """
    csv.field_size_limit(max(csv.field_size_limit(), _CELL))
    with open_bytes(path) as file:
        lines = _Lines(file)
        rows = _rows(path, lines, delimiter)
        header: list[str] | None = None
        for number, row in rows:
            if header is None:
                header = _header(path, row, delimiter)
            elif isinstance(row, BadRecord):
                yield Record(number, row)
            elif len(row) != len(header):
                found = f"{len(row)} cell{'s' * (len(row) != 1)}"
                yield Record(number, BadRecord(f"the row has {found}, but the header has {len(header)}"))
            else:
                yield Record(number, dict(zip(header, row, strict=True)))


class _Lines:
    """Decoded lines; remembers what was wrong with one."""

    def __init__(self, file: BinaryIO) -> None:
        self.file, self.first, self.ended = file, True, False
        self.wrong: str | None = None

    def __iter__(self) -> _Lines:
        return self

    def __next__(self) -> str:
        line = self.file.readline()
        if not line:
            self.ended = True
            raise StopIteration
        line = line.removeprefix(BOM) if self.first else line
        self.first = False
        try:
            return line.decode("utf-8")
        except UnicodeDecodeError as error:
            byte = f"byte 0x{line[error.start]:02x} at position {error.start} of a line"
            self.wrong = f"invalid UTF-8: {byte}; save the file as UTF-8"
            return line.decode("utf-8", "replace")


def _rows(path: Path, lines: _Lines, delimiter: str) -> Iterator[tuple[int, list[str] | BadRecord]]:
    """Line number and cells of each row that is not blank."""
    rows = csv.reader(lines, delimiter=delimiter, strict=True)
    while True:
        start = rows.line_num + 1
        row: list[str] | BadRecord
        try:
            row = next(rows)
        except StopIteration:
            return
        except csv.Error as error:
            if lines.ended or "field limit" in str(error):
                raise ValueError(
                    f"{path}, line {start}: a quote that is opened here or soon after is not closed, and hides the rows behind "
                    'it. Close it; a quote inside a cell is written twice, "".'
                ) from None
            span = f" in lines {start} to {rows.line_num}" if rows.line_num > start else ""
            row = BadRecord(f"no CSV{span}: {error}; a cell with quotes stands in quotes, and its own are doubled")
        if lines.wrong:
            row, lines.wrong = BadRecord(lines.wrong), None
        if row:
            yield start, row


def _header(path: Path, row: list[str] | BadRecord, delimiter: str) -> list[str]:
    way_out = "The first line names the columns, such as question,answer."
    if isinstance(row, BadRecord):
        raise ValueError(f"{path}: the header cannot be read: {row.reason}. {way_out}")
    names = [name.strip() for name in row]
    if row[0].lstrip()[:1] in ("{", "["):
        raise ValueError(
            f"{path} holds JSON, not a table: it begins with {shorten(row[0])!r}. Name it .jsonl or .json."
        )
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"{path}: the header names {shorten(twice[0])!r} twice. Rename one of the columns.")
    others = [char for char in ",;\t" if char != delimiter and len(names) == 1 and char in names[0]]
    if others:
        raise ValueError(
            f"{path}: the header is one name, {shorten(names[0])!r}; the columns seem to be separated by {others[0]!r}. "
            f"Save the file with {delimiter!r} between them{', or name it .tsv' if others[0] == chr(9) else ''}."
        )
    return names


# ---------------------------------------------------------------------------------------------------------------------
# Parquet and Arrow


def read_parquet(path: Path) -> Iterator[Record]:
    """The rows of a Parquet file, in pieces of its row groups.

    Raises:
        ValueError: a damaged file.
    """
    import pyarrow.parquet as parquet

    def batches() -> Iterator[pa.RecordBatch]:
        with parquet.ParquetFile(path, memory_map=True) as file:
            yield from file.iter_batches(batch_size=_ROWS)

    return _records(batches(), path, "Parquet file")


def read_arrow(path: Path) -> Iterator[Record]:
    """The rows of a memory-mapped Arrow file, in the stream or the file format of IPC.

    Where ``input_ids`` are single numbers, each record batch is a text of which every token is learned.

    Raises:
        ValueError: a damaged file.
    """
    import pyarrow as pa

    def batches() -> Iterator[pa.RecordBatch]:
        with pa.memory_map(str(path)) as source:
            head = source.read(6)
            source.seek(0)
            if head == b"ARROW1":
                file = pa.ipc.open_file(source)
                found: Iterator[pa.RecordBatch] = (file.get_batch(i) for i in range(file.num_record_batches))
            else:
                found = iter(pa.ipc.open_stream(source))
            for batch in found:
                batch.validate(full=True)  # lengths that do not fit would be read from elsewhere in memory
                yield _joined(batch)

    return _records(batches(), path, "Arrow file")


def _joined(batch: pa.RecordBatch) -> pa.RecordBatch:
    """One token row of a batch whose rows are single tokens; others as they are."""
    import pyarrow as pa

    place = batch.schema.get_field_index("input_ids")
    if place < 0 or not batch.num_rows or not pa.types.is_integer(batch.schema.field(place).type):
        return batch
    row = pa.ListArray.from_arrays(pa.array([0, batch.num_rows], pa.int32()), batch.column(place))
    return pa.RecordBatch.from_arrays([row, row], names=["input_ids", "labels"])


def _records(tables: Iterator[Any], where: Any, kind: str) -> Iterator[Record]:
    """The rows of tables or record batches; a row that cannot be turned into Python values is a BadRecord."""
    import pyarrow as pa

    number = 0
    convert: Callable[[Any], Any] | None = None
    while True:
        try:
            table = next(tables, None)
            if table is None:
                return
            if number == 0:
                names = table.schema.names
                if twice := sorted({name for name in names if names.count(name) > 1}):
                    raise ValueError(f"two columns are called {twice[0]!r}")
                convert = _json_columns(pa.struct(list(table.schema)))
        except (pa.ArrowException, OSError, ValueError, OverflowError, MemoryError, EOFError) as error:
            raise ValueError(
                f"{where} is no {kind} that can be read: {shorten(str(error), 300)}. Make it again."
            ) from None
        for start in range(0, table.num_rows, _ROWS):
            for value in _values(table.slice(start, _ROWS)):
                number += 1
                yield Record(number, value if convert is None else _converted(value, convert), "row")


def _values(table: Any) -> list[Any]:
    import pyarrow as pa

    try:
        return list(table.to_pylist())
    except (pa.ArrowException, ValueError, OverflowError, TypeError, KeyError) as error:
        if table.num_rows == 1:
            return [BadRecord(f"a value cannot be read: {shorten(str(error), 120)}")]
        return [value for row in range(table.num_rows) for value in _values(table.slice(row, 1))]


def _json_columns(kind: pa.DataType) -> Callable[[Any], Any] | None:
    """What turns the JSON texts inside a value of this type into values, None if there are none."""
    import pyarrow as pa

    if getattr(kind, "extension_name", None) == "arrow.json":
        return _parse_cell
    if pa.types.is_struct(kind):
        fields = {kind.field(i).name: _json_columns(kind.field(i).type) for i in range(kind.num_fields)}
        known = {name: change for name, change in fields.items() if change is not None}
        if not known:
            return None
        return lambda value: value and {k: known[k](v) if k in known else v for k, v in value.items()}
    if pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind):
        change = _json_columns(kind.value_type)
        return change and (lambda value: value and [change(item) for item in value])
    return None


def _parse_cell(text: str | None) -> Any:
    value = None if text is None else parse_json(text)
    if isinstance(value, BadRecord):
        raise ValueError(value.reason)
    return value


def _converted(value: Any, convert: Callable[[Any], Any]) -> Any:
    try:
        return value if isinstance(value, BadRecord) else convert(value)
    except ValueError as error:
        return BadRecord(str(error))


# ---------------------------------------------------------------------------------------------------------------------
# Data sets of the library datasets


def is_saved(folder: Path) -> bool:
    """Whether ``save_to_disk`` of a Dataset or a DatasetDict has written a folder."""
    return (folder / "dataset_dict.json").is_file() or (
        (folder / "state.json").is_file() and (folder / "dataset_info.json").is_file()
    )


def load_saved(folder: Path) -> Dataset | Mapping[str, Dataset]:
    """The data set in a folder of ``save_to_disk``, memory-mapped.

    Raises:
        ValueError: the folder is damaged.
    """
    from datasets import load_from_disk

    try:
        return load_from_disk(str(folder))
    except Exception as error:  # whatever a damaged file leads to
        raise ValueError(
            f"{folder} looks like a data set of save_to_disk and cannot be loaded: {_said(error)}. Save it again."
        ) from error


@functools.lru_cache(maxsize=4)
def load_hub(
    name: str, config: str | None, split: str | None, revision: str | None, streaming: bool = False
) -> Dataset | Mapping[str, Dataset]:
    """A data set of the hub, downloaded if it is not in the hub's cache; with ``streaming`` read from the hub as it is used.

    Raises:
        ValueError: no such data set, no way to the hub, a configuration that there is not.
    """
    from datasets import load_dataset

    settings = {"config": config, "split": split, "revision": revision}
    named = "".join(f", {key} {value}" for key, value in settings.items() if value is not None)
    try:
        return load_dataset(name, config, split=split, revision=revision, streaming=streaming)
    except Exception as error:  # of the hub's client, of the network, of the data set itself
        raise ValueError(
            f"{name}: no such file or folder under {Path.cwd()}, and no data set of the hub could be loaded by that "
            f"name{named}: {_said(error)}. Check the name; where the hub cannot be reached, download the data set "
            "elsewhere and name the folder of its files."
        ) from error


def _said(error: Exception) -> str:
    return f"{type(error).__name__}: {shorten(str(error), 300)}".rstrip(".")


def sizes_of(data: Dataset | Mapping[str, Dataset]) -> dict[str, int]:
    """Split -> rows (1 for a stream, whose rows are not counted); nothing for a data set without splits."""
    if not isinstance(data, Mapping):
        return {}
    return {name: len(rows) if hasattr(rows, "__len__") else 1 for name, rows in data.items()}


def read_dataset(
    data: Dataset | Mapping[str, Dataset], where: Any, part: str | None = None, split: str | None = None
) -> Iterator[Record]:
    """The rows of a data set, or of one of its splits; see ``records.choose_list``.

    Raises:
        ValueError: no such split.
    """
    if isinstance(data, Mapping):
        name = choose_list(sizes_of(data), part, split, where)
        return in_list(read_dataset(data[name], where), name)
    return _records(data.with_format("arrow").iter(_ROWS), where, "data set")
