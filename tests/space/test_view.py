import base64
import math

import pytest

from gpt2 import tokenizer
from gpt2.inference.request import Token
from space import view
from tests.space.conftest import FACTS


def test_generated_text_is_escaped():
    evil = "<img src=x onerror=alert(1)>\"'&"
    ids = tokenizer.encode(evil)
    tokens = [Token(i, tokenizer.decode([i]), -1.0, ((i, -1.0),)) for i in ids]
    html = view.probabilities_html([tokens])
    assert "<img" not in html
    assert html.count("<span") == len(ids)
    assert "onerror=" not in html.replace("onerror=alert", "") or "&lt;" in html
    assert 'data-tip="&lt;' in html


def test_less_likely_tokens_have_a_stronger_colour():
    tokens = [Token(i, "x", math.log(p)) for i, p in ((1, 1.0), (2, 0.5), (3, 0.01), (4, 1e-9))]
    html = view.probabilities_html([tokens])
    strengths = [int(part.split('"')[0]) for part in html.split("--surprise:")[1:]]
    assert strengths == sorted(strengths)
    assert (strengths[0], strengths[-1]) == (0, 70)


def test_alternatives_are_shown_with_their_probabilities():
    (war,), (the,) = tokenizer.encode(" war"), tokenizer.encode(" the")
    end = (tokenizer.END_OF_TEXT, math.log(0.0005))
    html = view.probabilities_html([[Token(war, " war", math.log(0.004), ((the, math.log(0.18)), end))]])
    assert "␣war: 0.4 %" in html
    assert "18 %  ␣the" in html
    assert "under 0.1 %  (end of text)" in html


def test_samples_have_headings_if_there_are_several():
    token = Token(5, "a", -1.0)
    assert "Text 2" in view.probabilities_html([[token], [token]])
    assert "Text 1" not in view.probabilities_html([[token]])
    assert view.probabilities_html([[], []]) == ""


def test_the_table_shows_the_facts_escaped(tmp_path):
    html = view.model_table({**FACTS, "corpus": "<b>bold</b>", "fallback_reason": "<i>"}, "int8", "compiled", tmp_path)
    for fact in (
        f"{FACTS['parameters']:,}",
        "12,345",
        "5.5 nats",
        "abc123",
        "0123456789ab",
        "int8 (quantized), loss 5.5000",
    ):
        assert fact in html
    assert "<b>bold" not in html
    assert "<i>" not in html


@pytest.mark.parametrize(("content", "shown"), [(b"\x89PNG\r\n1", True), (b"<svg>", False), (None, False)])
def test_only_a_picture_is_shown_as_one(tmp_path, content, shown):
    if content is not None:
        (tmp_path / view.LOSS_CURVE).write_bytes(content)
    assert ("<img" in view.model_table(FACTS, "fp32", "PyTorch", tmp_path)) == shown
    if shown:
        assert base64.b64encode(content).decode() in view.model_table(FACTS, "fp32", "PyTorch", tmp_path)


def test_a_link_holds_the_settings():
    html = view.link({"prompt": 'a "b" & c', "seed": 0, "stop": "", "top_p": 1.0})
    assert 'href="?prompt=a+%22b%22+%26+c&amp;seed=0&amp;top_p=1.0"' in html
    assert view.link({"prompt": "a" * 5000}) == ""
