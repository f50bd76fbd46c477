"""The training loop. It takes all that it needs as arguments and knows no file, no tracker and no signal."""

import math
import time
from collections import deque
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from gpt2.compute import CompileError, Compute
from gpt2.config import TrainConfig
from gpt2.data import Sampler
from gpt2.device import peak_memory_bytes
from gpt2.errors import DivergedError, FileError, OutOfMemoryError, is_out_of_memory
from gpt2.model import GPT
from gpt2.optim import Optimizer, lr_at
from gpt2.progress import Progress

Row = dict[str, float | int | None]
Weights = dict[str, Tensor]
FORMAT_VERSION = 2
FIRST_LOSS_SCALE = {"float16": 2.0**16}
LOWEST_LOSS_SCALE = 2.0**-10
ADVICE = "Try a smaller train.learning_rate or a longer warm-up"
RAISE_LOSS_SCALE_AFTER = 2000
"""Steps without an overflow, as in torch's GradScaler."""
SHORTEST_SAVE_INTERVAL_S = 60.0
SAVE_INTERVAL_IN_SAVES = 50
"""So that writing checkpoints takes at most 2 % of the time."""


@dataclass
class TrainState:
    """Where a run is: all that a checkpoint needs besides weights and optimizer.

    precision: "float32", "bfloat16" or "float16". compiled: whether the model was. micro_batch_size: sequences computed
    at a time; less than the batch_size of the configuration where memory was short. step: number of steps done.
    best_val_loss: infinite before the first evaluation; best_weights: those that had it, on the CPU. history: the rows
    logged so far. unfinished_row: that of the last step, if a stop came before its evaluation was done. elapsed_s: time
    spent training, over all sessions of the run; data_s and log_s: how much of it went into waiting for batches, and
    into telling `Hooks` of steps and rows; save_s: spent besides on checkpoints. loss_scale: what losses are multiplied
    by, so that small gradients are not lost in float16; scaled_steps: since when it is what it is.
    """

    precision: str
    micro_batch_size: int
    compiled: bool = False
    step: int = 0
    best_val_loss: float = math.inf
    best_step: int = 0
    elapsed_s: float = 0.0
    data_s: float = 0.0
    log_s: float = 0.0
    save_s: float = 0.0
    loss_scale: float = 1.0
    scaled_steps: int = 0
    unfinished_row: Row | None = None
    history: list[Row] = field(default_factory=list)
    best_weights: Weights = field(default_factory=dict)

    @classmethod
    def begin(cls, precision: torch.dtype, micro_batch_size: int) -> "TrainState":
        """That of a new run, whose matrix products are in this format."""
        name = str(precision).removeprefix("torch.")
        return cls(name, micro_batch_size, loss_scale=FIRST_LOSS_SCALE.get(name, 1.0))


class Hooks(Protocol):
    """What the loop tells its surroundings."""

    def log(self, row: Row) -> None:
        """A row of the history: step, train_loss, val_loss (None if not evaluated), learning_rate, grad_norm, ..."""

    def progress(self, state: TrainState, loss: float, tokens_per_s: float) -> None:
        """A step is done."""

    def save(self, state: TrainState) -> None:
        """This is a moment to write a checkpoint. Raises FileError if that is not possible."""

    def warn(self, message: str) -> None:
        """Something that the user should know."""

    def should_stop(self) -> bool:
        """Whether somebody wants the run to pause; asked often."""


class _Stopped(Exception):  # noqa: N818 - no error of anybody's
    """`Hooks.should_stop` said so; the run is between two steps, or before the evaluation of one."""


