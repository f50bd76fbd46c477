"""train: the token files become a model, from where an earlier attempt at the same run was stopped."""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ruamel.yaml import YAML

from gpt2.data import Sampler, open_tokens, read_meta
from gpt2.errors import DivergedError, Interrupted, UserError
from gpt2.files import fingerprint, hold, sha256_of, write_json
from stages import paths, preflight, tracking
from stages.hooks import StageHooks, metrics_of
from stages.params import Params, load_params
from stages.process import Stop, run_stage, say, warn

if TYPE_CHECKING:
    from gpt2.checkpoint import CheckpointStore
    from gpt2.compute import Compute
    from gpt2.model import GPT
    from gpt2.progress import Progress
    from gpt2.trainer import TrainState

WORTH_COMPILING_S = 10.0
"""Of the run's matrix products at this machine's peak."""
DIVERGED_FILE = "diverged.json"
MOST_DIVERGENCES = 2


def main(stop: Stop) -> None:
    """Checks what can be checked before torch, which takes seconds to import, is; then trains."""
    params = load_params(paths.PARAMS)
    micro_batch_size = preflight.micro_batch_that_fits(params)
    meta = read_meta(paths.TOKENS)
    facts = {"model": asdict(params.model), "train": asdict(params.train), "tokens": meta["splits"]}
    folder = paths.checkpoints(params.runtime.checkpoint_folder) / fingerprint(facts, training_sources())
    preflight.check_disk(params, folder)
    with hold(folder / "lock"), at_most_twice_the_same_divergence(folder):
        train(params, meta, folder, micro_batch_size, stop)


def training_sources() -> list[Path]:
    """The library's source files that the numbers of a run depend on: those that dvc.yaml names for this stage."""
    stages = YAML(typ="safe", pure=True).load(Path("dvc.yaml"))["stages"]
    return [Path(dep) for dep in stages["train"]["deps"] if dep.startswith("gpt2/")]


@contextmanager
def at_most_twice_the_same_divergence(folder: Path) -> Iterator[None]:
    """Remembers where a run diverged: after the second time at one step there is no third try, as it would be alike."""
    path = folder / DIVERGED_FILE
    try:
        earlier = json.loads(path.read_text(encoding="utf-8"))
        good_steps, times, told = int(earlier["good_steps"]), int(earlier["times"]), str(earlier["told"])
    except (OSError, ValueError, KeyError, TypeError):
        good_steps, times, told = -1, 0, ""
    if times >= MOST_DIVERGENCES:
        raise DivergedError(
            f"{told}. So it went {times} times, and would again: change a parameter, or delete {folder} to try anyway",
            good_steps,
        )
    try:
        yield
    except DivergedError as error:
        times = times + 1 if error.good_steps == good_steps else 1
        write_json(path, {"good_steps": error.good_steps, "times": times, "told": str(error)})
        raise


def train(params: Params, meta: Mapping[str, Any], folder: Path, micro_batch_size: int, stop: Stop) -> None:
    """Trains to the end and writes the results, or stops with a checkpoint and raises Interrupted."""
    with stop.nothing_to_lose():
        import torch

        from gpt2 import trainer
        from gpt2.checkpoint import CheckpointStore
        from gpt2.compute import Compute
        from gpt2.device import choose_device, choose_precision, device_name, peak_flops, prepare
        from gpt2.evaluation import validation_loss
        from gpt2.model import GPT
        from gpt2.optim import Optimizer

    config, runtime = params.train, params.runtime
    if runtime.threads is not None:
        torch.set_num_threads(runtime.threads)
    device = choose_device(runtime.device)
    prepare(device)
    torch.manual_seed(config.seed)
    sampler = Sampler(open_tokens(paths.TOKENS, "train"), config)
    validation = open_tokens(paths.TOKENS, "val")
    store = CheckpointStore(folder)
    content = store.load_newest(warn)
    stop.check()
    model = (initial_model(params) if content is None else GPT(params.model)).to(device)
    optimizer = Optimizer(model, config)
    if content is None:
        precision = choose_precision(device, runtime.precision)
        state = trainer.TrainState.begin(precision, micro_batch_size)
        names = tracking.new_names()
    else:
        state = trainer.restore(content, model, optimizer)
        precision = getattr(torch, state.precision)
        names = tracking.RunNames(content["run_id"], None)
        warn_of_other_bits(content["environment"], trainer.environment(device))
    if state.micro_batch_size < config.batch_size:
        warn(
            f"memory is short: {state.micro_batch_size} sequences are computed at a time instead of "
            f"{config.batch_size}; a step is the same {config.step_tokens:,} tokens"
        )
    compute = Compute(model, precision, gradient_checkpointing=runtime.gradient_checkpointing)
    stop.check()
    peak = peak_flops(device, precision, paths.real_root() / "checkpoints/peak-flops.json")
    if content is None:
        state.compiled = is_compiled(params, device.type, peak)
    if state.step == config.max_steps:
        say(f"this run is complete in {folder}, its results are taken; delete that folder to train anew")

    def validate(batch_size: int, progress: "Progress") -> float:
        return validation_loss(
            compute, validation, sequence_length=config.sequence_length, batch_size=batch_size, progress=progress
        )

    earlier = [tracking.metrics_event(int(row["step"] or 0), metrics_of(row)) for row in state.history]
    with tracking.open_run(params, "train", names, stop, events=earlier, system_metrics=True) as run:
        computed_by = {"device": device_name(device), "precision": state.precision, "compiled": state.compiled}
        run.tags({**_tags(meta), **{f"runtime.{name}": str(value) for name, value in computed_by.items()}})
        if state.step < config.max_steps:
            begin = f"going on from step {state.step} of {config.max_steps} in {folder}, " if content else ""
            say(
                f"{begin}training {model.config.num_parameters():,} parameters on {device} in {state.precision}, "
                f"{config.step_tokens:,} tokens a step"
            )
            with stop.nothing_to_lose():
                state.compiled = state.compiled and compile_for(compute, sampler, state)
        hooks = StageHooks(params, store, run, model, optimizer, stop, state)
        try:
            complete = trainer.train(
                compute,
                optimizer,
                sampler,
                validate,
                config,
                state,
                hooks,
                log_interval=runtime.log_interval,
                checkpoint_interval=runtime.checkpoint_interval,
                peak_flops=peak,
            )
        except DivergedError as error:
            steps = store.steps()
            good = f"The last good checkpoint is {store.path(steps[-1])}" if steps else "There is no checkpoint yet"
            raise DivergedError(f"{error}. {good}", error.good_steps) from None
        finally:
            hooks.close()
        if not complete:
            assert stop.signal_number is not None
            raise Interrupted(
                f"interrupted; the checkpoint of step {state.step} is in {folder}; "
                "run the same command again to go on from there",
                stop.signal_number,
            )
        stop.check()
        write_results(state, model, config.sequence_length, store, run)


