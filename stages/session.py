"""A session of a training run: from its params, data and checkpoints to the files of the train stage."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch

from gpt2.data.sampler import Sampler
from gpt2.data.token_files import Tokens, open_tokens
from gpt2.device import choose_device, choose_precision, configure_device, device_name, peak_flops
from gpt2.errors import DivergedError, Interrupted, UserError
from gpt2.files import sha256_of, write_json
from gpt2.model.hugging_face import from_pretrained
from gpt2.model.storage import CONFIG_FILE, MODEL_FILE, save_weights
from gpt2.model.transformer import GPT
from gpt2.progress import ProgressCallback
from gpt2.training.checkpoints import CheckpointStore
from gpt2.training.mixed_precision import CompileError, MixedPrecisionModel
from gpt2.training.optimizers import Optimizer
from gpt2.training.state import TrainState, environment, restore_checkpoint
from gpt2.training.trainer import Trainer
from gpt2.training.validation import validation_loss
from stages import paths, reports, tracking
from stages.callbacks import StageCallbacks, metrics_of
from stages.params import Params
from stages.preflight import Plan
from stages.process import StopSignal, echo, warn

MIN_SECONDS_TO_COMPILE = 10.0
"""Compiling pays off for runs whose matrix products take longer than this at the machine's peak."""


@dataclass
class TrainingRun:
    """Everything a session trains with. ids: of the run in the trackers. resumed: from a checkpoint."""

    plan: Plan
    model: MixedPrecisionModel
    optimizer: Optimizer
    sampler: Sampler
    val_tokens: Tokens
    state: TrainState
    store: CheckpointStore
    peak_flops: float
    ids: tracking.RunIds
    resumed: bool

    def logged_events(self) -> list[dict[str, Any]]:
        """The metrics that earlier sessions logged, for the tracker."""
        return [tracking.metrics_event(int(row["step"] or 0), metrics_of(row)) for row in self.state.history]


def set_up(plan: Plan, stop: StopSignal) -> TrainingRun:
    """Data, model, optimizer and state: of a new run, or of the newest checkpoint."""
    config, runtime = plan.params.train, plan.params.runtime
    device = choose_device(runtime.device)
    configure_device(device, runtime.threads)
    torch.manual_seed(config.seed)
    sampler = Sampler(open_tokens(paths.TOKENS, "train"), config)
    val_tokens = open_tokens(paths.TOKENS, "val")
    store = CheckpointStore(plan.folder)
    checkpoint = store.load_newest(warn)
    stop.check()
    master = (initial_model(plan.params) if checkpoint is None else GPT(plan.params.model)).to(device)
    optimizer = Optimizer(master, config)
    if checkpoint is None:
        state = TrainState.initial(choose_precision(device, runtime.precision), plan.micro_batch_size)
        ids = tracking.new_run_ids()
    else:
        state = restore_checkpoint(checkpoint, master, optimizer)
        ids = tracking.RunIds(checkpoint["run_id"], None)
        warn_if_not_bitwise_reproducible(checkpoint["environment"], environment(device))
    if state.micro_batch_size < config.batch_size:
        warn(
            f"memory is short: the micro-batch is {state.micro_batch_size} instead of {config.batch_size}; the global "
            f"batch stays {config.tokens_per_step:,} tokens"
        )
    model = MixedPrecisionModel(master, state.dtype, gradient_checkpointing=runtime.gradient_checkpointing)
    stop.check()
    peak = peak_flops(device, state.dtype, paths.real_root() / "checkpoints/peak-flops.json")
    if checkpoint is None:
        state.compiled = is_compiled(plan.params, device.type, peak)
    resumed = checkpoint is not None
    return TrainingRun(plan, model, optimizer, sampler, val_tokens, state, store, peak, ids, resumed)


def train(run: TrainingRun, tracker: tracking.Run, stop: StopSignal) -> None:
    """Trains to the last step. Raises Interrupted, after saving a checkpoint, if a signal arrives."""
    params, state, store = run.plan.params, run.state, run.store
    config, folder = params.train, run.plan.folder
    tracker.tags(run_tags(run))
    if state.step == config.max_steps:
        echo(f"this run is complete in {folder}, using its results; delete that folder to train again")
    else:
        begin = f"resuming from step {state.step} of {config.max_steps} in {folder}, " if run.resumed else ""
        echo(
            f"{begin}training {run.model.config.num_parameters():,} parameters on {run.model.device} in "
            f"{state.precision}, global batch {config.tokens_per_step:,} tokens"
        )
        with stop.exit_immediately():
            state.compiled = state.compiled and compile_model(run.model, state, config.sequence_length)

    def validate(batch_size: int, progress: ProgressCallback) -> float:
        return validation_loss(
            run.model, run.val_tokens, sequence_length=config.sequence_length, batch_size=batch_size, progress=progress
        )

    callbacks = StageCallbacks(store, tracker, stop, state, config.max_steps)
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
    )
    try:
        is_complete = trainer.train()
    except DivergedError as error:
        steps = store.steps()
        last_good = f"The last good checkpoint is {store.path(steps[-1])}" if steps else "There is no checkpoint yet"
        raise DivergedError(f"{error}. {last_good}", error.good_steps) from None
    finally:
        callbacks.close()
    if not is_complete:
        assert stop.signal_number is not None
        raise Interrupted(
            f"interrupted; the checkpoint of step {state.step} is in {folder}; run the same command again to resume",
            stop.signal_number,
        )
    stop.check()


