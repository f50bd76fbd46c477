"""Training batches in a random order, and validation windows in sequence."""

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from gpt2.config import TrainConfig
from gpt2.data.token_files import Tokens
from gpt2.errors import UserError


class Sampler:
    """Batches of windows of the training tokens, as a pure function of (seed, step, micro-step).

    Each epoch cuts the tokens into adjacent windows of `sequence_length`, starting at a random offset, and visits each
    window once, in random order. Offset and order depend only on the seed and the epoch. So a run can resume at any
    step, and several processes each take a part of the same order.
    """

    def __init__(self, tokens: Tokens, config: TrainConfig, *, rank: int = 0, processes: int = 1) -> None:
        """rank: of this process. Raises UserError if the tokens are fewer than one window and its targets."""
        self.sequence_length = config.sequence_length
        if len(tokens) < self.sequence_length + 1:
            raise UserError(
                f"the train split has {len(tokens)} tokens and a sequence needs {self.sequence_length + 1}; "
                "use a longer text or a smaller train.sequence_length"
            )
        self.tokens = tokens
        share = config.share(processes)
        self.batch_size = share.batch_size
        self.gradient_accumulation_steps = share.gradient_accumulation_steps
        self.rank, self.processes = rank, processes
        self.seed = config.seed
        self.num_windows = (len(tokens) - 1) // self.sequence_length
        self._epoch = -1
        self._starts: npt.NDArray[np.int64] = np.empty(0, dtype=np.int64)

    def batch(self, step: int, micro_step: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """Inputs and targets of this process, each (batch_size, sequence_length)."""
        part = step * self.processes + self.rank
        first = (part * self.gradient_accumulation_steps + micro_step) * self.batch_size
        starts = [self._start(i) for i in range(first, first + self.batch_size)]
        windows = np.stack([self.tokens[s : s + self.sequence_length + 1] for s in starts]).astype(np.int64)
        return windows[:, :-1], windows[:, 1:]

    def _start(self, index: int) -> int:
        """Index of the first token of a window. index: number of windows before it in the run."""
        epoch, position = divmod(index, self.num_windows)
        if epoch != self._epoch:
            generator = np.random.default_rng([self.seed, epoch])
            spare = len(self.tokens) - 1 - self.num_windows * self.sequence_length
            offset = generator.integers(spare + 1)
            self._starts = offset + self.sequence_length * generator.permutation(self.num_windows)
            self._epoch = epoch
        return int(self._starts[position])


def windows(
    tokens: Tokens, sequence_length: int, batch_size: int
) -> Iterator[tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]]:
    """Inputs and targets, each (up to batch_size, sequence_length). Every token but the first is a target once.

    The last window may be shorter; it is then a batch of its own.
    """
    num_targets = len(tokens) - 1
    span = sequence_length * batch_size
    full = num_targets - num_targets % sequence_length
    for start in range(0, full, span):
        end = min(start + span, full)
        part = tokens[start : end + 1].astype(np.int64)
        yield part[:-1].reshape(-1, sequence_length), part[1:].reshape(-1, sequence_length)
    if full < num_targets:
        rest = tokens[full:].astype(np.int64)
        yield rest[None, :-1], rest[None, 1:]
