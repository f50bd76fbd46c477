"""What `preset auto` finds out about a text, and the loss that it expects."""

from dataclasses import replace

import numpy as np
import pytest

from experiments.automatic.recipe import UNCERTAINTY, effective_tokens, expected_loss, recipe
from experiments.automatic.text import counting_loss, look_at, spread
from gpt2.config import CorpusConfig, TokenizeConfig
from tests.conftest import our_text
from tests.experiments.texts import CODE, NOTE, NOVEL


def test_the_expected_loss_falls_with_tokens_and_rises_with_the_difficulty_of_a_text():
    model = recipe((2, 4, 256), 1e6, 300_000).model
    losses = [expected_loss(model, tokens, 300_000, NOVEL) for tokens in (1e3, 1e5, 1e6, 1e7)]
    assert losses == sorted(losses, reverse=True)
    assert expected_loss(model, 1e6, 300_000, replace(NOVEL, counting_loss=11.48)) == pytest.approx(2 * losses[2])


@pytest.mark.parametrize(
    ("size", "tokens", "training_tokens", "text", "measured", "tolerance"),
    [
        ((4, 4, 256), 921_600, 301_966, NOVEL, 4.47, 0.03),
        ((2, 2, 128), 375_808, 301_966, NOVEL, 4.82, 0.03),
        ((4, 4, 256), 122_880, 301_966, NOVEL, 5.22, 0.03),
        ((4, 4, 256), 131_072, 8_193, NOTE, 5.84, 0.03),
        ((4, 4, 256), 102_400, 8_687_000, CODE, 3.41, UNCERTAINTY),
    ],
)
def test_the_expected_loss_is_near_that_of_runs_on_novel_note_and_code(
    size, tokens, training_tokens, text, measured, tolerance
):
    model = recipe(size, tokens, training_tokens).model
    assert expected_loss(model, tokens, training_tokens, text) == pytest.approx(measured, rel=tolerance)


def test_counting_predicts_by_tokens_and_by_pairs():
    training, held_out = np.array([5, 6, 5, 7, 5, 6], np.uint16), np.array([5, 6, 9, 5], np.uint16)
    single = {5: 3.5, 6: 2.5, 9: 0.5}
    single = {token: count / (6 + 0.5 * 50_257) for token, count in single.items()}
    # after 5: 6 twice, 7 once; after 6: 5 once; nothing was seen after 9
    after = [(2 - 0.75 + 0.75 * 2 * single[6]) / 3, 0.75 * single[9] / 1, single[5]]
    expected = -(np.log([single[6], single[9], single[5]]).mean() + np.log(after).mean()) / 2
    assert counting_loss(training, held_out) == pytest.approx(expected)


def test_tokens_for_counting_are_spread_over_the_text():
    tokens = np.arange(10_000, dtype=np.uint16)
    assert spread(tokens, 20_000).tolist() == tokens.tolist()
    found = spread(tokens, 1_000)
    assert len(found) == 1_024
    assert (found[0], found[-1]) == (0, 9_999)
    assert (np.diff(found) == 1).sum() == 8 * 127


def test_repetitions_count_less_and_less():
    assert effective_tokens(80, 100) == 80
    found = [effective_tokens(100 * epochs, 100) for epochs in (1, 2, 4, 1000)]
    assert found == sorted(found)
    assert found[1] - found[0] == pytest.approx(85, abs=1)
    assert found[3] == pytest.approx(400)


def test_what_is_found_out_about_a_text(tmp_path):
    def look(text):
        (tmp_path / "mine.txt").write_text(text)
        config = CorpusConfig(str(tmp_path / "mine.txt"), None, "text", None)
        return look_at(config, TokenizeConfig(0.3, "tail", False), tmp_path / "work", 1)

    random, thrice = look(our_text(300)), look(our_text(100) * 3)
    assert random.documents == 1
    assert random.bytes == len(our_text(300))
    assert random.bytes / 6 < random.tokens < random.bytes / 3
    assert random.repeated < 0.2 < 0.6 < thrice.repeated < 0.7
    assert thrice.repeated_lines == pytest.approx(2 / 3, abs=0.05)
    assert thrice.new_tokens < thrice.tokens / 2
    assert thrice.distinct <= random.distinct
    assert 3 < random.counting_loss < 8
    assert not random.is_cut
