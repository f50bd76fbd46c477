"""Sums over the units of a held-out text, documents, windows or segments, and the bootstrap over them."""

import numpy as np
import numpy.typing as npt

from gpt2.evaluation.scores import Predictions, byte_lengths
from gpt2.tokenizer import END_OF_TEXT

MIN_DOCUMENTS = 30
MAX_UNITS = 10_000
RESAMPLES = 2_000
SHORTEST_SEGMENT = 128
MAX_SEGMENTS = 1024
Sums = npt.NDArray[np.float64]


class TextUnits:
    """Nats and bytes of each document and of each window of a text, without `<|endoftext|>`.

    Takes the predictions of `gpt2.evaluation.scores.score` batch by batch, in the order of the text.
    """

    def __init__(self) -> None:
        self._documents: tuple[list[float], list[float]] = ([0.0], [0.0])  # nats, bytes; the last goes on
        self._windows: tuple[list[float], list[float]] = ([], [])

    def add(self, batch: Predictions) -> None:
        """Takes a batch of windows."""
        lengths = byte_lengths()[batch.targets]
        nats = np.where(lengths > 0, batch.losses, 0).astype(np.float64)
        document = np.cumsum(batch.targets.ravel() == END_OF_TEXT)  # 0 is the one that an earlier batch began
        for values, documents, windows in zip((nats, lengths), self._documents, self._windows, strict=True):
            first, *others = np.bincount(document, weights=values.ravel()).tolist()
            documents[-1] += first
            documents += others
            windows += values.sum(axis=1, dtype=np.float64).tolist()

    def sums(self) -> tuple[str, Sums, Sums]:
        """What the units are, "documents" or "windows", and the nats and bytes of each.

        Documents, if the text has at least 30.
        """
        name, (nats, num_bytes) = "documents", np.array(self._documents)
        if (num_bytes > 0).sum() < MIN_DOCUMENTS:
            name, (nats, num_bytes) = "windows", np.array(self._windows)
        return name, nats[num_bytes > 0], num_bytes[num_bytes > 0]


class SegmentSums:
    """Nats and bytes of consecutive segments of a text, whatever the windows of the model: all (number of segments,).

    nats: of all targets. text_nats and byte_counts: without `<|endoftext|>`. Takes the predictions of
    `gpt2.evaluation.scores.score` batch by batch, in the order of the text.
    """

    def __init__(self, num_targets: int) -> None:
        self.num_targets, self.segment_tokens = num_targets, segment_length(num_targets)
        self.nats, self.text_nats, self.byte_counts = np.zeros((3, -(-num_targets // self.segment_tokens)))
        self._seen = 0

    def add(self, batch: Predictions) -> None:
        """Takes a batch of windows."""
        lengths, losses = byte_lengths()[batch.targets].ravel(), batch.losses.ravel().astype(np.float64)
        segments = (self._seen + np.arange(len(losses))) // self.segment_tokens
        self._seen += len(losses)
        for sums, values in (
            (self.nats, losses),
            (self.text_nats, np.where(lengths > 0, losses, 0)),
            (self.byte_counts, lengths),
        ):
            sums += np.bincount(segments, weights=values, minlength=len(sums))


def segment_length(num_targets: int) -> int:
    """Tokens in a segment of a text: 128, doubled until there are at most 1024 segments. A function of the text alone,
    so that any two models have losses of the same segments."""
    length = SHORTEST_SEGMENT
    while num_targets > length * MAX_SEGMENTS:
        length *= 2
    return length


def ratio_interval(numerators: Sums, denominators: Sums, *, seed: int) -> tuple[float, float]:
    """The 95 % interval of sum(numerators) / sum(denominators), over units drawn again with replacement.

    The percentile bootstrap (Efron and Tibshirani, An Introduction to the Bootstrap, 1993, chapter 13) with 2000
    resamples. Of more than 10,000 units, neighbours are drawn together.
    """
    if len(numerators) > MAX_UNITS:
        starts = np.linspace(0, len(numerators), MAX_UNITS, endpoint=False).astype(np.int64)
        numerators, denominators = (np.add.reduceat(sums, starts) for sums in (numerators, denominators))
    generator = np.random.default_rng(seed)
    ratios = np.empty(RESAMPLES)
    for number in range(RESAMPLES):
        drawn = generator.integers(len(numerators), size=len(numerators))
        ratios[number] = numerators[drawn].sum() / denominators[drawn].sum()
    low, high = np.percentile(ratios, [2.5, 97.5])
    return float(low), float(high)