def write_results(run: TrainingRun, tracker: tracking.Run) -> None:
    """Writes models/ and reports/train/, and logs them."""
    state, master = run.state, run.model.master
    save_weights(master.state_dict(), paths.MODELS / "last.safetensors")
    save_weights(state.best_weights or master.state_dict(), paths.MODELS / MODEL_FILE)
    write_json(paths.MODELS / CONFIG_FILE, master.config.to_dict())
    write_json(paths.RUN, {**asdict(tracker.ids()), "sequence_length": run.plan.params.train.sequence_length})

    folder = paths.TRAIN_REPORT
    history = reports.write_history(state.history, folder)
    write_json(folder / "metrics.json", final_metrics(run))
    reports.draw_loss(history, folder / "loss.png")
    reports.draw_schedule(history, folder / "schedule.png")
    tracker.tags({"model.sha256": sha256_of(paths.MODELS / MODEL_FILE)})
    tracker.files(sorted(folder.iterdir()), "reports/train")
    tracker.files([paths.MODELS / CONFIG_FILE], "model")
    run.store.prune(keep=1)
    echo(
        f"{paths.MODELS / MODEL_FILE}: validation loss {state.best_val_loss:.4f} at step {state.best_step}, "
        f"trained in {state.elapsed_s:.0f} s"
    )


def final_metrics(run: TrainingRun) -> dict[str, Any]:
    """The content of reports/train/metrics.json."""
    state = run.state
    last = state.history[-1]
    return {
        "best_val_loss": state.best_val_loss if state.best_step else None,
        "best_step": state.best_step,
        "last_val_loss": last["val_loss"],
        "last_train_loss": last["train_loss"],
        "steps": state.step,
        "tokens": last["tokens"],
        "parameters": run.model.config.num_parameters(),
        "tokens_per_s": round(float(last["tokens"] or 0) / state.elapsed_s),
        "elapsed_s": round(state.elapsed_s, 1),
        "mfu": last["mfu"],
        "peak_memory_bytes": last["peak_memory_bytes"],
        "data_share": round(state.data_s / state.elapsed_s, 5),
        "log_share": round(state.log_s / state.elapsed_s, 5),
        "save_share": round(state.save_s / state.elapsed_s, 5),
        "precision": state.precision,
        "compiled": state.compiled,
    }


def run_tags(run: TrainingRun) -> dict[str, str]:
    """Tags for MLflow: where the text comes from, checksums, and what computes."""
    meta = run.plan.tokens_meta
    corpus = json.loads(paths.CORPUS_FACTS.read_text(encoding="utf-8")) if paths.CORPUS_FACTS.is_file() else {}
    tags = {
        "corpus.sha256": meta["corpus_sha256"],
        "tokens.sha256": meta["splits"]["train"]["sha256"],
        "corpus.name": corpus.get("name", "unknown"),
        "corpus.from": corpus.get("source", "unknown"),
        "runtime.device": device_name(run.model.device),
        "runtime.precision": run.state.precision,
        "runtime.compiled": str(run.state.compiled),
    }
    if corpus.get("fallback_reason"):
        tags["corpus.fallback_reason"] = corpus["fallback_reason"]
    return tags


def initial_model(params: Params) -> GPT:
    """The model before the first step: freshly initialised, or Hugging Face's. Raises UserError if its sizes differ."""
    source = params.train.init_from
    if source == "scratch":
        return GPT(params.model)
    pretrained = from_pretrained(source)
    ours, theirs = params.model.to_dict(), pretrained.config.to_dict()
    differing = [f"{key}: {theirs[key]}" for key in ours if ours[key] != theirs[key]]
    if differing:
        raise UserError(f"train.init_from {source!r} has other sizes; set in the section model: {', '.join(differing)}")
    return pretrained


def warn_if_not_bitwise_reproducible(then: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Warns if a run is resumed in an environment that gives different bits."""
    changes = [f"{name} {then.get(name)} instead of {now[name]}" for name in now if then.get(name) != now[name]]
    if changes:
        warn(
            f"this run started with {', '.join(changes)}; it resumes, but its results will not be bitwise equal to an "
            "uninterrupted run"
        )


def is_compiled(params: Params, device_type: str, peak_flops: float) -> bool:
    """Whether to compile: it takes up to a minute, and makes each step a fifth to a third faster."""
    if params.runtime.compile != "auto":
        return params.runtime.compile == "always"
    if device_type == "mps":  # where torch.compile is a prototype
        return False
    config = params.train
    flops = params.model.flops_per_token(config.sequence_length) * config.tokens_per_step * config.max_steps
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
