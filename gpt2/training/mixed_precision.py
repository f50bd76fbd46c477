"""Mixed precision: fp32 master weights, and a compute copy in bf16 or fp16.

Master weights, gradients and optimizer state are fp32. Matrix products run in bf16 or fp16 where that is
faster, on a compute copy of the weights that is cast once per optimizer step (https://arxiv.org/abs/1710.03740).
"""

import os
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import torch
from torch import Tensor

from gpt2.config import GPTConfig
from gpt2.errors import GPT2Error
from gpt2.model.transformer import GPT
from gpt2.training.loss import linear_cross_entropy
from gpt2.training.state import TrainState, Weights, copy_weights

MIN_LOSS_SCALE = 2.0**-10
LOSS_SCALE_GROWTH_INTERVAL = 2000
"""Steps without an overflow before the loss scale is doubled, as in torch.amp.GradScaler."""


class CompileError(GPT2Error):
    """torch.compile does not work on this machine."""


class MixedPrecisionModel:
    """A model with fp32 master weights and a compute copy in the dtype of the matrix products.

    master: the model that the optimizer updates. compute: the copy; in fp32 it is the master itself. processes: that
    train together (`gpt2.distributed`).
    """

    processes = 1

    def __init__(self, master: GPT, dtype: torch.dtype, *, gradient_checkpointing: bool = False) -> None:
        """gradient_checkpointing: recomputes the inside of each block in the backward pass instead of storing it.

        It takes less memory and more time (https://arxiv.org/abs/1604.06174).
        """
        self.master = master
        self.compute = master if dtype == torch.float32 else master.compute_copy(dtype)
        self.compute.gradient_checkpointing = gradient_checkpointing
        self.compiled = False
        self._compiled_shape: tuple[int, ...] | None = None
        self._blocks: Callable[..., Tensor] = self.compute.blocks
        self._add: Callable[[Tensor, Tensor], Tensor] = add_in_place
        self._pairs = [
            (master_weight, copy)
            for master_weight, copy in zip(master.parameters(), self.compute.parameters(), strict=True)
            if master_weight is not copy
        ]
        self._connect_gradients()

    @property
    def config(self) -> GPTConfig:
        """The sizes of the model."""
        return self.master.config

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.master.device

    def zero_grad(self) -> None:
        """Drops all gradients."""
        self.master.zero_grad(set_to_none=True)
        self.compute.zero_grad(set_to_none=True)

    def gradient_sync(self, *, is_last: bool) -> AbstractContextManager[None]:
        """For the passes of a micro-batch: what several processes do about its gradients. is_last: of the step."""
        return nullcontext()

    def clip_grad_norm(self, max_norm: float) -> Tensor:
        """Scales the gradients so that their norm is at most max_norm. Returns the norm before, a scalar."""
        return torch.nn.utils.clip_grad_norm_(self.master.parameters(), max_norm)

    def copy_weights(self) -> Weights:
        """A copy of the master weights, of this process's part if they are divided."""
        return copy_weights(self.master)

    def warm_up(self, batch_size: int, sequence_length: int) -> None:
        """Has no effect on weights. Several processes find out how they communicate best."""

    def _connect_gradients(self) -> None:
        for master_weight, copy in self._pairs:
            if copy.requires_grad:
                self._accumulate_in_master(copy, master_weight)

    def _accumulate_in_master(self, copy: Tensor, master_weight: Tensor) -> None:
        """Adds each gradient of the compute copy to the fp32 gradient as soon as it is computed."""

        def accumulate(parameter: Tensor) -> None:
            assert parameter.grad is not None
            if master_weight.grad is None:
                master_weight.grad = parameter.grad.to(master_weight.dtype)
            else:
                self._add(master_weight.grad.view(-1), parameter.grad.view(-1))
            parameter.grad = None

        copy.register_post_accumulate_grad_hook(accumulate)  # type: ignore[no-untyped-call]

    def compile(self, batch_size: int, sequence_length: int) -> float:
        """Compiles for batches of this shape. Returns the seconds it took. Changes neither weights nor gradients.

        Raises CompileError if that fails, usually because a C++ compiler is missing; the model then runs uncompiled.
        """
        start_s = time.perf_counter()
        self.compiled, self._compiled_shape = True, (batch_size, sequence_length)
        tokens = torch.zeros(batch_size, sequence_length, dtype=torch.long, device=self.device)
        try:
            _separate_kernels_by_instruction_set()
            self._compile_blocks()
            for _ in range(2):  # the second pass adds to gradients
                self.loss(tokens, tokens).backward()  # type: ignore[no-untyped-call]
            with torch.no_grad():
                self.loss(tokens, tokens)
        except Exception as error:  # compilers raise many types of errors
            self.compiled, self._compiled_shape = False, None
            self._uncompile_blocks()
            torch._dynamo.reset()
            raise CompileError(_first_line(error)) from None
        finally:
            self.zero_grad()
        return time.perf_counter() - start_s

    def _compile_blocks(self) -> None:
        # not the embedding: compiled, its threads sum the gradients of a token in a non-deterministic order
        self._blocks = torch.compile(self.compute.blocks, dynamic=False)
        self._add = torch.compile(add_in_place, dynamic=True)

    def _uncompile_blocks(self) -> None:
        self._blocks, self._add = self.compute.blocks, add_in_place

    @torch.no_grad()
    def cast_weights(self) -> None:
        """Updates the compute copy. Call it after each change of the master weights."""
        if self._pairs:
            masters, copies = zip(*self._pairs, strict=True)
            torch._foreach_copy_(copies, masters)

    def loss(self, inputs: Tensor, targets: Tensor, *, label_smoothing: float = 0.0) -> Tensor:
        """Mean cross-entropy in nats per token of a batch, both (B, T). Its gradients go to the master weights."""
        # other shapes, such as the last window of a split, run uncompiled
        compiled = self.compiled and tuple(inputs.shape) == self._compiled_shape
        return self._loss(inputs, targets, label_smoothing, compiled)

    def _loss(self, inputs: Tensor, targets: Tensor, label_smoothing: float, compiled: bool) -> Tensor:
        embedded = self.compute.embed(inputs)
        blocks = self._blocks if compiled else self.compute.blocks
        hidden = blocks(embedded, None, self.compute.visible(inputs))  # (B, T, C)
        weight = self.compute.lm_head.weight
        return linear_cross_entropy(
            hidden.to(weight.dtype).view(-1, hidden.size(-1)),
            weight,
            targets.reshape(-1),
            label_smoothing=label_smoothing,
            compiled=compiled,
        )


