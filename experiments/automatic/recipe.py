"""The choices of `preset auto`: sizes, rates, batch and weight decay, and the loss that they lead to.

All constants that were found by trying stand here. Rates and schedule are those of the preset laptop; Muon's fit all
widths (docs/experiments.md, ladder).
"""

import math
from dataclasses import dataclass

from experiments.automatic.text import COUNTED_TOKENS, Text
from gpt2.config import GPT2_VOCAB_SIZE, GPTConfig

SIZES = (
    (2, 2, 128),
    (2, 3, 192),
    (2, 4, 256),
    (4, 4, 256),
    (4, 5, 320),
    (4, 6, 384),
    (5, 7, 448),
    (6, 8, 512),
    (7, 10, 640),
    (8, 12, 768),
    (12, 12, 768),
    (18, 14, 896),
    (24, 16, 1024),
)
"""Layers, heads, width. Small models are wide rather than deep: most of their work is the head, whatever the depth. The
steps are small enough for some size to fill the time."""
CONTEXTS = {128: 4e6, 256: 40e6, 512: 400e6, 1024: math.inf}
"""Context in tokens, for runs of up to so many tokens."""
MIN_CONTEXT = 32
WINDOWS = 20
"""Least number of contexts in a text."""
STEP_TOKENS, RUN_TOKENS = 1024, 512_000
"""Tokens in a step of a run of RUN_TOKENS: those of the preset laptop. A step grows as the root of the run, as the
critical batch does (https://arxiv.org/abs/1812.06162)."""
MAX_STEP_TOKENS = 2**19
MICRO_BATCH_TOKENS = 16_384
OPTIMIZER = {"optimizer": "muon", "min_learning_rate": 0.0, "schedule": "linear", "beta2": 0.99}
RATES = {"learning_rate": 1.2e-2, "muon_learning_rate": 2.0e-2}
FULL_RATE_EPOCHS = 3.0
"""Runs that read the text more often take proportionally lower rates, so that the weights move as far in all. A quarter
of the rates ended 0.25 nats lower than the whole on 9,000 tokens read 11 times, and on 30,000 read 10 times (there with
more weight decay, too); an eighth 0.06 higher and 0.05 lower than a quarter. One seed each."""
WARM_UP = 0.04
"""Share of the steps."""
MOST_EPOCHS, MOST_TOKENS_OF_SHORT_TEXTS = 3.0, 256_000
"""A run reads the text so many times at most, or trains on so many tokens if that is more. Larger models take the time
that is left: on 300,000 tokens (seed 1337), 4 layers of width 256 ended at 4.474 after 3 epochs and at 4.456 after 4,
width 384 at 4.435 after 3. On another CPU width 256 ended at 4.465 after 3 epochs, at 4.531 after 4.5 with a weight
decay of 1, at 4.491 after 5 with 0.5, and at 4.481 after 6 with 1."""
WEIGHT_DECAY = ((2, 0.1), (4, 0.5), (12, 3.0), (math.inf, 5.0))
"""For runs that read the text up to so many times. Repeated text needs more (https://arxiv.org/abs/2509.14786), and no
dropout. Best losses of 4 layers of width 256, seed 1337, at the rates of `rates`:

- 300,000 tokens read 3 times: 4.484 with a decay of 0.1, 4.470 with 0.3, 4.474 with 0.5, 4.546 with 1; with a decay of
  0.1 and dropout 0.05, 4.514; 0.1, 4.564. Width 384: 4.435 with 0.5, 4.541 with 1; with 0.1 and dropout 0.1, 4.550.
- 27,500 tokens read 9 times: 4.769 with 3, 4.795 with 6; with 3 and dropout 0.1, 4.796; with 0.5 and dropout 0.3,
  4.858.
- 8,200 tokens read 22 times: 5.785 with 4, 5.784 with 10, 6.150 with 20; with 1 and dropout 0.3, 5.854; with 10 and
  dropout 0.1, 5.865.
"""
EVALUATIONS = ((2, 4), (6, 8), (math.inf, 16))
"""For runs that read the text up to so many times: evaluations. The best weights are kept, so many are good where the
loss on held-out text rises again."""

