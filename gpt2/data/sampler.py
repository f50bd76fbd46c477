"""Training batches in a random order, and validation windows in sequence."""

from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from gpt2.config import TrainConfig
from gpt2.data.token_files import TOKEN_TYPE, TokenArray, Tokens
from gpt2.errors import UserError

CHUNK_TOKENS = 1 << 20
GROUP_CHUNKS = 16
Windows = tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]


@dataclass(frozen=True)
class Epoch:
    """The order in which an epoch reads.

    offset: first token of the first window. chunks: their numbers. ends: windows from the start of the epoch to the end
    of each chunk.
    """

    number: int
    offset: int
    chunks: npt.NDArray[np.int64]
    ends: npt.NDArray[np.int64]


@dataclass(frozen=True)
class Group:
    """Windows in memory. place: their epoch, and which group of it. starts: of the windows, in `tokens`."""

    place: tuple[int, int]
    starts: npt.NDArray[np.int64]
    tokens: TokenArray


class Sampler:
    """Batches of windows of the training tokens, as a pure function of (seed, step, micro-step).

    Each epoch cuts the tokens into adjacent windows of `sequence_length`, starting at a random offset, and visits each
    window once. So a token has another position and another context in each epoch. About a million tokens, a whole
    number of windows, are a chunk. The chunks come in random order, and GROUP_CHUNKS of them at a time are read into
    memory, where their windows are visited in random order. A thread reads the next group meanwhile. A text of one
    group is in memory as a whole.

    Offset and orders depend only on the seed, the epoch and the group. So a run can resume at any step, and several
    processes each take a part of the same order. Windows cross the borders of documents and of shards.
    """

    def __init__(self, tokens: Tokens, config: TrainConfig, *, rank: int = 0, processes: int = 1) -> None:
        """rank: of this process. Raises UserError if the tokens are fewer than one window and its targets."""
        self.sequence_length = config.sequence_length
        if len(tokens) < self.sequence_length + 1:
            raise UserError(
                f"the train split has {len(tokens)} tokens and a sequence needs {self.sequence_length + 1}; "
                "use a longer text or a smaller train.sequence_length"
            )
        share = config.share(processes)
        self.batch_size = share.batch_size
        self.gradient_accumulation_steps = share.gradient_accumulation_steps
        self.rank, self.processes = rank, processes
        self.seed = config.seed
        # one less than fits, so that an epoch may start at any of the first tokens
        self.num_windows = max(1, len(tokens) // self.sequence_length - 1)
        self.chunk_windows = max(1, CHUNK_TOKENS // self.sequence_length)
        self.num_chunks = -(-self.num_windows // self.chunk_windows)
        self.num_groups = -(-self.num_chunks // GROUP_CHUNKS)
        self.tokens = tokens if self.num_groups > 1 else tokens[:]
        self._thread = ThreadPoolExecutor(max_workers=1)
        self._epoch = self._order(0)
        self._group: Group | None = None
        self._ahead: Future[Group] | None = None

    def batch(self, step: int, micro_step: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """Inputs and targets of this process, each (batch_size, sequence_length).

        Raises FileError if the tokens cannot be read, or a shard was found damaged.
        """
        _ = self.tokens[:0]  # raises the error of a shard that is not being read
        part = step * self.processes + self.rank
        first = (part * self.gradient_accumulation_steps + micro_step) * self.batch_size
        windows = np.stack([self._window(i) for i in range(first, first + self.batch_size)]).astype(np.int64)
        return windows[:, :-1], windows[:, 1:]

    def _window(self, index: int) -> TokenArray:
        """A window and the token after it: (sequence_length + 1,). index: number of windows before it in the run."""
        number, position = divmod(index, self.num_windows)
        if self._epoch.number != number:
            self._epoch = self._order(number)
        ends = self._epoch.ends
        group = int(np.searchsorted(ends, position, side="right")) // GROUP_CHUNKS
        if self._group is None or self._group.place != (number, group):
            self._load(number, group)
        assert self._group is not None
        before = int(ends[group * GROUP_CHUNKS - 1]) if group else 0
        start = self._group.starts[position - before]
        return self._group.tokens[start : start + self.sequence_length + 1]

    def _load(self, number: int, group: int) -> None:
        """Makes a group the present one, and has the thread read the one after it."""
        ahead, self._ahead, self._group = self._ahead, None, None
        found = ahead.result() if ahead is not None else None
        self._group = found if found is not None and found.place == (number, group) else self._read(number, group)
        if self.num_groups > 1:
            following = (number, group + 1) if group + 1 < self.num_groups else (number + 1, 0)
            self._ahead = self._thread.submit(self._read, *following)

    def _offset(self, number: int) -> tuple[int, np.random.Generator]:
        """First token of the first window of an epoch, and the generator for its order."""
        generator = np.random.default_rng([self.seed, number])
        spare = len(self.tokens) - 1 - self.num_windows * self.sequence_length
        return int(generator.integers(spare + 1)), generator

    def _order(self, number: int) -> Epoch:
        """The order of an epoch. That of a single group does not matter."""
        offset, generator = self._offset(number)
        chunks = generator.permutation(self.num_chunks)
        sizes = np.minimum(self.chunk_windows, self.num_windows - chunks * self.chunk_windows)
        return Epoch(number, offset, chunks, np.cumsum(sizes))

    def _read(self, number: int, group: int) -> Group:
        """Reads a group, chunk by chunk."""
        place, length = (number, group), self.sequence_length
        if self.num_groups == 1:
            offset, generator = self._offset(number)
            return Group(place, offset + length * generator.permutation(self.num_windows), self.tokens[:])
        epoch = self._order(number)
        chunks = epoch.chunks[group * GROUP_CHUNKS : (group + 1) * GROUP_CHUNKS]
        firsts = chunks * self.chunk_windows
        lasts = np.minimum(firsts + self.chunk_windows, self.num_windows)
        tokens = np.empty(int((lasts - firsts).sum()) * length + len(chunks), dtype=TOKEN_TYPE)
        starts, position = [], 0
        for first, last in zip(firsts.tolist(), lasts.tolist(), strict=True):
            size = (last - first) * length + 1  # with the target of its last token
            begin = epoch.offset + first * length
            tokens[position : position + size] = self.tokens[begin : begin + size]
            starts.append(position + length * np.arange(last - first))
            position += size
        order = np.random.default_rng([self.seed, number, group])
        return Group(place, order.permutation(np.concatenate(starts)), tokens)


def windows(tokens: Tokens, sequence_length: int, batch_size: int) -> Iterator[Windows]:
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


def spread_windows(tokens: Tokens, sequence_length: int, batch_size: int, count: int) -> Iterator[Windows]:
    """Inputs and targets, each (up to batch_size, sequence_length), of `count` windows spread evenly over the tokens.

    Fewer where so many would overlap.
    """
    last = len(tokens) - 1 - sequence_length
    starts = np.linspace(0, last, min(count, (len(tokens) - 1) // sequence_length), dtype=np.int64).tolist()
    for first in range(0, len(starts), batch_size):
        batch = [tokens[start : start + sequence_length + 1] for start in starts[first : first + batch_size]]
        pair = np.stack(batch).astype(np.int64)
        yield pair[:, :-1], pair[:, 1:]
