"""Measures some steps of a training, as the train stage would run it. A process of its own, for each shape.

    python -m experiments.automatic.probe SECONDS

in a folder with params.yaml and data/tokens. Writes probe.json there: the fields of `Speed`.
"""

import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from gpt2.data.token_files import Tokens
from gpt2.files import write_json
from stages import paths, preflight
from stages.cores import reserve_cores
from stages.params import Params, load_params
from stages.process import StopSignal, run_stage

RESULT = Path("probe.json")
WARM_UP_STEPS, MIN_STEPS = 2, 3
VALIDATION_BATCHES, SCORED_BATCHES = 4, 4
KERNELS_WAIT_S = 180.0


@dataclass(frozen=True)
class Speed:
    """A measured training. step_s: of an optimizer step. validation_tokens_per_s: of the validation loss in training.

    scoring_tokens_per_s: of the scores of the stages after it, which predict the whole vocabulary, in fp32.

    set_up_s: from the start of the process to the model in memory. compile_s: of torch.compile with its cache filled;
    0 if it is not used.
    """

    step_s: float
    validation_tokens_per_s: float
    scoring_tokens_per_s: float
    set_up_s: float
    compile_s: float


def main(stop: StopSignal) -> None:
    """Measures for as many seconds as the argument says."""
    params = load_params(paths.PARAMS)
    with reserve_cores(params.runtime, stop):
        write_json(RESULT, asdict(measure(params, float(sys.argv[1]), stop)))


def measure(params: Params, seconds: float, stop: StopSignal) -> Speed:
    """Steps of a new run, and batches of its validation."""
    import psutil

    from gpt2.training.trainer import Trainer
    from gpt2.training.validation import validation_loss
    from gpt2.world import ALONE
    from stages import session

    size = preflight.micro_batch_that_fits(params)
    plan = preflight.Plan(params, {}, Path("checkpoints/probe"), size, {})
    run = session.set_up(plan, stop, ALONE)
    set_up_s = time.time() - psutil.Process().create_time()
    compile_s = 0.0
    if run.state.compiled:
        fill_caches(run)
        start_s = time.perf_counter()
        run.state.compiled = session.compile_model(run.model, run.state, params.train.sequence_length)
        compile_s = time.perf_counter() - start_s
    trainer = Trainer(
        run.model,
        run.optimizer,
        run.sampler,
        lambda *_: 0.0,
        params.train,
        run.state,
        _Callbacks(stop),
        log_interval=params.runtime.log_interval,
    )
    run.model.cast_weights()
    num_steps = 0
    try:
        for _ in range(WARM_UP_STEPS):
            trainer.train_step()
        start_s = time.perf_counter()
        while num_steps < MIN_STEPS or time.perf_counter() - start_s < seconds:
            stop.check()
            trainer.train_step()
            num_steps += 1
        step_s = (time.perf_counter() - start_s) / num_steps
    finally:
        trainer.loader.close()
    length, micro_batch = params.train.sequence_length, run.state.micro_batch_size
    tokens = run.train_tokens[: VALIDATION_BATCHES * micro_batch * length + 1]
    start_s = time.perf_counter()
    validation_loss(run.model, tokens, sequence_length=length, batch_size=micro_batch)
    validation_tokens_per_s = (len(tokens) - 1) / (time.perf_counter() - start_s)
    scoring_tokens_per_s = measure_scoring(params, run.train_tokens)
    return Speed(step_s, validation_tokens_per_s, scoring_tokens_per_s, set_up_s, compile_s)


def measure_scoring(params: Params, tokens: Tokens) -> float:
    """Tokens/s of `gpt2.evaluation.scores`, with a model of random weights."""
    from gpt2.device import choose_device
    from gpt2.evaluation.scores import score
    from gpt2.model.transformer import GPT

    model, length = GPT(params.model).to(choose_device(params.runtime.device)).eval(), params.train.sequence_length
    size = params.evaluate.batch_size
    batch, seconds = tokens[: size * length + 1], []
    for _ in range(SCORED_BATCHES):
        start_s = time.perf_counter()
        score(model, batch, sequence_length=length, batch_size=size)
        seconds.append(time.perf_counter() - start_s)
    return (len(batch) - 1) / min(seconds)  # the first ones write to new memory, which takes longer


def fill_caches(run: Any) -> None:
    """Compiles, and then forgets, what the stages compile on a new machine, so that it is in the caches of the disk."""
    import torch

    from gpt2.kernels import library
    from stages import session

    build = library.start_build()
    session.compile_model(run.model, run.state, run.plan.params.train.sequence_length)
    torch._dynamo.reset()
    if build is not None:
        build.has_ended(KERNELS_WAIT_S)


class _Callbacks:
    """Those of a training that is not recorded."""

    def __init__(self, stop: StopSignal) -> None:
        self.stop = stop

    def log(self, row: Any) -> None:
        """Nothing is logged."""

    def progress(self, state: Any, loss: float, tokens_per_s: float) -> None:
        """Nothing is shown."""

    def save(self, step: int, content: dict[str, Any], last: bool) -> None:
        """Nothing is saved."""

    def warn(self, message: str) -> None:
        """A micro-batch that does not fit is told in the run."""

    def should_stop(self) -> bool:
        """After a signal."""
        return bool(self.stop)


if __name__ == "__main__":
    run_stage(main)
