"""Whether a training run overfits, from its losses, and what to do about it."""

from collections.abc import Mapping
from typing import Any

LARGE_GAP = 1.5
"""Nats per token between validation and training text. Less is common where the two differ, as in two books."""
MIN_RISE = 0.02
"""Nats per token by which a validation loss varies from one evaluation to the next, however long the text."""
RISE_DEVIATION = 1.0
"""Standard deviation, in nats, of the change of a token's loss between two evaluations."""


def is_rising(metrics: Mapping[str, Any], val_tokens: int) -> bool:
    """Whether the validation loss rose from its best by more than noise, while the training text was learned further.

    metrics: as in reports/train/metrics.json. Three standard errors of the mean over val_tokens are noise.
    """
    best, last, sample = (metrics[key] for key in ("best_val_loss", "last_val_loss", "train_sample_loss"))
    if best is None or last is None or sample is None:
        return False
    noise = max(MIN_RISE, 3 * RISE_DEVIATION / val_tokens**0.5)
    return bool(last - best > noise and sample < best)


def overfits(metrics: Mapping[str, Any], val_tokens: int) -> bool:
    """Whether the validation loss rises, or is far over the loss on the training text, after the last step."""
    gap = metrics["generalization_gap"]
    return is_rising(metrics, val_tokens) or (gap is not None and gap > LARGE_GAP)


def warning(metrics: Mapping[str, Any]) -> str:
    """What to do about a run that overfits, in one line. metrics: as in reports/train/metrics.json."""
    found = (
        f"the model overfits: after step {metrics['steps']} its loss is {metrics['last_val_loss']:.2f} on the "
        f"validation text and {metrics['train_sample_loss']:.2f} on the training text"
    )
    if metrics["best_step"] < metrics["steps"]:
        found += f"; the best was {metrics['best_val_loss']:.2f} after step {metrics['best_step']}, which models/ keeps"
    return f"{found}. Raise train.weight_decay, lower train.max_steps, or take a smaller model or more text"
