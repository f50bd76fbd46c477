import math

import pytest

from gpt2.errors import UserError
from gpt2.inference.request import Request, Sampling
from gpt2.tokenizer import END_OF_TEXT


@pytest.mark.parametrize(
    "wrong",
    [
        {"temperature": -1},
        {"temperature": math.nan},
        {"top_k": 0},
        {"top_p": 0},
        {"top_p": 1.1},
        {"repetition_penalty": 0},
        {"repetition_penalty": math.inf},
    ],
)
def test_settings_out_of_range_are_refused(wrong):
    with pytest.raises(UserError, match=f"{next(iter(wrong))} is"):
        Sampling(**wrong)


@pytest.mark.parametrize(
    ("wrong", "expected"),
    [
        ({"prompt": []}, "a prompt needs"),
        ({"max_new_tokens": 0}, "max_new_tokens is 0"),
        ({"seed": -1}, "the seed is -1"),
        ({"stop": ("a", "")}, "a stop string is empty"),
    ],
)
def test_invalid_requests_are_refused(wrong, expected):
    with pytest.raises(UserError, match=expected):
        Request(**{"prompt": [1], "max_new_tokens": 5, **wrong})


def test_the_end_of_the_text_is_a_stop_token():
    assert END_OF_TEXT in Request([1], 1).stop_token_ids
