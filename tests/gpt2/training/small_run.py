"""A small training run, which the tests of the training loop and of its parts share."""

import torch

from gpt2.data.sampler import Sampler
from gpt2.data.token_files import open_tokens
from gpt2.model.transformer import GPT
from gpt2.optimizers.optimizer import Optimizer
from gpt2.training.mixed_precision import MixedPrecisionModel
from gpt2.training.state import TrainState
from gpt2.training.trainer import Trainer
from gpt2.training.validation import validation_loss
from gpt2.training.vocabulary import text_vocabulary
from tests.conftest import TINY


class Recorder:
    """Callbacks that record their calls. stop_after: the step after which to stop the run."""

    def __init__(self, stop_after=None):
        self.rows, self.saved, self.steps, self.warnings, self.stop_after = [], [], [], [], stop_after

    def log(self, row):
        self.rows.append(row)

    def progress(self, state, loss, tokens_per_s):
        self.steps.append(state.step)

    def save(self, step, content, last):
        self.saved.append(step)

    def warn(self, message):
        self.warnings.append(message)

    def should_stop(self):
        return self.stop_after is not None and bool(self.steps) and self.steps[-1] >= self.stop_after


class Run:
    """A small training run."""

    def __init__(self, tokens, config, precision=torch.float32, **options):
        torch.manual_seed(config.seed)
        self.config, self.tokens = config, tokens
        vocabulary = text_vocabulary(open_tokens(tokens, "train"), config, TINY.vocab_size)
        self.model = GPT(TINY if vocabulary is None else vocabulary.config(TINY))
        self.model.dropout = config.dropout
        self.model.freeze(config.freeze_layers)
        self.compute = MixedPrecisionModel(self.model, precision, vocabulary=vocabulary, **options)
        self.optimizer = Optimizer(self.model, config, dtype=precision)
        self.state = TrainState.initial(precision, config.batch_size)

    def go(self, callbacks, log_interval=1, validate=None, **options):
        config = self.config
        sampler = Sampler(open_tokens(self.tokens, "train"), config)
        validation = open_tokens(self.tokens, "val")[:200]
        return Trainer(
            self.compute,
            self.optimizer,
            sampler,
            validate
            or (
                lambda batch_size, progress: validation_loss(
                    self.compute, validation, sequence_length=16, batch_size=batch_size, progress=progress
                )
            ),
            config,
            self.state,
            callbacks,
            log_interval=log_interval,
            **options,
        ).train()

    def weights(self):
        return torch.cat([p.detach().flatten() for p in self.model.parameters()])
