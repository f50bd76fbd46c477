"""The training loop. It takes all that it needs as arguments and knows no file, no tracker and no signal."""

import math
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from gpt2.config import TrainConfig
from gpt2.data import Sampler
from gpt2.device import autocast
from gpt2.errors import DivergedError
from gpt2.model import GPT
from gpt2.optim import lr_at

Row = dict[str, float | int | None]


@dataclass
class TrainState:
    """Where a run is: all that a checkpoint needs besides weights and optimizer.

    step: number of steps done. best_val_loss: infinite before the first evaluation. history: the rows logged so far.
    elapsed_s: time spent training, over all sessions of the run. precision: "float32" or "bfloat16".
    """

    precision: str
    step: int = 0
    best_val_loss: float = math.inf
    best_step: int = 0
    elapsed_s: float = 0.0
    history: list[Row] = field(default_factory=list)


class Hooks(Protocol):
    """What the loop tells its surroundings."""

    def log(self, row: Row) -> None:
        """A row of the history: step, train_loss, val_loss (None if not evaluated), learning_rate, grad_norm, ..."""

    def progress(self, state: TrainState, loss: float, tokens_per_s: float) -> None:
        """A step is done."""

    def save(self, state: TrainState) -> None:
        """This is a moment to write a checkpoint."""

    def should_stop(self) -> bool:
        """Whether somebody wants the run to pause."""


def train(
    model: GPT,
    optimizer: torch.optim.Optimizer,
    sampler: Sampler,
    validate: Callable[[], float],
    config: TrainConfig,
    state: TrainState,
    hooks: Hooks,
    *,
    log_interval: int,
) -> bool:
    """Trains until `max_steps`, or until `hooks.should_stop()`; goes on from `state`, which it updates.

    validate: gives the validation loss of the model as it is. Returns whether the run is complete; a checkpoint was
    written in either case.
    Raises DivergedError before a loss or gradient that is not finite can reach the weights.
    """
    precision: torch.dtype = getattr(torch, state.precision)
    meter = _Meter(config.step_tokens)
    model.train()
    while state.step < config.max_steps:
        learning_rate = lr_at(state.step, config)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate

        loss = torch.zeros((), device=model.device)
        for inputs, targets in _micro_batches(sampler, state.step, model.device):
            with autocast(model.device, precision):
                _, micro_loss = model(inputs, targets)
            assert micro_loss is not None
            micro_loss = micro_loss / config.accumulation_steps
            micro_loss.backward()
            loss += micro_loss.detach()
        grad_norm = torch.nn.utils.clip_grad_norm_(model.parameters(), config.max_grad_norm)
        train_loss, norm = loss.item(), grad_norm.item()  # the device is waited for here
        if not (math.isfinite(train_loss) and math.isfinite(norm)):
            raise DivergedError(
                f"training diverged at step {state.step + 1}: loss {train_loss}, gradient norm {norm}; "
                f"the weights are as after step {state.step}. Try a smaller train.learning_rate or a longer warm-up"
            )
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        state.step += 1
        state.elapsed_s += meter.lap()
        hooks.progress(state, train_loss, meter.tokens_per_s)

        is_last = state.step == config.max_steps
        evaluates = is_last or state.step % config.eval_interval == 0
        val_loss = None
        if evaluates:
            model.eval()
            val_loss = validate()
            model.train()
            state.elapsed_s += meter.pause()
            if val_loss < state.best_val_loss:  # never true of NaN
                state.best_val_loss, state.best_step = val_loss, state.step
        if evaluates or state.step % log_interval == 0:
            row: Row = {
                "step": state.step,
                "train_loss": train_loss,
                "val_loss": val_loss if val_loss is not None and math.isfinite(val_loss) else None,
                "learning_rate": learning_rate,
                "grad_norm": norm,
                "tokens_per_s": meter.tokens_per_s,
                "tokens": state.step * config.step_tokens,
                "elapsed_s": state.elapsed_s,
            }
            state.history.append(row)
            hooks.log(row)
        stops = hooks.should_stop()
        is_best = evaluates and state.best_step == state.step
        if is_last or stops or is_best or state.step % config.checkpoint_interval == 0:
            hooks.save(state)
            meter.pause()
        if stops and not is_last:
            return False
    return True


def _micro_batches(sampler: Sampler, step: int, device: torch.device) -> Iterator[tuple[Tensor, Tensor]]:
    """Inputs and targets of a step, each (batch_size, sequence_length)."""
    for micro_step in range(sampler.accumulation_steps):
        inputs, targets = sampler.batch(step, micro_step)
        yield torch.from_numpy(inputs).to(device), torch.from_numpy(targets).to(device)


class _Meter:
    """Speed over the last 20 steps; time spent outside of steps does not count."""

    def __init__(self, step_tokens: int) -> None:
        self.step_tokens = step_tokens
        self.tokens_per_s = 0.0
        self._step_s: deque[float] = deque(maxlen=20)
        self._since_s = time.perf_counter()

    def pause(self) -> float:
        """Starts the next lap now; gives the seconds since the last one."""
        now_s = time.perf_counter()
        elapsed_s, self._since_s = now_s - self._since_s, now_s
        return elapsed_s

    def lap(self) -> float:
        """Counts a step; gives its seconds."""
        elapsed_s = self.pause()
        self._step_s.append(elapsed_s)
        self.tokens_per_s = len(self._step_s) * self.step_tokens / max(sum(self._step_s), 1e-9)
        return elapsed_s


def checkpoint_content(model: GPT, optimizer: torch.optim.Optimizer, state: TrainState) -> dict[str, Any]:
    """What a checkpoint holds: plain values and tensors only, for `torch.load(..., weights_only=True)`."""
    return {
        "format_version": 1,
        "config": model.config.to_dict(),
        "model_state_dict": model.state_dict(),
        "optimizer_state_dict": optimizer.state_dict(),
        "state": {**vars(state), "history": list(state.history)},
        "torch_version": str(torch.__version__),
        "num_threads": torch.get_num_threads(),
        "world_size": 1,
    }


def restore(content: dict[str, Any], model: GPT, optimizer: torch.optim.Optimizer) -> TrainState:
    """Puts the content of a checkpoint back into model and optimizer; gives the state to go on from."""
    model.load_state_dict(content["model_state_dict"])
    optimizer.load_state_dict(content["optimizer_state_dict"])
    return TrainState(**content["state"])
