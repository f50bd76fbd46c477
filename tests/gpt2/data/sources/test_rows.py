import csv
import io
import json

import pytest

from gpt2.data.sources import rows, text
from gpt2.data.sources.rows import csv_documents, jsonl_documents
from gpt2.errors import UserError


def read(reader, content, column="text", chunk_bytes=7):
    data = content if isinstance(content, bytes) else content.encode()
    chunks = (data[start : start + chunk_bytes] for start in range(0, len(data), chunk_bytes))
    return ["".join(document) for document in reader(chunks, "mine", column)]


def refusal(reader, content, **options):
    with pytest.raises(UserError) as raised:
        read(reader, content, **options)
    message = str(raised.value)
    assert message.startswith("mine")
    assert "\n" not in message
    return message


def test_each_line_is_a_document():
    content = '{"text": "a\\r\\nb\\u00e9"}\r\n\n  \n{"id": {"text": 3}, "text": null}\n'
    content += '{"text": "", "x": NaN}\n{"text": "end"}'
    assert read(jsonl_documents, "\ufeff" + content) == ["a\nbé", "", "", "end"]


def test_the_column_can_be_chosen():
    assert read(jsonl_documents, '{"body": "a", "text": 3}', column="body") == ["a"]
    assert read(csv_documents, "text,body\n3,a\n", column="body") == ["a"]


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ('{"text": "a"', "not JSON (Expecting ',' delimiter at character 13)"),
        ('{"text": "a"} x', "not JSON (Extra data"),
        ('{"text": 3}', "the column 'text' is a number; expected text"),
        ('{"text": true}', "is true or false"),
        ('{"text": ["a"]}', "is a list"),
        ('["text"]', 'expected a JSON object such as {"text": ...}'),
        ('{"text": "a", "text": "b"}', "has the column 'text' more than once"),
        ('{"a": 1, "b": 2}', "has no column 'text', but 'a', 'b'; set corpus.text_column"),
        ("{}", "has no column 'text', but none"),
        ('{"text": "\\ud800"}', "'\\ud800' is half a character"),
        ("[" * 100_000, "cannot be read as JSON"),
        ('{"text": "a", "n": ' + "9" * 5000 + "}", "cannot be read as JSON"),
    ],
)
def test_a_broken_line_of_json_is_named(line, expected):
    message = refusal(jsonl_documents, '{"text": "good"}\n' + line + "\n")
    assert message.startswith("mine, line 2:")
    assert expected in message


def test_a_truncated_or_wrongly_encoded_file_is_refused():
    whole = json.dumps({"text": "é" * 20}, ensure_ascii=False)
    assert "mine, line 1: not JSON (Unterminated string" in refusal(jsonl_documents, whole[:20])
    assert "is not UTF-8: byte 0xe9 at offset 10" in refusal(jsonl_documents, whole.encode("latin-1"))
    assert "is not UTF-8" in refusal(csv_documents, b"text\ncaf\xe9\n")


@pytest.mark.parametrize("reader", [jsonl_documents, csv_documents])
def test_a_file_without_rows_has_no_documents(reader):
    assert read(reader, "") == []
    assert read(reader, "\n\n") == []


def test_a_row_that_is_too_long_is_refused(monkeypatch):
    monkeypatch.setattr(text, "MAX_ROW_CHARACTERS", 100)
    monkeypatch.setattr(rows, "MAX_ROW_CHARACTERS", 100)
    long = "a" * 60
    assert read(jsonl_documents, f'{{"text": "{long}"}}\n' * 3) == [long] * 3
    message = refusal(jsonl_documents, f'{{"text": "a"}}\n{{"text": "{long * 2}"}}\n')
    assert message == "mine, line 2: the row is longer than 100 characters; split it into documents"
    assert read(csv_documents, f"text\n{long}\n{long}\n") == [long] * 2
    for unclosed in (f'text\na\n"{long}\n{long}\n', f'text\na\n"{long}{long}'):
        assert refusal(csv_documents, unclosed).startswith("mine, line 3: the row is longer than 100 characters")


@pytest.mark.parametrize("chunk_bytes", [1, 3, 1000])
def test_quotes_commas_and_line_ends_in_csv(chunk_bytes):
    texts = ['say "hello", she said', "two\nlines\n\nand a blank one", ' "" ', "漢字, é", "\x0b\x85\u2028", ""]
    buffer = io.StringIO()
    writer = csv.writer(buffer)  # with CRLF
    writer.writerows([["id", "text"], *enumerate(texts)])
    assert read(csv_documents, "\ufeff" + buffer.getvalue(), chunk_bytes=chunk_bytes) == texts


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ('text\na\n"not\nclosed', "mine, line 3: not CSV (unexpected end of data)"),
        ('text\n"a"b\n', "mine, line 2: not CSV"),
        ("id,text\n1,a\n2,b,c\n", "mine, line 3: 3 fields, but the header has 2"),
        ('id,text\n1,"a\nb"\n2\n', "mine, line 4: 1 fields, but the header has 2"),
        ("text,text\na,b\n", "mine has the column 'text' more than once"),
        ("id,body\n1,a\n", "mine has no column 'text', but 'id', 'body'; set corpus.text_column"),
    ],
)
def test_broken_csv_is_refused(content, expected):
    assert expected in refusal(csv_documents, content)


def test_a_csv_of_a_million_columns_is_read_or_names_ten(monkeypatch):
    names = ",".join(f"column {number}" for number in range(1_000_000))
    assert read(csv_documents, f"{names},text\n{',' * 1_000_000}a\n", chunk_bytes=1 << 20) == ["a"]
    message = refusal(csv_documents, names, chunk_bytes=1 << 20)
    assert "'column 0', 'column 1'," in message
    assert "'column 9' and 999,990 more; set" in message
    assert len(message) < 300


def test_hostile_names_of_columns_stay_on_one_line():
    message = refusal(jsonl_documents, json.dumps({"a\nb" + "x" * 1_000_000: 1}))
    assert "'a\\nbxxx" in message
    assert len(message) < 300