def warn_of_other_bits(then: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """One line if a run goes on where its last bits cannot be the same."""
    changes = [f"{name} {then.get(name)} instead of {now[name]}" for name in now if then.get(name) != now[name]]
    if changes:
        warn(
            f"this run was begun with {', '.join(changes)}; it goes on, but not to the last bit as it would have there"
        )


def is_compiled(params: Params, device_type: str, peak_flops: float) -> bool:
    """Whether the run is to be compiled. Compiling takes up to a minute, and a fifth to a third off each step."""
    if params.runtime.compile != "auto":
        return params.runtime.compile == "always"
    if device_type == "mps":  # where torch.compile is a prototype
        return False
    config = params.train
    flops = params.model.flops_per_token(config.sequence_length) * config.step_tokens * config.max_steps
    return flops / peak_flops > WORTH_COMPILING_S


def compile_for(compute: "Compute", sampler: Sampler, state: "TrainState") -> bool:
    """Compiles for the batches of a run; says so, also if it is not possible, and whether it was."""
    import torch

    from gpt2.compute import CompileError

    say("compiling ...")
    inputs, targets = (
        torch.from_numpy(array)[: state.micro_batch_size].contiguous().to(compute.model.device)
        for array in sampler.batch(state.step, 0)
    )
    try:
        seconds = compute.compile(inputs, targets)
    except CompileError as error:
        warn(f"torch.compile is not possible here, training goes on without it, slower: {error}")
        return False
    say(f"compiled in {seconds:.0f} s")
    return True


def initial_model(params: Params) -> "GPT":
    """The model before the first step: freshly drawn, or Hugging Face's. Raises UserError if its sizes are others."""
    from gpt2.model import GPT

    source = params.train.init_from
    if source == "scratch":
        return GPT(params.model)
    pretrained = GPT.from_pretrained(source)
    ours, theirs = params.model.to_dict(), pretrained.config.to_dict()
    differing = [f"{key}: {theirs[key]}" for key in ours if ours[key] != theirs[key]]
    if differing:
        raise UserError(f"train.init_from {source!r} has other sizes; set in the section model: {', '.join(differing)}")
    return pretrained


def _tags(meta: Mapping[str, Any]) -> dict[str, str]:
    facts = json.loads(paths.CORPUS_FACTS.read_text(encoding="utf-8")) if paths.CORPUS_FACTS.is_file() else {}
    tags = {
        "corpus.sha256": meta["corpus_sha256"],
        "tokens.sha256": meta["splits"]["train"]["sha256"],
        "corpus.name": facts.get("name", "unknown"),
        "corpus.from": facts.get("source", "unknown"),
    }
    if facts.get("fallback_reason"):
        tags["corpus.fallback_reason"] = facts["fallback_reason"]
    return tags


def write_results(
    state: "TrainState", model: "GPT", sequence_length: int, store: "CheckpointStore", run: tracking.Run
) -> None:
    """Writes models/ and reports/train/, and mirrors them."""
    from gpt2.checkpoint import CONFIG_FILE, MODEL_FILE, save_weights
    from stages import reports

    save_weights(model.state_dict(), paths.MODELS / "last.safetensors")
    save_weights(state.best_weights or model.state_dict(), paths.MODELS / MODEL_FILE)
    write_json(paths.MODELS / CONFIG_FILE, model.config.to_dict())
    write_json(paths.RUN, {**asdict(run.names()), "sequence_length": sequence_length})

    folder = paths.TRAIN_REPORT
    history = reports.write_history(state.history, folder)
    last = state.history[-1]
    metrics = {
        "best_val_loss": state.best_val_loss if state.best_step else None,
        "best_step": state.best_step,
        "last_val_loss": last["val_loss"],
        "last_train_loss": last["train_loss"],
        "steps": state.step,
        "tokens": last["tokens"],
        "parameters": model.config.num_parameters(),
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
    write_json(folder / "metrics.json", metrics)
    reports.draw_loss(history, folder / "loss.png")
    reports.draw_schedule(history, folder / "schedule.png")
    run.tags({"model.sha256": sha256_of(paths.MODELS / MODEL_FILE)})
    run.files(sorted(folder.iterdir()), "reports/train")
    run.files([paths.MODELS / CONFIG_FILE], "model")
    store.prune(keep=1)
    say(
        f"{paths.MODELS / MODEL_FILE}: validation loss {state.best_val_loss:.4f} at step {state.best_step}, "
        f"trained in {state.elapsed_s:.0f} s"
    )


if __name__ == "__main__":
    run_stage(main)
