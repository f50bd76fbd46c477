"""A session of a training run: from its params, data and checkpoints to the files of the train stage."""

import socket
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch

from gpt2.config import GPTConfig
from gpt2.data.sampler import Sampler
from gpt2.data.token_files import TokenFiles, open_tokens
from gpt2.device import choose_device, choose_precision, configure_device, peak_flops
from gpt2.distributed import parts
from gpt2.errors import DivergedError, Interrupted, MicroBatchError, UserError
from gpt2.model.hugging_face import from_pretrained
from gpt2.model.transformer import GPT
from gpt2.optimizers.optimizer import Optimizer
from gpt2.progress import ProgressCallback
from gpt2.training.checkpoints import CheckpointStore
from gpt2.training.mixed_precision import CompileError, MixedPrecisionModel
from gpt2.training.state import TrainState, environment
from gpt2.training.trainer import Trainer
from gpt2.training.validation import sample_loss, validation_loss
from gpt2.training.vocabulary import text_vocabulary
from gpt2.world import World
from stages import paths, preflight, tracking
from stages.callbacks import SilentCallbacks, StageCallbacks, metrics_of
from stages.params import Params
from stages.preflight import Plan
from stages.process import StopSignal, echo, warn

MIN_SECONDS_TO_COMPILE = 10.0
"""Compiling pays off for runs whose matrix products take longer than this at the machine's peak."""
SAMPLE_SHARE = 0.05
"""Of the tokens that a run trains on: so many of the training text are scored at its end, in under 2 % of its time."""


@dataclass
class TrainingRun:
    """Everything a session trains with. ids: of the run in the trackers. resumed: from a checkpoint."""

    plan: Plan
    world: World
    strategy: parts.Strategy
    model: MixedPrecisionModel
    optimizer: Optimizer
    sampler: Sampler
    train_tokens: TokenFiles
    val_tokens: TokenFiles
    state: TrainState
    store: CheckpointStore
    writer: parts.Writer
    peak_flops: float
    ids: tracking.RunIds
    resumed: bool

    def logged_events(self) -> list[dict[str, Any]]:
        """The metrics that earlier sessions logged, for the tracker."""
        return [tracking.metrics_event(int(row["step"] or 0), metrics_of(row)) for row in self.state.history]


def set_up(plan: Plan, stop: StopSignal, world: World) -> TrainingRun:
    """Data, model, optimizer and state: of a new run, or of the newest checkpoint."""
    config, runtime = plan.params.train, plan.params.runtime
    device = choose_device(runtime.device)
    configure_device(device, runtime.threads or world.threads())
    torch.manual_seed(config.seed)
    # the processes of a machine share its copy of the tokens
    train_tokens, val_tokens = (
        open_tokens(paths.TOKENS, split, part=world.local_rank, parts=world.local_size) for split in ("train", "val")
    )
    sampler = Sampler(train_tokens, config, rank=world.rank, processes=world.size)
    store = CheckpointStore(plan.folder, world)
    checkpoint = store.load_newest(warn)
    check_stop(stop, world)
    vocabulary = text_vocabulary(train_tokens, config, plan.params.model.vocab_size)
    if vocabulary is not None and not len(vocabulary.tokens):
        raise UserError(f"no token is {config.min_token_count} times in the text; lower train.min_token_count")
    sizes = plan.params.model if vocabulary is None else vocabulary.config(plan.params.model)
    master = (initial_model(plan.params, sizes) if checkpoint is None else GPT(sizes)).to(device)
    master.mask_documents, master.dropout = config.mask_documents, config.dropout
    master.freeze(config.freeze_layers)
    if checkpoint is None:
        precision = world.from_first(world.rank == 0 and choose_precision(device, runtime.precision))
        state = TrainState.initial(precision, plan.micro_batch_size)
        run_id = world.from_first(tracking.new_run_ids().run_id)
    else:
        precision, run_id = getattr(torch, checkpoint["state"]["precision"]), checkpoint["run_id"]
    strategy = parts.choose_strategy(
        runtime.strategy, sizes, config, device, precision, world, preflight.memory_bytes()
    )
    model = parts.make_model(
        master,
        precision,
        world,
        strategy,
        gradient_checkpointing=runtime.gradient_checkpointing,
        vocabulary=vocabulary,
    )
    optimizer = parts.make_optimizer(model, config, world)
    if checkpoint is not None:
        folder = store.path(checkpoint["state"]["step"])
        state = parts.restore(checkpoint, folder, model, optimizer, world)
        warn_if_not_bitwise_reproducible(checkpoint["environment"], environment(master, world))
        if checkpoint["environment"].get("world size") != world.size:
            state.micro_batch_size = plan.micro_batch_size
    share = config.share(world.size)
    state.micro_batch_size = world.from_first(
        share.micro_batch_size(min(state.micro_batch_size, parts.known_micro_batch(plan.folder, world)))
    )
    if state.micro_batch_size < share.batch_size:
        warn(
            f"memory is short: the micro-batch is {state.micro_batch_size} instead of {share.batch_size}; the global "
            f"batch stays {config.tokens_per_step:,} tokens"
        )
    check_stop(stop, world)
    cache = paths.real_root() / "checkpoints/peak-flops.json"
    peak = world.from_first(world.rank == 0 and peak_flops(device, state.dtype, cache)) * world.size
    if checkpoint is None:
        state.compiled = is_compiled(plan.params, sizes, device.type, peak)
    writer = parts.make_writer(store, optimizer, world, device)
    ids = tracking.RunIds(run_id, None)
    resumed = checkpoint is not None
    return TrainingRun(
        plan,
        world,
        strategy,
        model,
        optimizer,
        sampler,
        train_tokens,
        val_tokens,
        state,
        store,
        writer,
        peak,
        ids,
        resumed,
    )


