"""The training loop. It takes all that it needs as arguments and knows no file, no tracker and no signal."""

import math
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from gpt2.compute import Compute
from gpt2.config import TrainConfig
from gpt2.data import Sampler
from gpt2.device import peak_memory_bytes
from gpt2.errors import DivergedError
from gpt2.model import GPT
from gpt2.optim import Optimizer, lr_at

Row = dict[str, float | int | None]
FIRST_LOSS_SCALE = {"float16": 2.0**16}
LOWEST_LOSS_SCALE = 2.0**-10


@dataclass
class TrainState:
    """Where a run is: all that a checkpoint needs besides weights and optimizer.

    precision: "float32", "bfloat16" or "float16". compiled: whether the model was. step: number of steps done.
    best_val_loss: infinite before the first evaluation. history: the rows logged so far. elapsed_s: time spent
    training, over all sessions of the run; data_s and log_s: how much of it went into waiting for batches, and into
    telling `Hooks` of steps and rows. loss_scale: what losses are multiplied by, so that small gradients are not lost
    in float16.
    """

    precision: str
    compiled: bool = False
    step: int = 0
    best_val_loss: float = math.inf
    best_step: int = 0
    elapsed_s: float = 0.0
    data_s: float = 0.0
    log_s: float = 0.0
    loss_scale: float = 1.0
    history: list[Row] = field(default_factory=list)

    @classmethod
    def begin(cls, precision: torch.dtype) -> "TrainState":
        """That of a new run, whose matrix products are in this format."""
        name = str(precision).removeprefix("torch.")
        return cls(precision=name, loss_scale=FIRST_LOSS_SCALE.get(name, 1.0))


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
    compute: Compute,
    optimizer: Optimizer,
    sampler: Sampler,
    validate: Callable[[], float],
    config: TrainConfig,
    state: TrainState,
    hooks: Hooks,
    *,
    log_interval: int,
    peak_flops: float | None = None,
) -> bool:
    """Trains until `max_steps`, or until `hooks.should_stop()`; goes on from `state`, which it updates.

    validate: gives the validation loss of the model as it is. peak_flops: of this machine, to log the utilisation.
    Returns whether the run is complete; a checkpoint was written in either case.
    Raises DivergedError before a loss or gradient that is not finite can reach the weights.
    """
    model = compute.model
    meter = _Meter(config.step_tokens)
    flops_per_token = model.config.flops_per_token(config.sequence_length)
    batches = _batches(sampler, state.step, config.max_steps, model.device)
    compute.cast_weights()
    while state.step < config.max_steps:
        learning_rate = lr_at(state.step, config)
        optimizer.set_learning_rate(learning_rate)

        loss = torch.zeros((), device=model.device)
        for _ in range(config.accumulation_steps):
            with _added_to(state, "data_s"):
                inputs, targets = next(batches)
            micro_loss = compute.loss(inputs, targets, label_smoothing=config.label_smoothing)
            micro_loss = micro_loss / config.accumulation_steps
            (micro_loss * state.loss_scale).backward()  # type: ignore[no-untyped-call]
            loss += micro_loss.detach()
        if state.loss_scale != 1.0:
            torch._foreach_div_([p.grad for p in model.parameters() if p.grad is not None], state.loss_scale)
        grad_norm = torch.nn.utils.clip_grad_norm_(model.parameters(), config.max_grad_norm)
        train_loss, norm = loss.item(), grad_norm.item()  # the device is waited for here, once in a step
        if math.isfinite(train_loss) and math.isfinite(norm):
            optimizer.step()
            compute.cast_weights()
        elif not (math.isfinite(train_loss) and _lower_loss_scale(state)):
            raise DivergedError(
                f"training diverged at step {state.step + 1}: loss {train_loss}, gradient norm {norm}; "
                f"the weights are as after step {state.step}. Try a smaller train.learning_rate or a longer warm-up"
            )
        optimizer.zero_grad()
        state.step += 1
        state.elapsed_s += meter.lap()
        with _added_to(state, "log_s"):
            hooks.progress(state, train_loss, meter.tokens_per_s)

        is_last = state.step == config.max_steps
        evaluates = is_last or state.step % config.eval_interval == 0
        val_loss = None
        if evaluates:
            val_loss = validate()
            state.elapsed_s += meter.pause()
            if val_loss < state.best_val_loss:  # never true of NaN
                state.best_val_loss, state.best_step = val_loss, state.step
        if evaluates or state.step % log_interval == 0:
            row: Row = {
                "step": state.step,
                "train_loss": train_loss,
                "val_loss": val_loss if val_loss is not None and math.isfinite(val_loss) else None,
                "learning_rate": learning_rate,
                "grad_norm": norm if math.isfinite(norm) else None,
                "tokens_per_s": meter.tokens_per_s,
                "mfu": meter.tokens_per_s * flops_per_token / peak_flops if peak_flops else None,
                "peak_memory_bytes": peak_memory_bytes(model.device),
                "tokens": state.step * config.step_tokens,
                "elapsed_s": state.elapsed_s,
            }
            state.history.append(row)
            with _added_to(state, "log_s"):
                hooks.log(row)
        stops = hooks.should_stop()
        is_best = evaluates and state.best_step == state.step
        if is_last or stops or is_best or state.step % config.checkpoint_interval == 0:
            hooks.save(state)
            meter.pause()
        if stops and not is_last:
            return False
    return True


def _lower_loss_scale(state: TrainState) -> bool:
    """Halves it, for a step whose gradients overflowed in float16 and is left out; False if that cannot help."""
    state.loss_scale /= 2
    return state.precision == "float16" and state.loss_scale >= LOWEST_LOSS_SCALE


def _batches(sampler: Sampler, step: int, max_steps: int, device: torch.device) -> Iterator[tuple[Tensor, Tensor]]:
    """Inputs and targets of each micro-batch from `step` on, both (batch_size, sequence_length).

    The next one is prepared while one is used.
    """

    def prepare(place: tuple[int, int]) -> tuple[Tensor, Tensor]:
        pair = (torch.from_numpy(array) for array in sampler.batch(*place))
        inputs, targets = (each.pin_memory() if device.type == "cuda" else each.contiguous() for each in pair)
        return inputs, targets

    places = ((s, micro_step) for s in range(step, max_steps) for micro_step in range(sampler.accumulation_steps))
    with ThreadPoolExecutor(max_workers=1) as thread:
        prepared = thread.submit(prepare, next(places)) if step < max_steps else None
        while prepared is not None:
            inputs, targets = prepared.result()
            following = next(places, None)
            prepared = thread.submit(prepare, following) if following else None
            yield inputs.to(device, non_blocking=True), targets.to(device, non_blocking=True)


@contextmanager
def _added_to(state: TrainState, name: str) -> Iterator[None]:
    """Adds the seconds that the body takes to a field of the state."""
    start_s = time.perf_counter()
    yield
    setattr(state, name, getattr(state, name) + time.perf_counter() - start_s)


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


def checkpoint_content(model: GPT, optimizer: Optimizer, state: TrainState) -> dict[str, Any]:
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


def restore(content: dict[str, Any], model: GPT, optimizer: Optimizer) -> TrainState:
    """Puts the content of a checkpoint back into model and optimizer; gives the state to go on from."""
    model.load_state_dict(content["model_state_dict"])
    optimizer.load_state_dict(content["optimizer_state_dict"])
    return TrainState(**content["state"])
