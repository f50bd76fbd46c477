from gpt2.data.sources.python_docs import prose


def test_prose_has_no_tables_and_no_indentation():
    text = "A  title\n=======\n\n    Some text.\n+---+\n| a |\n+---+\n\n\n\n>>> 1 + 1\nMore\ttext.\n"
    assert prose(text) == "A title\n\nSome text.\n\nMore text."
