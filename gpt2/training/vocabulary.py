"""Training with the tokens that a text has often enough to learn them, instead of all 50,257.

Tokens that never occur in the training text differ only by their random initialization: as inputs they get no gradient,
and as outputs that of their probability. Here they share one row of the embedding, so the head computes one logit for
all of them. It counts as often as there are such tokens: the loss is exactly that of the whole model with equal rows.
On a text of 1 MB the head is a quarter as large; it is most of the work of a small model.

If tokens that occur once share that row, too, the model learns where to expect a token that it does not know. Otherwise
it learns that there is none, and held-out text has one about as often as the training text has a token that occurs once
(Good, 1953, https://doi.org/10.1093/biomet/40.3-4.237).

Names of sizes, besides those of `gpt2.model.transformer`:  K tokens with a row each. The shared row is row K.
"""

from dataclasses import replace

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from gpt2.config import GPTConfig, TrainConfig
from gpt2.data.token_files import Tokens, count_tokens

MAX_COUNTED_TOKENS = 100_000_000
"""A longer text has nearly all tokens of the vocabulary."""
EMBEDDINGS = ("transformer.wte.weight", "lm_head.weight")


class TextVocabulary:
    """The tokens with a row each. tokens: their ids, ascending, (K,). shared: number of the others."""

    def __init__(self, counts: npt.NDArray[np.int64], min_count: int = 1) -> None:
        """counts: how often each token occurs, (V,), from `gpt2.data.token_files.count_tokens`.

        min_count: tokens that occur fewer times share a row.
        """
        occurs = counts >= min_count
        self.tokens = torch.from_numpy(np.flatnonzero(occurs))
        self.shared = len(counts) - len(self.tokens)
        rows = np.where(occurs, np.cumsum(occurs) - 1, len(self.tokens))
        self._rows = torch.from_numpy(rows)  # (V,)

    def config(self, config: GPTConfig) -> GPTConfig:
        """The sizes of the model to train, with K + 1 rows of embeddings."""
        return replace(config, vocab_size=len(self.tokens) + 1)

    def rows(self, idx: Tensor) -> Tensor:
        """The rows of token ids idx, of any shape."""
        if self._rows.device != idx.device:
            self._rows = self._rows.to(idx.device)
        return self._rows[idx]

    def whole(self, weights: dict[str, Tensor]) -> dict[str, Tensor]:
        """The weights of the trained model, with a row of embeddings for each of the V tokens."""
        rows = self._rows.cpu()
        return {name: weight[rows] if name in EMBEDDINGS else weight for name, weight in weights.items()}


def text_vocabulary(text: Tokens, config: TrainConfig, vocab_size: int) -> TextVocabulary | None:
    """Which tokens of a training text share a row; None if each of the vocab_size tokens has its own."""
    if not config.min_token_count or config.init_from != "scratch" or len(text) > MAX_COUNTED_TOKENS:
        return None
    counts = count_tokens(text)
    vocabulary = TextVocabulary(np.pad(counts, (0, vocab_size - len(counts))), config.min_token_count)
    return vocabulary if vocabulary.shared else None
