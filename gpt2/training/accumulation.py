"""The gradients of one optimizer step, accumulated over micro-batches that fit into memory."""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from gpt2.config import TrainConfig
from gpt2.data.loader import BatchLoader
from gpt2.errors import MicroBatchError, OutOfMemoryError, is_out_of_memory
from gpt2.training.mixed_precision import CompileError, MixedPrecisionModel
from gpt2.training.state import TrainState


def seed_dropout(seed: int, step: int, micro_step: int, rank: int) -> None:
    """Seeds torch's generators for a micro-batch: its dropout depends on nothing that was computed before."""
    (mixed,) = np.random.SeedSequence((seed, step, micro_step, rank)).generate_state(1, np.uint64)
    torch.manual_seed(int(mixed))


class GradientAccumulator:
    """Runs the forward and backward passes of a step.

    If memory runs out, it halves the micro-batch, doubles the accumulation, and repeats the step: the global batch
    and the order of the data stay the same. Several processes have to start again for that: MicroBatchError.
    """

    def __init__(
        self,
        model: MixedPrecisionModel,
        loader: BatchLoader,
        config: TrainConfig,
        state: TrainState,
        *,
        warn: Callable[[str], None],
        check_stop: Callable[[], None],
        rank: int = 0,
    ) -> None:
        """config: of this process (`TrainConfig.share`), whose number is `rank`.

        check_stop: called before each micro-batch; may interrupt.
        """
        self.model, self.loader, self.config, self.state = model, loader, config, state
        self.warn, self.check_stop, self.rank = warn, check_stop, rank

    def accumulate(self) -> Tensor:
        """Adds the gradients of the next step to the model's. Returns the mean loss, a scalar on the device.

        Raises OutOfMemoryError if not even one sequence fits into memory.
        """
        while True:
            try:
                loss = self._forward_backward()
                break
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
            self._halve_micro_batch()  # after the except block, whose traceback keeps tensors alive
        if self.state.loss_scale != 1.0:
            gradients = [p.grad for p in self.model.master.parameters() if p.grad is not None]
            torch._foreach_div_(gradients, self.state.loss_scale)
        return loss

    def _forward_backward(self) -> Tensor:
        config, state, size = self.config, self.state, self.state.micro_batch_size
        num_micro_batches = config.gradient_accumulation_steps * (config.batch_size // size)
        total = torch.zeros((), device=self.model.device)
        done = 0
        for _ in range(config.gradient_accumulation_steps):
            with state.timed("data_s"):
                batch = self.loader.next()
            for inputs, targets in zip(*(torch.split(each, size) for each in batch), strict=True):
                self.check_stop()
                if config.dropout:
                    seed_dropout(config.seed, state.step, done, self.rank)
                done += 1
                with self.model.gradient_sync(is_last=done == num_micro_batches):
                    loss = self.model.loss(inputs, targets, label_smoothing=config.label_smoothing) / num_micro_batches
                    (loss * state.loss_scale).backward()  # type: ignore[no-untyped-call]
                total += loss.detach()
        return total

    def _halve_micro_batch(self) -> None:
        self.model.zero_grad()
        if self.model.device.type == "cuda":
            torch.cuda.empty_cache()
        step, before = self.state.step, self.state.micro_batch_size
        size = self.config.micro_batch_size(before // 2)
        if size and self.model.processes > 1:
            # the others wait for this process in a collective, and cannot repeat the step
            raise MicroBatchError(
                f"out of memory in step {step + 1} with a micro-batch of {before}: a micro-batch of {size} comes next",
                size,
            )
        if not size:
            raise OutOfMemoryError(
                f"out of memory in step {step + 1} with one sequence of {self.config.sequence_length} tokens: set "
                "runtime.gradient_checkpointing: true, or choose a smaller train.sequence_length or model; "
                "`python -m gpt2 info` shows what fits"
            )
        self.state.micro_batch_size = size
        self.warn(
            f"out of memory in step {step + 1} with a micro-batch of {before}: continuing with a micro-batch of {size} "
            f"and {before // size} times the gradient accumulation; the global batch stays "
            f"{self.config.tokens_per_step:,} tokens"
        )
        self.loader.seek(step)
        if self.state.compiled:
            try:
                self.model.compile(size, self.config.sequence_length)
            except CompileError as error:
                self.warn(f"continuing without torch.compile: {error}")
                self.state.compiled = False
