import gzip
import io
import json
import zipfile

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from gpt2.data.sources.download import DownloadError
from gpt2.data.sources.formats import documents_of
from gpt2.data.sources.remote import hub_files, is_remote, remote_files
from gpt2.errors import UserError
from tests.gpt2.data.sources.hub import COMMIT, hub_of


def parquet(*texts):
    buffer = io.BytesIO()
    pq.write_table(pa.table({"text": pa.array(texts, pa.string()), "id": range(len(texts))}), buffer)
    return buffer.getvalue()


def rows(*texts):
    return "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()


@pytest.fixture
def hub(monkeypatch):
    files = {
        "README.md": b"the card",
        "default/train/0000.parquet": parquet("a", "b"),
        "default/train/0001.parquet": parquet("c"),
        "default/test/0000.parquet": parquet("no"),
        "more/x.jsonl.gz": gzip.compress(rows("x")),
        "more/y.txt": b"y",
    }
    with hub_of(files) as server:
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", server.url)
        template = f"{server.url}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
        monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda _: None)  # before it tries again
        yield server


def texts(files):
    return ["".join(document) for file in files for document in documents_of(file, "text")]


def test_a_data_set_is_the_train_split_of_its_parquet_conversion(hub):
    found = hub_files("hf://datasets/me/texts")
    assert found.revision == COMMIT
    assert found.name == f"hf://datasets/me/texts@{COMMIT}/default/train/*.parquet"
    assert found.licence == "cc0-1.0"
    assert texts(found.files) == ["a", "b", "c"]
    assert any("/revision/refs%2Fconvert%2Fparquet" in request for request in hub.requests)


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("@v1", ["no", "a", "b", "c", "x", "y"]),
        ("@~parquet/default/test/*.parquet", ["no"]),
        ("/more", ["x", "y"]),
        ("/more/y.txt", ["y"]),
        ("@v1/**/*.jsonl.gz", ["x"]),
        ("@refs/convert/parquet/default/train/0001.parquet", ["c"]),
    ],
)
def test_a_revision_and_a_path_choose_files(hub, path, expected):
    assert texts(hub_files(f"hf://datasets/me/texts{path}").files) == expected


def test_files_are_read_at_the_commit_even_if_the_branch_moves(hub):
    files = hub_files("hf://datasets/me/texts/more").files
    hub.revisions.clear()
    assert texts(files) == ["x", "y"]


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("hf://datasets/me/texts@gone", "there is no such revision"),
        ("hf://datasets/me/nothing", "there is no such data set, or it is private"),
        ("hf://datasets/me/texts/none.txt", "there is no such file"),
        ("hf://datasets/me/texts/none/*.parquet", "its folders are default/test, default/train, more"),
    ],
)
def test_what_is_not_there_is_named_in_one_line(hub, source, expected):
    with pytest.raises(DownloadError) as raised:
        hub_files(source)
    assert expected in str(raised.value)
    assert source in str(raised.value)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("refusal", "expected"),
    [((403, "GatedRepo"), "accept its terms"), ((401, "RepoNotFound"), "no such data set"), ((500, ""), "500")],
)
def test_a_refusal_of_the_hub_is_one_line(hub, refusal, expected):
    hub.refusal = refusal
    with pytest.raises(DownloadError, match=expected) as raised:
        hub_files("hf://datasets/me/texts")
    assert "\n" not in str(raised.value)


def test_a_hub_that_does_not_answer_is_one_line(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(DownloadError, match=r"cannot read hf://datasets/me/texts: no connection"):
        hub_files("hf://datasets/me/texts")


def test_a_download_that_breaks_off_is_one_line(hub):
    files = hub_files("hf://datasets/me/texts/more/y.txt").files
    hub.is_cut = True
    with pytest.raises(DownloadError, match=r"cannot read hf://.*/more/y\.txt"):
        texts(files)


@pytest.mark.parametrize("source", ["hf://datasets/alone", "hf://datasets/", "hf://datasets/me/texts@/x"])
def test_another_form_of_address_is_refused(source):
    with pytest.raises(UserError, match=r"OWNER/NAME\[@REVISION\]\[/PATH\]"):
        hub_files(source)


@pytest.fixture
def memory():
    system = fsspec.filesystem("memory")
    system.store.clear()
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr("z.txt", "z")
    for path, content in {
        "/bucket/b.parquet": parquet("b"),
        "/bucket/a.txt": b"a\r\n",
        "/bucket/deep/c.jsonl": rows("c", "d"),
        "/bucket/e.zip": archive.getvalue(),
        "/bucket/picture.png": b"\xff",
    }.items():
        system.pipe_file(path, content)
    yield system
    system.store.clear()


@pytest.mark.parametrize(
    ("path", "expected"),
    [("bucket", ["a\n", "b", "c", "d", "z"]), ("bucket/*.parquet", ["b"]), ("bucket/deep/c.jsonl", ["c", "d"])],
)
def test_what_fsspec_opens_is_read(memory, path, expected):
    assert texts(remote_files(f"memory://{path}")) == expected


def test_a_missing_object_is_one_line(memory):
    for path in ("bucket/none.txt", "bucket/*.csv"):
        with pytest.raises(DownloadError, match=r"memory://bucket/"):
            remote_files(f"memory://{path}")


def test_a_missing_package_is_named(monkeypatch):
    def missing(_):
        raise ImportError("Install s3fs to access S3")

    monkeypatch.setattr("fsspec.core.url_to_fs", missing)
    with pytest.raises(UserError, match=r"s3://bucket/a\.txt needs a package that is missing: pip install s3fs"):
        remote_files("s3://bucket/a.txt")
    with pytest.raises(UserError, match="Install s3fs to access S3"):
        remote_files("other://bucket/a.txt")


def test_an_unknown_protocol_is_one_line():
    with pytest.raises(UserError, match="nonsense"):
        remote_files("nonsense://bucket/a.txt")


def test_http_is_not_read_as_a_stream():
    assert is_remote("s3://b/a")
    assert not is_remote("https://example.org/a.txt")
    assert not is_remote("texts/a.txt")