def train(
    compute: Compute,
    optimizer: Optimizer,
    sampler: Sampler,
    validate: Callable[[int, Progress], float],
    config: TrainConfig,
    state: TrainState,
    hooks: Hooks,
    *,
    log_interval: int,
    checkpoint_interval: int | None = None,
    peak_flops: float | None = None,
) -> bool:
    """Trains until `max_steps`, or until `hooks.should_stop()`; goes on from `state`, which it updates.

    validate: gives the validation loss of the model as it is, computed for so many sequences at a time, and calls what
    it is given after each batch. checkpoint_interval: in steps; besides, and if it is None, checkpoints are due by
    time. peak_flops: of this machine, to log the utilisation.
    Returns whether the run is complete; a checkpoint was written in either case.
    Raises DivergedError before a loss or gradient that is not finite can reach the weights, or weights that are not
    finite a checkpoint; OutOfMemoryError if memory is not enough for one sequence at a time; FileError if checkpoints
    cannot be written.
    """
    model = compute.model
    meter = _Meter(config.step_tokens)
    saver = _Saver(model, optimizer, hooks, checkpoint_interval)
    flops_per_token = model.config.flops_per_token(config.sequence_length)
    batches = _batches(sampler, state.step, config.max_steps, model.device)
    compute.cast_weights()
    try:
        while state.step < config.max_steps or state.unfinished_row is not None:
            if state.unfinished_row is None:
                learning_rate = lr_at(state.step, config)
                optimizer.set_learning_rate(learning_rate)
                loss = _gradients(compute, batches, config, state, hooks)
                if loss is None:
                    batches.close()
                    _compute_in_smaller_parts(compute, optimizer, sampler, config, state, hooks)
                    batches = _batches(sampler, state.step, config.max_steps, model.device)
                    continue
                grad_norm = torch.nn.utils.clip_grad_norm_(model.parameters(), config.max_grad_norm)
                train_loss, norm = loss.item(), grad_norm.item()  # the device is waited for here, once in a step
                if math.isfinite(train_loss) and math.isfinite(norm):
                    optimizer.step()
                    compute.cast_weights()
                    _raise_loss_scale(state)
                elif not (math.isfinite(train_loss) and _lower_loss_scale(state)):
                    raise DivergedError(
                        f"training diverged at step {state.step + 1}: loss {train_loss}, gradient norm {norm}; the "
                        f"weights are as after step {state.step}. {ADVICE}",
                        state.step,
                    )
                optimizer.zero_grad()
                state.step += 1
                state.elapsed_s += meter.lap()
                with _added_to(state, "log_s"):
                    hooks.progress(state, train_loss, meter.tokens_per_s)
                if _evaluates(state.step, config) or state.step % log_interval == 0:
                    state.unfinished_row = {
                        "step": state.step,
                        "train_loss": train_loss,
                        "val_loss": None,
                        "learning_rate": learning_rate,
                        "grad_norm": norm if math.isfinite(norm) else None,
                        "tokens_per_s": meter.tokens_per_s,
                        "mfu": meter.tokens_per_s * flops_per_token / peak_flops if peak_flops else None,
                        "tokens": state.step * config.step_tokens,
                    }

            if state.unfinished_row is not None:
                val_loss = None
                if _evaluates(state.step, config):
                    val_loss = validate(state.micro_batch_size, lambda _: _poll(hooks))
                    state.elapsed_s += meter.pause()
                    if val_loss < state.best_val_loss:  # never true of NaN
                        state.best_val_loss, state.best_step = val_loss, state.step
                        state.best_weights = _copied_weights(model)
                row: Row = {
                    **state.unfinished_row,
                    "val_loss": val_loss if val_loss is not None and math.isfinite(val_loss) else None,
                    "peak_memory_bytes": peak_memory_bytes(model.device),
                    "elapsed_s": state.elapsed_s,
                }
                state.history.append(row)
                state.unfinished_row = None
                with _added_to(state, "log_s"):
                    hooks.log(row)

            is_last = state.step == config.max_steps
            if is_last or saver.is_due(state.step):
                saver.save(state, last=is_last)
                meter.pause()
            if not is_last:
                _poll(hooks)
    except _Stopped:
        optimizer.zero_grad()
        saver.save(state, last=True)
        return False
    finally:
        batches.close()
    return True


def _evaluates(step: int, config: TrainConfig) -> bool:
    return step == config.max_steps or step % config.eval_interval == 0


def _poll(hooks: Hooks) -> None:
    if hooks.should_stop():
        raise _Stopped