# loss = FLOOR + OF_SIZE / parameters^SIZE_EXPONENT + OF_TOKENS / tokens^TOKENS_EXPONENT, in nats per token of Tiny
# Shakespeare; parameters without embeddings, and tokens counted as new ones by `effective_tokens`. The part of the size
# is fitted to reports/ladder, the part of the tokens to runs of 33,000 (as counted) to 920,000 tokens.
FLOOR, OF_SIZE, SIZE_EXPONENT, OF_TOKENS, TOKENS_EXPONENT = 2.5, 9.3, 0.30, 20.4, 0.175
USEFUL_REPETITIONS = 3.0
"""R* of https://arxiv.org/abs/2305.16264, which has 15 for large models. Between what reports/ladder (about 1.5,
without dropout) and a run on 30 kB (over 5) suggest."""
COUNTING_LOSS, COUNTING_SLOPE = 5.741, 0.271
"""`Text.counting_loss` of Tiny Shakespeare, and how it rises as a text is shorter than COUNTED_TOKENS, per factor e."""
UNCERTAINTY = 0.10
"""Relative; measured losses of most other texts and sizes were up to so far from the law. Those of 20 MB of code, which
the run does not read whole, were 16 and 35 % off."""


@dataclass(frozen=True)
class Recipe:
    """What a run trains, in which batches. evaluations: during the run."""

    model: GPTConfig
    batch_size: int
    gradient_accumulation_steps: int
    evaluations: int

    @property
    def step_tokens(self) -> int:
        """Tokens in a step."""
        return self.batch_size * self.gradient_accumulation_steps * self.model.block_size


def recipe(size: tuple[int, int, int], tokens: float, training_tokens: float) -> Recipe:
    """The run of a size on about `tokens` tokens, from a text of training_tokens."""
    context = next(length for length, limit in CONTEXTS.items() if tokens <= limit)
    while context > MIN_CONTEXT and context * WINDOWS > training_tokens:
        context //= 2
    ideal = STEP_TOKENS * math.sqrt(tokens / RUN_TOKENS)
    step_tokens = min(MAX_STEP_TOKENS, max(STEP_TOKENS, 2 ** round(math.log2(ideal))))
    batch_size = min(step_tokens, max(MICRO_BATCH_TOKENS, context)) // context
    epochs = tokens / training_tokens
    return Recipe(
        GPTConfig(context, GPT2_VOCAB_SIZE, *size),
        batch_size,
        step_tokens // (batch_size * context),
        next(count for limit, count in EVALUATIONS if epochs <= limit),
    )


def most_tokens(training_tokens: float) -> float:
    """Tokens of the longest run that pays for a text of training_tokens."""
    return max(MOST_EPOCHS * training_tokens, MOST_TOKENS_OF_SHORT_TEXTS)


def rates(epochs: float) -> dict[str, float]:
    """The learning rates of a run that reads the text so many times, to two digits."""
    factor = min(1.0, FULL_RATE_EPOCHS / epochs)
    return {key: float(f"{factor * rate:.1e}") for key, rate in RATES.items()}


def weight_decay(epochs: float) -> float:
    """That of a run that reads the text so many times."""
    return next(decay for limit, decay in WEIGHT_DECAY if epochs <= limit)


def expected_loss(model: GPTConfig, tokens: float, training_tokens: float, text: Text) -> float:
    """Validation loss in nats per token after training on `tokens` tokens.

    That of Tiny Shakespeare, times how much harder this text is to predict by counting than as many tokens of that.
    """
    parameters = model.num_parameters() - (model.vocab_size + model.block_size) * model.n_embd
    new = effective_tokens(tokens, training_tokens * text.new_tokens / text.tokens)
    usual: float = FLOOR + OF_SIZE * parameters**-SIZE_EXPONENT + OF_TOKENS * new**-TOKENS_EXPONENT
    counted = min(1.0, training_tokens / COUNTED_TOKENS)
    return usual * text.counting_loss / (COUNTING_LOSS - COUNTING_SLOPE * math.log(counted))


def effective_tokens(tokens: float, new_tokens: float) -> float:
    """Tokens of training as if all were new. new_tokens: of the text; read again, they count less.

    U + U R* (1 - exp(-R / R*)) for R repetitions of U tokens, https://arxiv.org/abs/2305.16264, equation 5.
    """
    if tokens <= new_tokens:
        return tokens
    repetitions = tokens / new_tokens - 1
    return new_tokens * (1 + USEFUL_REPETITIONS * (1 - math.exp(-repetitions / USEFUL_REPETITIONS)))
