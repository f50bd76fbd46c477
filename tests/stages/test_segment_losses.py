import json

import numpy as np
import pytest

from gpt2.evaluation.bootstrap import SegmentSums
from stages.segment_losses import SegmentLosses


@pytest.fixture
def losses():
    return SegmentLosses(
        "abc", 300, 128, np.array([4.0, 5.25, 1 / 3]), np.array([2.0, 2.5, 0.0]), np.array([400, 390, 0])
    )


def test_the_file_keeps_five_decimals(losses):
    found = SegmentLosses.from_json(losses.to_json())
    assert (found.sha256, found.tokens, found.segment_tokens) == ("abc", 300, 128)
    assert found.losses.tolist() == [4.0, 5.25, 0.33333]
    assert found.bits_per_byte.tolist() == [2.0, 2.5, 0.0]
    assert found.byte_counts.tolist() == [400, 390, 0]
    assert found.lengths.tolist() == [128, 128, 44]
    assert SegmentLosses.from_json(found.to_json()).to_json() == found.to_json()


def test_a_file_of_the_most_segments_is_small():
    columns = np.random.default_rng(0).random((3, 1024)) * 10
    text = SegmentLosses("a" * 64, 1024 * 128, 128, columns[0], columns[1], 1000 * columns[2]).to_json()
    assert len(text) < 25_000
    assert len(text.splitlines()) == 8


def test_means_of_sums():
    sums = SegmentSums(200)
    sums.nats[:], sums.text_nats[:], sums.byte_counts[:] = [512, 72], [256 * np.log(2), 0], [128, 0]
    found = SegmentLosses.of(sums, "abc")
    assert found.losses.tolist() == [4.0, 1.0]
    assert found.bits_per_byte.tolist() == pytest.approx([2.0, 0.0])


@pytest.mark.parametrize(
    "change",
    [
        {"losses": [1.0, 2.0]},
        {"losses": [1.0, 2.0, "x"]},
        {"losses": [[1.0], [2.0], [3.0]]},
        {"bytes": [1, 2, None]},
        {"tokens": 0},
        {"tokens": None},
        {"segment_tokens": -128},
        {"sha256": ...},
    ],
)
def test_a_damaged_file_is_a_value_error(losses, change):
    content = {**json.loads(losses.to_json()), **change}
    content = {key: value for key, value in content.items() if value is not ...}
    with pytest.raises(ValueError, match=r".+"):
        SegmentLosses.from_json(json.dumps(content))
    with pytest.raises(ValueError, match=r".+"):
        SegmentLosses.from_json("[1]")
    with pytest.raises(ValueError, match=r".+"):
        SegmentLosses.from_json(losses.to_json()[:-20])
