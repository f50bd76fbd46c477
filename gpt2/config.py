"""Configurations as frozen dataclasses without defaults, and the arithmetic of model sizes.

They are not beside the code that they configure, because that code imports torch, and a stage reports invalid values
before it imports torch. The types are annotated with their ranges, which the stages check when they load params.yaml.
The rules across fields are checked for every instance.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Annotated, Any, ClassVar, Literal

from annotated_types import Ge, Gt, Le, Lt, MinLen

from gpt2.errors import UserError

GPT2_VOCAB_SIZE = 50257
"""Number of tokens of GPT-2's encoding: 256 bytes, 50,000 merges and `<|endoftext|>`."""
END_OF_TEXT = 50256
"""The token `<|endoftext|>`."""
DTYPES = ("fp32", "bf16", "int8", "int4")
"""Dtypes for inference; int8 is quantized."""
PositiveInt = Annotated[int, Gt(0)]
Seed = Annotated[int, Ge(0), Lt(2**63)]


@dataclass(frozen=True)
class Rule:
    """A condition across fields. message: the error, with {0} for the first value, and so on."""

    fields: tuple[str, ...]
    holds: Callable[..., bool]
    message: str


def violations(rules: Iterable[Rule], values: Mapping[str, Any]) -> list[str]:
    """The messages of violated rules. Rules with a field that is not in `values` are skipped."""
    messages = []
    for rule in rules:
        if all(name in values for name in rule.fields):
            needed = [values[name] for name in rule.fields]
            if not rule.holds(*needed):
                messages.append(rule.message.format(*needed))
    return messages


@dataclass(frozen=True)
class GPTConfig:
    """The five sizes that define a GPT-2, with the keys of `gpt_config.pt`.

    block_size: context length in tokens. n_embd: width. n_embd is a multiple of n_head.
    """

    block_size: PositiveInt
    vocab_size: PositiveInt
    n_layer: PositiveInt
    n_head: PositiveInt
    n_embd: PositiveInt

    RULES: ClassVar = (
        Rule(
            ("n_embd", "n_head"),
            lambda n_embd, n_head: n_embd % n_head == 0,
            "n_embd {0} is not a multiple of n_head {1}",
        ),
    )

    def __post_init__(self) -> None:
        if problems := violations(self.RULES, vars(self)):
            raise ValueError("; ".join(problems))

    @classmethod
    def from_dict(cls, sizes: dict[str, Any]) -> "GPTConfig":
        """The configuration in a plain dict, as read from a checkpoint.

        Raises UserError unless it has exactly the five keys, each with a positive integer.
        """
        keys = [field.name for field in fields(cls)]
        if not isinstance(sizes, dict) or sizes.keys() != set(keys):
            found = ", ".join(map(str, sizes)) if isinstance(sizes, dict) else type(sizes).__name__
            raise UserError(f"a model configuration has the keys {', '.join(keys)}; found: {found}")
        for key, value in sizes.items():
            if type(value) is not int or value < 1:
                raise UserError(f"model configuration: {key} is {value!r}; expected a positive integer")
        try:
            return cls(**sizes)
        except ValueError as error:
            raise UserError(f"model configuration: {error}") from None

    @classmethod
    def preset(cls, name: str) -> "GPTConfig":
        """One of OpenAI's four sizes. Raises UserError for a name not in PRESETS."""
        if name not in PRESETS:
            raise UserError(f"no model preset {name!r}; there are: {', '.join(PRESETS)}")
        return PRESETS[name]

    def to_dict(self) -> dict[str, int]:
        """The five sizes as a plain dict."""
        return asdict(self)

    @property
    def head_size(self) -> int:
        """Width of one attention head."""
        return self.n_embd // self.n_head

    def num_parameters(self) -> int:
        """Number of parameters; the tied embedding counts once."""
        width = self.n_embd
        return (self.vocab_size + self.block_size) * width + self.n_layer * self._block_parameters + 2 * width

    def num_trained_parameters(self, freeze_layers: int) -> int:
        """Number of parameters that a run trains, which keeps so many blocks as they were (`TrainConfig`)."""
        if not freeze_layers:
            return self.num_parameters()
        return (self.n_layer - freeze_layers) * self._block_parameters + 2 * self.n_embd

    @property
    def _block_parameters(self) -> int:
        """Four matrices of 3, 1, 4 and 4 squares of the width, their biases, two LayerNorms."""
        return 12 * self.n_embd**2 + 13 * self.n_embd

    def flops_per_token(self, sequence_length: int, freeze_layers: int = 0) -> int:
        """Floating-point operations of a training step (forward and backward) for each token.

        6 for each weight of a matrix product and 12 * n_layer * n_embd * sequence_length for attention: appendix B of
        PaLM, https://arxiv.org/abs/2204.02311. A third of them is the forward pass, which is all that frozen blocks
        take; a frozen head takes two thirds, as its input has a gradient.
        """
        matrix_weights = self.num_parameters() - self.block_size * self.n_embd
        flops = 6 * matrix_weights + 12 * self.n_layer * self.n_embd * sequence_length
        if freeze_layers:
            flops -= 2 * self.vocab_size * self.n_embd
            flops -= freeze_layers * (4 * self._block_parameters + 8 * self.n_embd * sequence_length)
        return flops


