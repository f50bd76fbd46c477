import matplotlib as mpl
import numpy as np
import pytest

from gpt2.evaluation.bootstrap import SegmentSums
from gpt2.evaluation.breakdown import Breakdown, ConfidenceBin, FrequencyBin, PositionBin
from stages import evaluation_report
from stages.params import load_params
from tests.conftest import ROOT


@pytest.fixture
def breakdown():
    return Breakdown(
        positions=[PositionBin(1, 1, 7.0, 6.8, 7.2), PositionBin(2, 3, 6.0, 5.9, 6.1)],
        calibration=[ConfidenceBin(0.0, 0.1, 30, 0.05, 0.07), ConfidenceBin(0.9, 1.0, 3, 0.95, 1.0)],
        ece=0.025,
        frequencies=[FrequencyBin(0, 0, 3, 0.1, 9.0), FrequencyBin(101, 1000, 27, 0.9, 3.0)],
        segments=SegmentSums(300),
        units="windows",
        bits_per_byte_of_units=np.array([2.0, 2.1, 2.5]),
        bits_per_byte_low=2.05,
        bits_per_byte_high=2.4,
        contamination=0.01,
    )


def test_tables_have_a_row_for_each_bin(breakdown, tmp_path):
    evaluation_report.write_tables(breakdown, tmp_path)
    assert (tmp_path / "loss_by_position.csv").read_text() == "first,last,loss,low,high\n1,1,7,6.8,7.2\n2,3,6,5.9,6.1\n"
    assert (tmp_path / "calibration.csv").read_text().splitlines()[:2] == [
        "low,high,tokens,confidence,accuracy",
        "0,0.1,30,0.05,0.07",
    ]
    assert (tmp_path / "loss_by_frequency.csv").read_text().splitlines() == [
        "occurrences,fewest,most,tokens,share,loss",
        "0,0,0,3,0.1,9",
        "101-1k,101,1000,27,0.9,3",
    ]


@pytest.mark.parametrize(
    ("fewest", "most", "shown"),
    [
        (0, 0, "0"),
        (1, 10, "1-10"),
        (1001, 10**4, "1k-10k"),
        (10**5 + 1, 10**6, "100k-1M"),
        (10**9 + 1, 10**10, "1G-10G"),
    ],
)
def test_occurrences_are_short(fewest, most, shown):
    assert evaluation_report.occurrences(FrequencyBin(fewest, most, 1, 1.0, 1.0)) == shown


def test_the_breakdown_is_a_picture(breakdown, tmp_path):
    for name in ("a.png", "b.png"):
        evaluation_report.draw_breakdown(breakdown, 2.2, tmp_path / name)
    picture = mpl.image.imread(tmp_path / "a.png")
    for panel in (
        picture[: len(picture) // 2, : picture.shape[1] // 2],
        picture[len(picture) // 2 :, picture.shape[1] // 2 :],
    ):
        assert panel.std() > 0.05  # something is drawn
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()


def test_a_passage_is_redder_where_the_loss_is_higher(tmp_path):
    tokens = ["The", " $miller", "\n", "\n\n", " for", "gets_", " it\tall" * 20, "\ufffd"]
    redness = {}
    for loss in (0.5, 9.0):
        evaluation_report.draw_passage(
            tokens, np.full(len(tokens) - 1, loss, dtype=np.float32), tmp_path / "passage.png"
        )
        picture = mpl.image.imread(tmp_path / "passage.png")
        upper = picture[: picture.shape[0] // 2]
        redness[loss] = (upper[..., 0] - upper[..., 1]).mean()
    assert redness[9.0] > 2 * redness[0.5]


def test_samples_are_shown_with_prompts_and_verbatim_copies():
    params = load_params(ROOT / "params.yaml")
    text = evaluation_report.describe_samples(
        params.evaluate, ["ROMEO:\n", "a", ""], ["one\ntwo", "three", "four"], "by heart\nyes", 5.25
    )
    assert "Validation loss 5.2500" in text
    assert "has 12 characters: `by heart ⏎ yes`" in text
    assert "## **ROMEO:**\n\n    one\n    two\n" in text
    assert text.count("\n## ") == 3
