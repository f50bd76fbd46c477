import pytest

from stages.overfitting import overfits, warning


def metrics(best, last, sample, **changes):
    gap = None if last is None or sample is None else last - sample
    values = {"best_val_loss": best, "last_val_loss": last, "train_sample_loss": sample, "generalization_gap": gap}
    return {**values, "best_step": 300, "steps": 500, **changes}


@pytest.mark.parametrize(
    ("best", "last", "sample", "val_tokens", "expected"),
    [
        (4.6, 4.8, 4.2, 30_000, True),  # rises, while the training text is learned
        (4.6, 4.61, 4.2, 30_000, False),  # noise
        (4.6, 4.65, 4.2, 1_000, False),  # noise of a short text
        (4.6, 4.8, 4.75, 30_000, False),  # rises on both: that is not overfitting
        (4.6, 4.6, 3.0, 30_000, True),  # knows its text by heart
        (4.6, None, 3.0, 30_000, False),
        (None, None, None, 30_000, False),
    ],
)
def test_a_rising_validation_loss_or_a_large_gap_is_overfitting(best, last, sample, val_tokens, expected):
    assert overfits(metrics(best, last, sample), val_tokens) == expected


def test_the_warning_says_in_one_line_what_to_do():
    rising = warning(metrics(4.6, 5.0, 2.0))
    assert rising.startswith(
        "the model overfits: after step 500 its loss is 5.00 on the validation text and 2.00 on the training text; "
        "the best was 4.60 after step 300, which models/ keeps. Raise train.weight_decay, lower train.max_steps"
    )
    assert "\n" not in rising
    assert "the best was" not in warning(metrics(4.6, 4.6, 2.0, best_step=500))