def _gpt2_size(n_layer: int, n_head: int, n_embd: int) -> GPTConfig:
    return GPTConfig(block_size=1024, vocab_size=GPT2_VOCAB_SIZE, n_layer=n_layer, n_head=n_head, n_embd=n_embd)


PRESETS = {
    "gpt2": _gpt2_size(n_layer=12, n_head=12, n_embd=768),
    "gpt2-medium": _gpt2_size(n_layer=24, n_head=16, n_embd=1024),
    "gpt2-large": _gpt2_size(n_layer=36, n_head=20, n_embd=1280),
    "gpt2-xl": _gpt2_size(n_layer=48, n_head=25, n_embd=1600),
}


@dataclass(frozen=True)
class CorpusConfig:
    """Where the text comes from.

    source: a known name, a path, a glob pattern, an address, or a list of these (docs/own-text.md).
    fallback: a known name, used with a warning if the download fails; None makes a failed download an error.
    text_column: of the text, in files of rows. limit: as `gpt2.data.limit.parse_limit` takes it; None is all.
    """

    source: Annotated[str, MinLen(1)] | Annotated[list[Annotated[str, MinLen(1)]], MinLen(1)]
    fallback: Annotated[str, MinLen(1)] | None
    text_column: Annotated[str, MinLen(1)]
    limit: str | None


@dataclass(frozen=True)
class TokenizeConfig:
    """How the corpus is split into training and validation.

    split: with "tail", the last `validation_fraction` of the characters is held out; with "documents", those documents
    whose hash is below this fraction of all hashes. deduplicate: of identical documents, only the first is kept.
    """

    validation_fraction: Annotated[float, Gt(0), Lt(1)]
    split: Literal["tail", "documents"]
    deduplicate: bool


