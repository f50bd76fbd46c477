"""The rows of Parquet files, each a document: the text of one column."""

from collections.abc import Iterator
from typing import IO, Any

from gpt2.data.sources.rows import missing_column, repeated_column
from gpt2.data.sources.text import DAMAGED, Document, check_expansion, normalize, read_error
from gpt2.errors import UserError

BUFFER_BYTES = 1 << 20
BATCH_BYTES, MAX_BATCH_ROWS = 1 << 24, 4096
MAX_METADATA_ENTRIES = 100_000
"""Columns, or row groups, of a file."""


def parquet_documents(stream: IO[bytes], name: str, column: str) -> Iterator[Document]:
    """A document for each row: the text in `column`, empty for null. Reads no other column.

    stream: seekable. name: of the file, for messages. Memory is that of some rows and, because Parquet compresses them
    together, of a page. Raises UserError if the file is damaged, or if the column is missing or not of type string.
    """
    import pyarrow.parquet

    try:
        size = stream.seek(0, 2)
        file = pyarrow.parquet.ParquetFile(
            stream, buffer_size=BUFFER_BYTES, pre_buffer=False, thrift_container_size_limit=MAX_METADATA_ENTRIES
        )
        schema = file.schema_arrow
    except (OSError, *DAMAGED) as error:
        if "Exceeded size limit" in str(error):
            raise UserError(
                f"{name} has more than {MAX_METADATA_ENTRIES:,} columns or row groups; write it with fewer"
            ) from None
        raise read_error(name, error) from None
    if column not in schema.names:
        raise missing_column(name, column, schema.names)
    if schema.names.count(column) > 1:
        raise repeated_column(name, column)
    if not _is_text(schema.field(column).type):
        raise UserError(f"{name}: the column {column!r} is of type {schema.field(column).type}; expected string")
    num_bytes = 0
    for texts in _batches(file, name, column):
        for text in texts:
            num_bytes += len(text or "")
            yield (normalize(text or ""),)
        check_expansion(name, num_bytes, size)


def _batches(file: Any, name: str, column: str) -> Iterator[list[str | None]]:
    for group in range(file.num_row_groups):
        metadata = file.metadata.row_group(group)
        row_bytes = metadata.total_byte_size // max(1, metadata.num_rows)
        rows = min(MAX_BATCH_ROWS, max(1, BATCH_BYTES // max(1, row_bytes)))
        try:
            for batch in file.iter_batches(rows, row_groups=[group], columns=[column], use_threads=False):
                yield batch.column(column).to_pylist()
        except UnicodeDecodeError as error:
            raise UserError(f"{name}: a text in row group {group} is not UTF-8 ({error.reason}); correct it") from None
        except (OSError, *DAMAGED) as error:
            raise read_error(name, error) from None


def _is_text(kind: Any) -> bool:
    from pyarrow import types

    if types.is_dictionary(kind):
        kind = kind.value_type
    return bool(types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind))
