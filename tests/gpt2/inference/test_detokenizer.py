import pytest

from gpt2 import tokenizer
from gpt2.inference.detokenizer import Detokenizer


def pieces(text, stop=()):
    stream = Detokenizer(stop)
    found = []
    for token in tokenizer.encode(text):
        found.append(stream.push(token))
        if stream.stopped:
            return found
    return [*found, stream.flush()]


def test_characters_of_several_tokens_are_complete():
    found = pieces("naïve 漢字 🙂!")
    assert "".join(found) == "naïve 漢字 🙂!"
    assert not any("\ufffd" in piece for piece in found)
    half = Detokenizer()
    assert half.push(tokenizer.encode("🙂")[0]) == ""
    assert half.flush() == "\ufffd"


@pytest.mark.parametrize(
    ("text", "stop", "expected"),
    [
        ("one two three", ("two",), "one "),
        ("one two three", ("wo th",), "one t"),
        ("one two three", ("three!", "w t"), "one two three"),
        ("one two three", ("three", "two"), "one "),
        ("aaab", ("aab",), "a"),
        ("the end\n\nand more", ("\n\n",), "the end"),
        ("🙂🙃", ("🙃",), "🙂"),
    ],
)
def test_a_stop_string_ends_the_text_and_is_never_shown(text, stop, expected):
    found = pieces(text, stop)
    assert "".join(found) == expected
    for end in range(len(found)):
        assert expected.startswith("".join(found[:end]))
