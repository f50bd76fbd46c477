import io

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from gpt2.data.sources import parquet, text
from gpt2.data.sources.parquet import parquet_documents
from gpt2.errors import UserError


def file_of(columns, **options):
    buffer = io.BytesIO()
    pq.write_table(pa.table(columns), buffer, **options)
    return buffer


def read(buffer, column="text"):
    return ["".join(document) for document in parquet_documents(buffer, "mine", column)]


def refusal(buffer, column="text"):
    with pytest.raises(UserError) as raised:
        read(buffer, column)
    message = str(raised.value)
    assert message.startswith("mine")
    assert "\n" not in message
    return message


@pytest.mark.parametrize(
    "kind", [pa.string(), pa.large_string(), pa.string_view(), pa.dictionary(pa.int32(), pa.string())]
)
def test_each_row_is_a_document(kind):
    texts = [f"text {number}\r\n" for number in range(100)]
    column = pa.array([*texts, None, ""], pa.string()).cast(kind)
    buffer = file_of({"id": range(102), "text": column}, row_group_size=30)
    assert read(buffer) == [text.replace("\r\n", "\n") for text in texts] + ["", ""]


def test_a_file_without_rows_has_no_documents():
    assert read(file_of({"text": pa.array([], pa.string())})) == []


@pytest.mark.parametrize(
    ("columns", "expected"),
    [
        ({"text": [1, 2]}, "the column 'text' is of type int64; expected string"),
        ({"text": [["a"]]}, "expected string"),
        ({"text": [b"a"]}, "is of type binary; expected string"),
        ({"id": [1], "body": ["a"]}, "mine has no column 'text', but 'id', 'body'; set corpus.text_column"),
    ],
)
def test_another_column_is_refused(columns, expected):
    assert expected in refusal(file_of(columns))


def test_a_column_that_is_there_twice_is_refused():
    buffer = io.BytesIO()
    pq.write_table(pa.Table.from_arrays([pa.array(["a"]), pa.array(["b"])], ["text", "text"]), buffer)
    assert "more than once" in refusal(buffer)


def test_damaged_files_are_refused():
    whole = file_of({"text": [f"text {number}" * 9 for number in range(1000)]}, compression="zstd").getvalue()
    middle = len(whole) // 3
    for damaged in (
        b"",
        b"not parquet",
        whole[:-20],
        whole[: len(whole) // 2],
        whole[:middle] + b"\0" * 50 + whole[middle + 50 :],
    ):
        assert "damaged, incomplete or of another format" in refusal(io.BytesIO(damaged))


def test_a_text_that_is_not_utf8_is_refused():
    latin = pa.Array.from_buffers(pa.string(), 1, pa.array([b"caf\xe9"]).buffers())
    assert "a text in row group 0 is not UTF-8" in refusal(file_of({"text": latin}))


def test_a_file_of_very_many_columns_is_refused(monkeypatch):
    monkeypatch.setattr(parquet, "MAX_METADATA_ENTRIES", 1000)
    assert read(file_of({f"c{number}": ["a"] for number in range(900)}), "c899") == ["a"]
    assert "mine has more than 1,000 columns or row groups" in refusal(file_of({f"c{n}": ["a"] for n in range(1100)}))


def test_a_file_that_expands_without_bounds_is_refused(monkeypatch):
    monkeypatch.setattr(text, "EXPANSION_FREE_BYTES", 100_000)
    assert "like a zip bomb" in refusal(file_of({"text": ["a" * 10_000] * 10_000}))
