"""Where a model's loss comes from: the position in the context, the frequency of the token, its confidence.

Each class takes the predictions of `gpt2.evaluation.scores.score` batch by batch, and keeps sums only.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from gpt2.config import GPT2_VOCAB_SIZE
from gpt2.data.token_files import Tokens, count_tokens
from gpt2.evaluation.bootstrap import SegmentSums, TextUnits, ratio_interval
from gpt2.evaluation.contamination import contamination
from gpt2.evaluation.scores import Predictions, Scores, bits_per_byte, score
from gpt2.model.transformer import GPT
from gpt2.progress import ProgressCallback, no_progress

POSITION_BINS = 24
CONFIDENCE_BINS = 15
FREQUENCY_BOUNDS = (0, *(10**exponent for exponent in range(1, 13)))
NORMAL_95 = 1.96


@dataclass(frozen=True)
class PositionBin:
    """Mean loss, in nats, of the targets with `first` to `last` tokens of context, and its 95 % interval."""

    first: int
    last: int
    loss: float
    low: float
    high: float


class LossByPosition:
    """Mean loss by the number of tokens of context (Kaplan et al., 2020, https://arxiv.org/abs/2001.08361, figure 20).

    The bins widen with the logarithm of the position. The intervals are of the normal approximation over windows: the
    tokens within a window are not independent. A last window that is shorter counts in no bin.
    """

    def __init__(self, sequence_length: int) -> None:
        edges = np.geomspace(1, sequence_length + 1, POSITION_BINS + 1).round().astype(np.int64)
        self._edges = np.unique(edges)  # the first position of each bin, and the position after the last
        self._windows = 0
        self._sums = np.zeros(len(self._edges) - 1)
        self._squares = np.zeros(len(self._edges) - 1)

    def add(self, batch: Predictions) -> None:
        """Takes a batch of windows."""
        if batch.losses.shape[1] != self._edges[-1] - 1:
            return
        sums = np.add.reduceat(batch.losses.astype(np.float64), self._edges[:-1] - 1, axis=1)  # (B, bins)
        means = sums / np.diff(self._edges)
        self._windows += len(means)
        self._sums += means.sum(axis=0)
        self._squares += (means**2).sum(axis=0)

    def bins(self) -> list[PositionBin]:
        """The bins in order; none without a whole window. With one window, the interval has no width."""
        if not self._windows:
            return []
        means = self._sums / self._windows
        variances = (self._squares - self._windows * means**2).clip(min=0) / max(1, self._windows - 1)
        errors = NORMAL_95 * np.sqrt(variances / self._windows)
        return [
            PositionBin(int(first), int(end) - 1, float(mean), float(mean - error), float(mean + error))
            for first, end, mean, error in zip(self._edges[:-1], self._edges[1:], means, errors, strict=True)
        ]


@dataclass(frozen=True)
class ConfidenceBin:
    """The tokens at which the likeliest token has a probability over `low` and up to `high`.

    confidence: mean of that probability. accuracy: share of the tokens at which the likeliest token was right.
    """

    low: float
    high: float
    tokens: int
    confidence: float
    accuracy: float


class Calibration:
    """Whether the likeliest token is right as often as its probability says: a reliability diagram.

    15 bins of equal width, as in Guo et al., 2017, https://arxiv.org/abs/1706.04599.
    """

    def __init__(self) -> None:
        self._tokens, self._confidence, self._right = np.zeros((3, CONFIDENCE_BINS))

    def add(self, batch: Predictions) -> None:
        """Takes a batch."""
        confidences = batch.confidences.ravel().astype(np.float64)
        bins = np.clip(np.ceil(confidences * CONFIDENCE_BINS).astype(np.int64) - 1, 0, CONFIDENCE_BINS - 1)
        self._tokens += np.bincount(bins, minlength=CONFIDENCE_BINS)
        self._confidence += np.bincount(bins, weights=confidences, minlength=CONFIDENCE_BINS)
        self._right += np.bincount(bins, weights=batch.ranks.ravel() == 0, minlength=CONFIDENCE_BINS)

    def bins(self) -> list[ConfidenceBin]:
        """The bins that have tokens, in order."""
        return [
            ConfidenceBin(
                low=index / CONFIDENCE_BINS,
                high=(index + 1) / CONFIDENCE_BINS,
                tokens=int(self._tokens[index]),
                confidence=float(self._confidence[index] / self._tokens[index]),
                accuracy=float(self._right[index] / self._tokens[index]),
            )
            for index in np.flatnonzero(self._tokens)
        ]

    def error(self) -> float:
        """The expected calibration error: the mean of |accuracy - confidence| over tokens, by bin.

        Naeini et al., 2015, https://doi.org/10.1609/aaai.v29i1.9602.
        """
        return float(np.abs(self._right - self._confidence).sum() / self._tokens.sum())


@dataclass(frozen=True)
class FrequencyBin:
    """The targets whose token occurs `fewest` to `most` times in the training tokens.

    share: of all targets. loss: their mean, in nats.
    """

    fewest: int
    most: int
    tokens: int
    share: float
    loss: float


class LossByFrequency:
    """Mean loss by how often the token occurs in the training tokens."""

    def __init__(self) -> None:
        self._losses, self._tokens = np.zeros((2, GPT2_VOCAB_SIZE))

    def add(self, batch: Predictions) -> None:
        """Takes a batch."""
        targets = batch.targets.ravel()
        self._tokens += np.bincount(targets, minlength=GPT2_VOCAB_SIZE)
        self._losses += np.bincount(targets, weights=batch.losses.ravel(), minlength=GPT2_VOCAB_SIZE)

    def bins(self, training_counts: npt.NDArray[np.int64]) -> list[FrequencyBin]:
        """The bins that have targets, in order: 0, 1 to 10, 11 to 100, ... training_counts: from `count_tokens`."""
        indices = np.searchsorted(FREQUENCY_BOUNDS, training_counts)
        tokens = np.bincount(indices, weights=self._tokens)
        losses = np.bincount(indices, weights=self._losses)
        return [
            FrequencyBin(
                fewest=FREQUENCY_BOUNDS[index - 1] + 1 if index else 0,
                most=FREQUENCY_BOUNDS[index],
                tokens=int(tokens[index]),
                share=float(tokens[index] / tokens.sum()),
                loss=float(losses[index] / tokens[index]),
            )
            for index in np.flatnonzero(tokens)
        ]


@dataclass(frozen=True)
class Breakdown:
    """Where the loss on a held-out text comes from, and how sure its bits per byte are.

    segments: sums over parts of the text, to compare models. units: what the interval was drawn from, "documents" or
    "windows". bits_per_byte_of_units: (number of units,).
    """

    positions: list[PositionBin]
    calibration: list[ConfidenceBin]
    ece: float
    frequencies: list[FrequencyBin]
    segments: SegmentSums
    units: str
    bits_per_byte_of_units: npt.NDArray[np.float64]
    bits_per_byte_low: float
    bits_per_byte_high: float
    contamination: float


def measure(
    model: GPT,
    training: Tokens,
    held_out: Tokens,
    *,
    sequence_length: int,
    batch_size: int,
    seed: int,
    scored: ProgressCallback = no_progress,
    read: ProgressCallback = no_progress,
) -> tuple[Scores, Breakdown]:
    """The scores on the held-out tokens and their breakdown, in one pass of the model.

    seed: of the bootstrap. scored: counts held-out tokens. read: counts training tokens, each twice.
    """
    positions, calibration = LossByPosition(min(sequence_length, len(held_out) - 1)), Calibration()
    frequencies, units, segments = LossByFrequency(), TextUnits(), SegmentSums(len(held_out) - 1)

    def observe(batch: Predictions) -> None:
        for each in (positions, calibration, frequencies, units, segments):
            each.add(batch)

    scores = score(
        model, held_out, sequence_length=sequence_length, batch_size=batch_size, observe=observe, progress=scored
    )
    name, nats, num_bytes = units.sums()
    low, high = ratio_interval(nats, num_bytes, seed=seed)
    return scores, Breakdown(
        positions=positions.bins(),
        calibration=calibration.bins(),
        ece=calibration.error(),
        frequencies=frequencies.bins(count_tokens(training, progress=read)),
        segments=segments,
        units=name,
        bits_per_byte_of_units=nats / np.log(2) / num_bytes,
        bits_per_byte_low=bits_per_byte(low, 1),
        bits_per_byte_high=bits_per_byte(high, 1),
        contamination=contamination(held_out, training, progress=read),
    )