@dataclass(frozen=True)
class TrainConfig:
    """A training run. A step is an optimizer step: `gradient_accumulation_steps` micro-batches.

    init_from: "scratch", or a Hugging Face GPT-2 to start from: a name such as "gpt2", or a local folder.
    freeze_layers: the number of first blocks that stay as they were, with the embeddings and the head, which is tied to
    them; 0 trains everything.
    batch_size: sequences in a micro-batch. sequence_length: tokens in a sequence.
    optimizer: with "muon", Muon at muon_learning_rate trains the matrices of the blocks and AdamW the rest.
    schedule: after warmup_steps, learning_rate decays to min_learning_rate at max_steps: along a cosine, linearly, or
    ("wsd": warm-up, stable, decay) linearly over the last decay_fraction of the steps. muon_learning_rate follows the
    same schedule. label_smoothing: fraction of each target's probability that is spread over all tokens.
    dropout: probability, at GPT-2's three places (`gpt2.model.transformer.GPT`). mask_documents: whether attention
    stops at the borders of documents. min_token_count: tokens that occur fewer times in the training text share
    one embedding, in a run from scratch; 0 gives each its own. eval_interval: in steps.
    patience: early stopping: the run ends after so many evaluations in a row without a better validation loss.
    """

    init_from: Annotated[str, MinLen(1)]
    freeze_layers: Annotated[int, Ge(0)]
    seed: Seed
    batch_size: PositiveInt
    sequence_length: PositiveInt
    gradient_accumulation_steps: PositiveInt
    max_steps: PositiveInt
    optimizer: Literal["adamw", "muon"]
    learning_rate: Annotated[float, Gt(0)]
    min_learning_rate: Annotated[float, Ge(0)]
    muon_learning_rate: Annotated[float, Gt(0)]
    schedule: Literal["cosine", "linear", "wsd"]
    warmup_steps: Annotated[int, Ge(0)]
    decay_fraction: Annotated[float, Gt(0), Le(1)]
    weight_decay: Annotated[float, Ge(0)]
    beta1: Annotated[float, Ge(0), Lt(1)]
    beta2: Annotated[float, Ge(0), Lt(1)]
    max_grad_norm: Annotated[float, Gt(0)]
    label_smoothing: Annotated[float, Ge(0), Lt(1)]
    dropout: Annotated[float, Ge(0), Lt(1)]
    mask_documents: bool
    min_token_count: Annotated[int, Ge(0)]
    eval_interval: PositiveInt
    patience: PositiveInt | None

    RULES: ClassVar = (
        Rule(
            ("warmup_steps", "max_steps"),
            lambda warmup_steps, max_steps: warmup_steps < max_steps,
            "warmup_steps {0} is longer than the run, max_steps {1}",
        ),
        Rule(
            ("min_learning_rate", "learning_rate"),
            lambda lowest, highest: lowest <= highest,
            "min_learning_rate {0} is over learning_rate {1}",
        ),
        Rule(
            ("min_token_count", "label_smoothing"),
            lambda count, smoothing: not (count and smoothing),
            "min_token_count {0} does not work with label_smoothing {1}; set one of them to 0",
        ),
        Rule(
            ("freeze_layers", "init_from"),
            lambda freeze_layers, init_from: freeze_layers == 0 or init_from != "scratch",
            "freeze_layers {0} keeps random weights as they are; name a model in init_from, or set 0",
        ),
    )

    def __post_init__(self) -> None:
        if problems := violations(self.RULES, vars(self)):
            raise ValueError("; ".join(problems))

    def micro_batch_size(self, limit: int) -> int:
        """The largest number of sequences, up to `limit`, that divides batch_size; 0 if the limit is less than 1."""
        return next((size for size in range(min(limit, self.batch_size), 0, -1) if self.batch_size % size == 0), 0)

    def share(self, processes: int) -> "TrainConfig":
        """The step of each of several processes: micro-batches of up to batch_size, of its part of the sequences.

        Raises UserError if the global batch cannot be divided among them.
        """
        sequences = self.batch_size * self.gradient_accumulation_steps
        if sequences % processes:
            possible = ", ".join(str(n) for n in range(1, sequences + 1) if sequences % n == 0)
            raise UserError(
                f"train.batch_size x gradient_accumulation_steps is {sequences} sequences, which {processes} processes "
                f"cannot divide; possible: {possible}"
            )
        part = sequences // processes
        size = next(size for size in range(self.batch_size, 0, -1) if part % size == 0)
        return replace(self, batch_size=size, gradient_accumulation_steps=part // size)

    @property
    def tokens_per_step(self) -> int:
        """Number of tokens that a step trains on."""
        return self.batch_size * self.gradient_accumulation_steps * self.sequence_length


@dataclass(frozen=True)
class EvaluateConfig:
    """The report on a trained model.

    batch_size: sequences in a batch. passage_tokens: length of the passage whose loss per token is plotted.
    prompts: the model generates a sample for each, with max_new_tokens, temperature (0 is greedy), top_k, top_p and
    seed. None uses the first words of three lines of the validation text.
    tasks: "cloze", made from the validation text (`gpt2.evaluation.cloze`), and names of tasks of
    lm-evaluation-harness (`gpt2.hub.harness`).
    """

    batch_size: PositiveInt
    passage_tokens: Annotated[int, Ge(2), Le(1024)]
    prompts: Annotated[list[str], MinLen(1)] | None
    max_new_tokens: PositiveInt
    temperature: Annotated[float, Ge(0)]
    top_k: PositiveInt | None
    top_p: Annotated[float, Gt(0), Le(1)] | None
    seed: Seed
    tasks: list[Annotated[str, MinLen(1)]]
