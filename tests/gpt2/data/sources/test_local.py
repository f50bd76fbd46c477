import pytest

from gpt2.data.sources.local import files_at, find_path, local_file
from gpt2.errors import FileError, UserError


def found(tmp_path, source):
    """The files of a source, relative to the folder of the test."""
    return [path.relative_to(tmp_path).as_posix() for path in files_at(find_path(source, [tmp_path]))]


@pytest.fixture
def folder(tmp_path):
    for name in (
        "texts/a.txt",
        "texts/b/c.md",
        "texts/b/d.jsonl.zst",
        "texts/b/picture.png",
        "texts/b/README",
        "texts/b/.hidden.txt",
        "texts/.git/e.txt",
        "texts/z.TXT",
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    (tmp_path / "texts/loop").symlink_to(tmp_path / "texts")
    return tmp_path


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("texts", ["texts/a.txt", "texts/b/c.md", "texts/b/d.jsonl.zst", "texts/z.TXT"]),
        ("texts/a.txt", ["texts/a.txt"]),
        ("texts/b/README", ["texts/b/README"]),
        ("texts/**/*.zst", ["texts/b/d.jsonl.zst"]),
        ("texts/*/[cd].*", ["texts/b/c.md", "texts/b/d.jsonl.zst"]),
        ("*/b/README", ["texts/b/README"]),
        ("texts/b/*", ["texts/b/README", "texts/b/c.md", "texts/b/d.jsonl.zst", "texts/b/picture.png"]),
        ("texts/**/?.txt", ["texts/a.txt"]),
    ],
)
def test_a_path_a_folder_and_patterns(folder, source, expected):
    assert found(folder, source) == expected
    assert found(folder, str(folder / source)) == expected


def test_a_name_with_the_characters_of_a_pattern_is_a_file(tmp_path):
    (tmp_path / "a[1].txt").write_text("x")
    assert found(tmp_path, "a[1].txt") == ["a[1].txt"]


def test_a_folder_without_texts_is_refused(tmp_path):
    (tmp_path / "texts").mkdir()
    with pytest.raises(UserError, match=r"has no file of a known format: \.txt, \.md, \.jsonl, "):
        found(tmp_path, "texts")


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("nowhere.txt", r"'nowhere\.txt' is not a known corpus"),
        ("none/*.txt", r"no file matches .*none/\*\.txt"),
        ("a/**b/*.txt", "is not a glob pattern|no file matches"),
    ],
)
def test_what_does_not_exist_is_refused(tmp_path, source, expected):
    with pytest.raises(UserError, match=expected) as raised:
        found(tmp_path, source)
    assert "\n" not in str(raised.value)


def test_a_relative_path_is_looked_up_in_each_root(tmp_path):
    first, second = tmp_path / "copy", tmp_path / "real"
    second.mkdir()
    (second / "mine.txt").write_text("x")
    assert find_path("mine.txt", [first, second]) == second / "mine.txt"
    assert find_path("*.txt", [first, second]) == second / "*.txt"
    assert find_path(str(second / "mine.txt"), [first]) == second / "mine.txt"


def test_a_file_that_is_gone_is_a_file_error(tmp_path):
    with pytest.raises(FileError, match="cannot read"):
        local_file(tmp_path / "gone.txt")
