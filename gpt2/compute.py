"""How a model computes: the number format of its matrix products, and whether it is compiled.

The model that is trained, its gradients and the optimizer's state are fp32. Its matrix products run in a narrower
format where the hardware is faster at it, on a copy of the weights that is cast once for each optimizer step.
"""

import time
from collections.abc import Callable

import torch
from torch import Tensor

from gpt2.errors import GPT2Error
from gpt2.loss import linear_cross_entropy
from gpt2.model import GPT


class CompileError(GPT2Error):
    """This machine cannot compile."""


class Compute:
    """A model and the form of it that computes."""

    def __init__(self, model: GPT, precision: torch.dtype, *, gradient_checkpointing: bool = False) -> None:
        """precision: of the matrix products. gradient_checkpointing: takes less memory and more time.

        With it, the inside of each block is computed again in the backward pass rather than kept
        (https://arxiv.org/abs/1604.06174).
        """
        self.model = model
        self.fast = model if precision == torch.float32 else model.narrowed(precision)
        self.fast.gradient_checkpointing = gradient_checkpointing
        self.compiled = False
        self._compiled_shape: torch.Size | None = None
        self._blocks: Callable[[Tensor], Tensor] = self.fast.blocks
        self._add: Callable[[Tensor, Tensor], Tensor] = _add_
        self._pairs = [
            (theirs, ours)
            for theirs, ours in zip(model.parameters(), self.fast.parameters(), strict=True)
            if theirs is not ours
        ]
        for wide, narrow in self._pairs:
            self._pass_on_gradients(narrow, wide)

    def _pass_on_gradients(self, narrow: Tensor, wide: Tensor) -> None:
        """Each gradient of the narrow weights is added to that of the wide ones as soon as it is there."""

        def pass_on(parameter: Tensor) -> None:
            assert parameter.grad is not None
            if wide.grad is None:
                wide.grad = parameter.grad.to(wide.dtype)
            else:
                self._add(wide.grad.view(-1), parameter.grad.view(-1))
            parameter.grad = None

        narrow.register_post_accumulate_grad_hook(pass_on)  # type: ignore[no-untyped-call]

    def compile(self, inputs: Tensor, targets: Tensor) -> float:
        """Compiles for batches of this shape; gives the seconds that took. Changes neither weights nor gradients.

        Raises CompileError where it is not possible, most often for want of a C++ compiler; nothing is changed then.
        """
        start_s = time.perf_counter()
        self.compiled, self._compiled_shape = True, inputs.shape
        # not the embedding: compiled, its threads add up gradients of a token in the order in which they happen to come
        self._blocks = torch.compile(self.fast.blocks, dynamic=False)
        self._add = torch.compile(_add_, dynamic=True)
        try:
            for _ in range(2):  # the second time, gradients are added
                self.loss(inputs, targets).backward()  # type: ignore[no-untyped-call]
            with torch.no_grad():
                self.loss(inputs, targets)
        except Exception as error:  # whatever the compilers of this machine come up with
            self.compiled, self._compiled_shape, self._blocks, self._add = False, None, self.fast.blocks, _add_
            torch._dynamo.reset()
            raise CompileError(_first_line(error)) from None
        finally:
            self.model.zero_grad(set_to_none=True)
            self.fast.zero_grad(set_to_none=True)
        return time.perf_counter() - start_s

    @torch.no_grad()
    def cast_weights(self) -> None:
        """Takes over the model's weights; to be called when they have changed."""
        if self._pairs:
            wide, narrow = zip(*self._pairs, strict=True)
            torch._foreach_copy_(narrow, wide)

    def loss(self, inputs: Tensor, targets: Tensor, *, label_smoothing: float = 0.0) -> Tensor:
        """The mean cross-entropy in nats per token of a batch, both (B, T). Its gradients arrive at the model's."""
        # other shapes, such as the last windows of a text, are not worth compiling for
        compiled = self.compiled and inputs.shape == self._compiled_shape
        embedded = self.fast.embed(inputs)
        hidden = self._blocks(embedded) if compiled else self.fast.blocks(embedded)  # (B, T, C)
        weight = self.fast.lm_head.weight
        return linear_cross_entropy(
            hidden.to(weight.dtype).view(-1, hidden.size(-1)),
            weight,
            targets.reshape(-1),
            label_smoothing=label_smoothing,
            compiled=compiled,
        )


def _add_(total: Tensor, part: Tensor) -> Tensor:
    return total.add_(part)


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]