def _gradients(
    compute: Compute, batches: Iterator[tuple[Tensor, Tensor]], config: TrainConfig, state: TrainState, hooks: Hooks
) -> Tensor | None:
    """Adds up the gradients of a step. Gives its loss; None if memory was not enough for a micro-batch."""
    size = state.micro_batch_size
    parts = config.accumulation_steps * (config.batch_size // size)
    loss = torch.zeros((), device=compute.model.device)
    try:
        for _ in range(config.accumulation_steps):
            with _added_to(state, "data_s"):
                batch = next(batches)
            for inputs, targets in zip(*(torch.split(each, size) for each in batch), strict=True):
                _poll(hooks)
                part_loss = compute.loss(inputs, targets, label_smoothing=config.label_smoothing) / parts
                (part_loss * state.loss_scale).backward()  # type: ignore[no-untyped-call]
                loss += part_loss.detach()
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        return None
    if state.loss_scale != 1.0:
        torch._foreach_div_([p.grad for p in compute.model.parameters() if p.grad is not None], state.loss_scale)
    return loss


def _compute_in_smaller_parts(
    compute: Compute, optimizer: Optimizer, sampler: Sampler, config: TrainConfig, state: TrainState, hooks: Hooks
) -> None:
    """Makes micro-batches at most half as large; the step, which is to be done again, stays the sum that it was."""
    optimizer.zero_grad()
    if compute.model.device.type == "cuda":
        torch.cuda.empty_cache()
    before, size = state.micro_batch_size, config.micro_batch(state.micro_batch_size // 2)
    if not size:
        raise OutOfMemoryError(
            f"memory is not enough for one sequence of {config.sequence_length} tokens at a time, in step "
            f"{state.step + 1}. Set runtime.gradient_checkpointing: true, or take a smaller train.sequence_length or "
            "model; `python -m gpt2 info` says what fits"
        )
    state.micro_batch_size = size
    hooks.warn(
        f"out of memory in step {state.step + 1} with {before} sequences at a time: going on with {size} at a time and "
        f"{before // size} times the accumulation, so that a step is the same {config.step_tokens:,} tokens"
    )
    if state.compiled:
        inputs, targets = (
            torch.from_numpy(each)[:size].contiguous().to(compute.model.device) for each in sampler.batch(state.step, 0)
        )
        try:
            compute.compile(inputs, targets)
        except CompileError as error:
            hooks.warn(f"going on without torch.compile: {error}")
            state.compiled = False


def _raise_loss_scale(state: TrainState) -> None:
    """Doubles it after many steps without an overflow."""
    if state.precision != "float16":
        return
    state.scaled_steps += 1
    if state.scaled_steps == RAISE_LOSS_SCALE_AFTER:
        state.loss_scale, state.scaled_steps = 2 * state.loss_scale, 0


def _lower_loss_scale(state: TrainState) -> bool:
    """Halves it, for a step whose gradients overflowed in float16 and is left out; False if that cannot help."""
    if state.precision != "float16" or state.loss_scale <= LOWEST_LOSS_SCALE:
        return False
    state.loss_scale, state.scaled_steps = state.loss_scale / 2, 0
    return True


def _copied_weights(model: GPT) -> Weights:
    return {name: p.detach().to("cpu", copy=True) for name, p in model.named_parameters()}


class _Saver:
    """Knows when a checkpoint is due, and that none is written of weights that are not finite."""

    MOST_FAILURES = 3

    def __init__(self, model: GPT, optimizer: Optimizer, hooks: Hooks, interval_steps: int | None) -> None:
        self.model, self.optimizer, self.hooks, self.interval_steps = model, optimizer, hooks, interval_steps
        self._since_s = time.monotonic()
        self._cost_s = 0.0
        self._failures = 0
        self._saved_step = -1

    def is_due(self, step: int) -> bool:
        """By steps, or by time: 60 s, or 50 times as long as writing the last one took."""
        if self.interval_steps and step % self.interval_steps == 0:
            return True
        return time.monotonic() - self._since_s >= max(SHORTEST_SAVE_INTERVAL_S, SAVE_INTERVAL_IN_SAVES * self._cost_s)

    def save(self, state: TrainState, *, last: bool = False) -> None:
        """Has a checkpoint written. If that fails, and it is not the last one, the next try comes when it is due.

        Raises FileError after three failures in a row, or that of the last one.
        """
        if state.step == self._saved_step:
            return
        start_s = time.monotonic()
        self._require_finite(state)
        try:
            self.hooks.save(state)
            self._failures, self._saved_step = 0, state.step
        except FileError as error:
            self._failures += 1
            if last or self._failures == self.MOST_FAILURES:
                raise
            self.hooks.warn(f"{error}. Going on without it")
        self._since_s = time.monotonic()
        self._cost_s = self._since_s - start_s
        if not last:  # whose cost its own content cannot have
            state.save_s += self._cost_s

    def _require_finite(self, state: TrainState) -> None:
        tensors: list[Tensor] = [*self.model.parameters(), *self.optimizer.tensors()]
        largest = torch.stack([norm.detach().float().cpu() for norm in torch._foreach_norm(tensors, ord=math.inf)])
        if not largest.isfinite().all():
            raise DivergedError(
                f"training diverged: after step {state.step} weights or moments are not finite. {ADVICE}",
                state.step,
            )


def _batches(sampler: Sampler, step: int, max_steps: int, device: torch.device) -> Generator[tuple[Tensor, Tensor]]:
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
    plain = {name: value for name, value in vars(state).items() if name != "best_weights"}
    return {
        "format_version": FORMAT_VERSION,
        "config": model.config.to_dict(),
        "model_state_dict": model.state_dict(),
        "best_model_state_dict": {} if state.best_step == state.step else state.best_weights,
        "optimizer_state_dict": optimizer.state_dict(),
        "state": {**plain, "history": list(state.history)},
        "generators": _generators(model.device),
        "environment": environment(model.device),
    }


def environment(device: torch.device) -> dict[str, Any]:
    """What the last bits of a run depend on, besides its parameters, its text and this code."""
    return {
        "torch": str(torch.__version__),
        "threads": torch.get_num_threads(),
        "device": device.type,
        "world size": 1,
    }


def _generators(device: torch.device) -> dict[str, Tensor]:
    states = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    return states


def restore(content: dict[str, Any], model: GPT, optimizer: Optimizer) -> TrainState:
    """Puts the content of a checkpoint back into model, optimizer and generators; gives the state to go on from.

    Raises FileError if another version of this program wrote it.
    """
    if content.get("format_version") != FORMAT_VERSION:
        raise FileError(
            f"the checkpoint has format {content.get('format_version')!r}, and this program reads {FORMAT_VERSION}; go "
            "on with the program that wrote it, or delete its folder to start anew"
        )
    model.load_state_dict(content["model_state_dict"])
    optimizer.load_state_dict(content["optimizer_state_dict"])
    state = TrainState(**content["state"])
    if state.best_step:
        state.best_weights = content["best_model_state_dict"] or _copied_weights(model)
    torch.set_rng_state(content["generators"]["cpu"])
    if model.device.type == "cuda" and "cuda" in content["generators"]:
        torch.cuda.set_rng_state(content["generators"]["cuda"], model.device)
    return state
