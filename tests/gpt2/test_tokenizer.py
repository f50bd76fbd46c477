import socket
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpt2 import tokenizer
from gpt2.errors import FileError
from tests.conftest import ROOT


def test_known_tokens():
    # from OpenAI's encoder
    assert tokenizer.encode("Hello world") == [15496, 995]
    assert tokenizer.encode("") == []
    assert tokenizer.encoding().n_vocab == 50257


@pytest.mark.parametrize(
    "text", ["naïve café", "漢字かな交じり文", "👩‍👩‍👧‍👦🏽", "שלום עולם", "a\x00b\ufffd", "\r\n\t \u00a0  x  "]
)
def test_decode_inverts_encode(text):
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert "".join(tokenizer.decode_stream(tokenizer.encode(text))) == text


@given(st.text())
def test_decode_inverts_encode_for_any_text(text):
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert b"".join(map(tokenizer.token_bytes, ids)).decode() == text


def test_end_of_text_is_encoded_as_text():
    ids = tokenizer.encode("a<|endoftext|>b")
    assert tokenizer.END_OF_TEXT not in ids
    assert tokenizer.decode(ids) == "a<|endoftext|>b"


def test_ids_beyond_the_encoding_decode_to_no_text():
    assert tokenizer.decode([15496, 50300, 995]) == "Hello world"
    assert tokenizer.token_bytes(50300) == b""


def test_a_character_of_several_tokens_is_streamed_complete():
    ids = tokenizer.encode("🙂")
    assert len(ids) > 1
    assert [piece for piece in tokenizer.decode_stream(ids) if piece] == ["🙂"]
    assert "".join(tokenizer.decode_stream(ids[:-1])) == "\ufffd"


def test_the_tokenizer_needs_no_network_and_no_cache(tmp_path):
    program = (
        "import socket\n"
        "def refuse(*_, **__): raise AssertionError('network')\n"
        "socket.socket.connect = socket.create_connection = refuse\n"
        "from gpt2 import tokenizer\nprint(tokenizer.encode('Hello world'))"
    )
    environment = {"HOME": str(tmp_path), "TIKTOKEN_CACHE_DIR": str(tmp_path / "cache"), "PYTHONPATH": str(ROOT)}
    result = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    assert result.stdout == "[15496, 995]\n", result.stderr
    assert socket.socket.connect.__name__ == "connect"


def test_a_changed_vocabulary_is_refused(monkeypatch):
    monkeypatch.setattr(tokenizer, "MERGES_SHA256", "0" * 64)
    with pytest.raises(FileError, match=r"vocab\.bpe is not OpenAI's file"):
        tokenizer.vocabulary_files()


@given(st.text(alphabet=st.sampled_from(list("ab'1 s\n\t\r\x1c\u00a0é🙂.<|>")), max_size=80))
def test_an_array_has_the_same_tokens(text):
    tokens = tokenizer.encode_array(text)
    assert tokens.dtype == np.uint16
    assert tokens.tolist() == tokenizer.encode(text)


@given(st.text(alphabet=st.sampled_from(list("ab'1 s\n\t\r\x1c\u00a0é🙂.")), max_size=80))
def test_a_text_can_be_cut_before_white_space(text):
    cut = tokenizer.last_cut(text)
    assert tokenizer.encode(text[:cut]) + tokenizer.encode(text[cut:]) == tokenizer.encode(text)
    assert cut == 0 or (text[cut] in " \n" and not text[cut - 1].isspace())


def test_millions_of_spaces_are_encoded():
    text = "some words" + " " * 2_500_000 + "\n" * 10 + "more words"
    assert tokenizer.decode(tokenizer.encode_array(text).tolist()) == text