def check_stop(stop: StopSignal, world: World) -> None:
    """Raises Interrupted in all processes if a signal arrived in one."""
    if world.any(bool(stop)):
        stop.signal_number = world.max(stop.signal_number or 0)
        stop.check()


def start_tracking(run: TrainingRun, stop: StopSignal) -> AbstractContextManager[tracking.Run]:
    """The record of the run. That of all processes but rank 0 is empty."""
    if run.world.rank:
        return nullcontext(tracking.Run(run.ids, stop))
    node = socket.gethostname() if run.world.size > run.world.local_size else None
    events = run.logged_events()
    return tracking.start_run(run.plan.params, "train", run.ids, stop, events=events, system_metrics=True, node=node)


def train(run: TrainingRun, tracker: tracking.Run, stop: StopSignal) -> None:
    """Trains to the last step. Raises Interrupted, after saving a checkpoint, if a signal arrives."""
    params, state, store, world = run.plan.params, run.state, run.store, run.world
    config, folder = params.train, run.plan.folder
    if state.is_complete(config):
        echo(f"this run is complete in {folder}, using its results; delete that folder to train again")
    else:
        begin = f"resuming from step {state.step} of {config.max_steps} in {folder}, " if run.resumed else ""
        trained, whole = run.model.config.num_trained_parameters(config.freeze_layers), params.model.num_parameters()
        parameters = f"{whole:,}" if trained == whole else f"{trained:,} of {whole:,}"
        echo(
            f"{begin}training {parameters} parameters on {run.model.device} in "
            f"{state.precision}, global batch {config.tokens_per_step:,} tokens"
            + (f", {world.size} processes, {run.strategy}" if world.size > 1 else "")
        )
        if (vocabulary := run.model.vocabulary) is not None:
            rare = f"that the training text has fewer than {config.min_token_count} times"
            echo(f"{vocabulary.shared:,} tokens {rare} share one embedding")
        with stop.exit_immediately():
            works = state.compiled and compile_model(run.model, state, config.sequence_length)
            state.compiled = not world.any(not works)
            run.model.warm_up(state.micro_batch_size, config.sequence_length)

    def validate(batch_size: int, progress: ProgressCallback) -> float:
        return validation_loss(
            run.model,
            run.val_tokens,
            sequence_length=config.sequence_length,
            batch_size=batch_size,
            progress=progress,
            world=world,
        )

    def score_training_text(batch_size: int, progress: ProgressCallback) -> float:
        return sample_loss(
            run.model,
            run.train_tokens,
            min(len(run.val_tokens), round(SAMPLE_SHARE * state.step * config.tokens_per_step)),
            sequence_length=config.sequence_length,
            batch_size=batch_size,
            progress=progress,
            world=world,
        )

    callbacks: StageCallbacks | SilentCallbacks
    if world.rank == 0:
        callbacks = StageCallbacks(store, tracker, stop, state, config.max_steps, run.writer)
    else:
        callbacks = SilentCallbacks(run.writer, stop, run.ids.run_id)
    trainer = Trainer(
        run.model,
        run.optimizer,
        run.sampler,
        validate,
        config,
        state,
        callbacks,
        log_interval=params.runtime.log_interval,
        checkpoint_interval=params.runtime.checkpoint_interval,
        peak_flops=run.peak_flops,
        world=world,
        score_training_text=score_training_text,
    )
    try:
        is_complete = trainer.train()
        if is_complete and state.step < config.max_steps:
            callbacks.stopped_early(state)
    except DivergedError as error:
        steps = store.steps()
        last_good = f"The last good checkpoint is {store.path(steps[-1])}" if steps else "There is no checkpoint yet"
        raise DivergedError(f"{error}. {last_good}", error.good_steps) from None
    except MicroBatchError as error:
        parts.remember_micro_batch(folder, world, error.micro_batch_size)
        raise
    finally:
        callbacks.close()
    if not is_complete:
        raise Interrupted(
            f"interrupted; the checkpoint of step {state.step} is in {folder}; run the same command again to resume",
            world.max(stop.signal_number or 0),
        )
    for tokens in (run.train_tokens, run.val_tokens):  # a short run ends before all shards are verified
        tokens.finish_verification()
    check_stop(stop, world)


