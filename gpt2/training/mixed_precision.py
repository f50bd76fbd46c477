"""Mixed precision: fp32 master weights, and a compute copy in bf16 or fp16.

Master weights, gradients and optimizer state are fp32. Matrix products run in bf16 or fp16 where that is
faster, on a compute copy of the weights that is cast once per optimizer step (https://arxiv.org/abs/1710.03740).
"""

import os
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext, suppress
from pathlib import Path
from typing import Any, cast

import torch
import torch._functorch.config
from torch import Tensor, nn

from gpt2.config import GPTConfig
from gpt2.errors import GPT2Error
from gpt2.files import cache_folder
from gpt2.model.transformer import GPT
from gpt2.training.loss import linear_cross_entropy
from gpt2.training.state import TrainState, Weights, copy_weights
from gpt2.training.vocabulary import TextVocabulary

MIN_LOSS_SCALE = 2.0**-10
LOSS_SCALE_GROWTH_INTERVAL = 2000
"""Steps without an overflow before the loss scale is doubled, as in torch.amp.GradScaler."""
RECOMPUTED = {
    "ban_recompute_used_far_apart": False,
    "ban_recompute_long_fusible_chains": False,
    "ban_recompute_materialized_backward": False,
}
"""Settings of torch.compile: the backward pass recomputes GELU and LayerNorm instead of storing them."""


class CompileError(GPT2Error):
    """torch.compile does not work on this machine."""


class MixedPrecisionModel:
    """A model with fp32 master weights and a compute copy in the dtype of the matrix products.

    master: the model that the optimizer updates. compute: the copy; in fp32 it is the master itself. dtype: of the
    matrix products. processes: that train together (`gpt2.distributed`).
    """

    processes = 1

    def __init__(
        self,
        master: GPT,
        dtype: torch.dtype,
        *,
        gradient_checkpointing: bool = False,
        vocabulary: TextVocabulary | None = None,
    ) -> None:
        """gradient_checkpointing: recomputes the inside of each block in the backward pass instead of storing it.

        It takes less memory and more time (https://arxiv.org/abs/1604.06174). vocabulary: the tokens that have a row of
        the embedding to themselves; None is all.
        """
        self.master, self.dtype = master, dtype
        self.vocabulary = vocabulary
        self.compute = master if dtype == torch.float32 else master.compute_copy(dtype)
        self.compute.gradient_checkpointing = gradient_checkpointing
        self.compiled = False
        self._compiled_shape: tuple[int, ...] | None = None
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
            _choose_cache()
            self._compile_blocks()
            with torch._functorch.config.patch(RECOMPUTED), _trusted_instruction_sets():
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
        # each block by itself: all share the kernels of the first, and in several processes the gradients of one are
        # sent while the next computes. Not the embedding: compiled, its threads sum the gradients of a token in a
        # non-deterministic order
        self._uncompile_blocks()  # for another shape
        for block in cast(nn.ModuleList, self.compute.transformer["h"]):
            block.forward = _with_one_graph(torch.compile(block.forward, dynamic=False))
        self._add = torch.compile(add_in_place, dynamic=True)

    def _uncompile_blocks(self) -> None:
        for block in cast(nn.ModuleList, self.compute.transformer["h"]):
            vars(block).pop("forward", None)
        self._add = add_in_place

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
        eager = self.compiled and not compiled
        with torch.compiler.set_stance("force_eager") if eager else nullcontext():
            return self._loss(inputs, targets, label_smoothing, compiled)

    def _loss(self, inputs: Tensor, targets: Tensor, label_smoothing: float, compiled: bool) -> Tensor:
        visible = self.compute.visible(inputs)
        if self.vocabulary is not None:
            inputs, targets = self.vocabulary.rows(inputs), self.vocabulary.rows(targets)
        hidden = self.compute.blocks(self.compute.embed(inputs), None, visible)  # (B, T, C)
        weight = self.compute.lm_head.weight
        return linear_cross_entropy(
            hidden.to(weight.dtype).view(-1, hidden.size(-1)),
            weight,
            targets.reshape(-1),
            label_smoothing=label_smoothing,
            shared=self.vocabulary.shared if self.vocabulary is not None else 1,
            compiled=compiled,
        )


def _with_one_graph(forward: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """A compiled forward pass of a block that runs the graph for training also where no gradients are computed."""

    def run(x: Tensor, *arguments: Any, **options: Any) -> Tensor:
        if torch.is_grad_enabled():
            return forward(x, *arguments, **options)
        with torch.enable_grad():
            return forward(x.detach().requires_grad_(), *arguments, **options).detach()

    return run


def _choose_cache() -> None:
    """Keeps compiled kernels in the user's cache, unless TORCHINDUCTOR_CACHE_DIR is set; each instruction set apart.

    torch's own folder is temporary, and does not distinguish the instruction sets of a CPU: a kernel of another one
    computes wrong numbers.
    """
    from torch._inductor.runtime.cache_dir_utils import cache_dir, default_cache_dir  # takes seconds to import

    # torch sets the variable itself, to its own folder, when it is imported
    if os.environ.get("TORCHINDUCTOR_CACHE_DIR", default_cache_dir()) == default_cache_dir():
        with suppress(OSError):  # where that cannot be written, torch's folder has to do
            folder = cache_folder() / "torch"
            folder.mkdir(parents=True, exist_ok=True)
            os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(folder)
    folder, name = Path(cache_dir()), torch.backends.cpu.get_cpu_capability().lower()
    if folder.name != name:
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(folder / name)


def _trusted_instruction_sets() -> AbstractContextManager[None]:
    """Without trial compilations for each instruction set of the CPU, which a C++20 compiler knows anyway."""
    from torch._inductor import config

    is_set = config.cpp.vec_isa_ok is not None
    return nullcontext() if is_set else cast(AbstractContextManager[None], config.patch({"cpp.vec_isa_ok": True}))


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