def _separate_kernels_by_instruction_set() -> None:
    """Gives each instruction set of the CPU its own cache of compiled kernels.

    torch's cache does not distinguish them, and a kernel of another instruction set computes wrong numbers.
    """
    from torch._inductor.runtime.cache_dir_utils import cache_dir  # takes seconds to import

    folder, name = Path(cache_dir()), torch.backends.cpu.get_cpu_capability().lower()
    if folder.name != name:
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(folder / name)


def grow_loss_scale(state: TrainState) -> None:
    """Doubles the loss scale after many steps without an overflow."""
    if state.precision != "float16":
        return
    state.steps_since_overflow += 1
    if state.steps_since_overflow == LOSS_SCALE_GROWTH_INTERVAL:
        state.loss_scale, state.steps_since_overflow = 2 * state.loss_scale, 0


def back_off_loss_scale(state: TrainState) -> bool:
    """Halves the loss scale after an overflow in float16, whose step is skipped. Returns whether it did."""
    if state.precision != "float16" or state.loss_scale <= MIN_LOSS_SCALE:
        return False
    state.loss_scale, state.steps_since_overflow = state.loss_scale / 2, 0
    return True


def add_in_place(total: Tensor, part: Tensor) -> Tensor:
    """Adds a gradient, in any dtype, to an fp32 one."""
    return total.add_(part)


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]