def initial_model(params: Params, sizes: GPTConfig) -> GPT:
    """The model before the first step: freshly initialised, or Hugging Face's. Raises UserError if its sizes differ."""
    source = params.train.init_from
    if source == "scratch":
        return GPT(sizes)
    pretrained = from_pretrained(source)
    ours, theirs = params.model.to_dict(), pretrained.config.to_dict()
    differing = [f"{key}: {theirs[key]}" for key in ours if ours[key] != theirs[key]]
    if differing:
        raise UserError(f"train.init_from {source!r} has other sizes; set in the section model: {', '.join(differing)}")
    return pretrained


def warn_if_not_bitwise_reproducible(then: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Warns if a run is resumed in an environment that gives different bits."""
    changes = [f"{name} {then[name]} instead of {now[name]}" for name in now if then.get(name, now[name]) != now[name]]
    if changes:
        warn(
            f"this run started with {', '.join(changes)}; it resumes, but its results will not be bitwise equal to an "
            "uninterrupted run"
        )


def is_compiled(params: Params, sizes: GPTConfig, device_type: str, peak_flops: float) -> bool:
    """Whether to compile: it takes up to a minute, and makes each step a fifth to a third faster."""
    if params.runtime.compile != "auto":
        return params.runtime.compile == "always"
    if device_type == "mps":  # where torch.compile is a prototype
        return False
    config = params.train
    flops_per_token = sizes.flops_per_token(config.sequence_length, config.freeze_layers)
    flops = flops_per_token * config.tokens_per_step * config.max_steps
    return flops / peak_flops > MIN_SECONDS_TO_COMPILE


def compile_model(model: MixedPrecisionModel, state: TrainState, sequence_length: int) -> bool:
    """Compiles for the micro-batches of a run. Returns whether it worked; if not, it warns."""
    echo("compiling ...")
    try:
        seconds = model.compile(state.micro_batch_size, sequence_length)
    except CompileError as error:
        warn(f"torch.compile does not work here, training continues without it, slower: {error}")
        return False
    echo(f"compiled in {seconds:.0f} s")
    return True
