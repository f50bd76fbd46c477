"""What a complete training run leaves behind: models/ and reports/train/."""

import json
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from gpt2.data.token_files import split_sha256
from gpt2.device import device_name
from gpt2.files import sha256_of, write_json
from gpt2.model.storage import CONFIG_FILE, MODEL_FILE, save_weights
from gpt2.training.state import Weights
from gpt2.world import World, full_tensor
from stages import overfitting, paths, reports, tracking
from stages.environment import ENVIRONMENT_FILE, continued, machine, read_sessions
from stages.process import echo, warn
from stages.session import TrainingRun

LAST_FILE = "last.safetensors"
FINAL_METRICS = {"train/sample_loss": "train_sample_loss", "val/generalization_gap": "generalization_gap"}
"""Metric names in MLflow, and their keys in reports/train/metrics.json."""


def write_results(run: TrainingRun, tracker: tracking.Run) -> None:
    """Rank 0 writes models/ and reports/train/, and logs them."""
    state, master, vocabulary = run.state, run.model.master, run.model.vocabulary
    last = whole_weights(dict(master.named_parameters()), run.world)
    best = whole_weights(state.best_weights, run.world) if state.best_weights else last
    if run.world.rank:
        return
    if vocabulary is not None:
        last, best = vocabulary.whole(last), vocabulary.whole(best)
    for weights, name in ((last, LAST_FILE), (best, MODEL_FILE)):
        save_weights(weights, paths.MODELS / name)
    write_json(paths.MODELS / CONFIG_FILE, run.plan.params.model.to_dict())
    config = run.plan.params.train
    facts = {"sequence_length": config.sequence_length, "mask_documents": config.mask_documents}
    write_json(paths.RUN, {**asdict(tracker.ids()), **facts})

    folder = paths.TRAIN_REPORT
    history = reports.write_history(state.history, folder)
    metrics = final_metrics(run)
    warning = overfitting.warning(metrics) if metrics["overfits"] else None
    write_json(folder / "metrics.json", metrics)
    write_json(folder / ENVIRONMENT_FILE, final_environments(run, tracker.ids()))
    reports.draw_loss(history, folder / "loss.png", metrics, epoch_steps=epoch_steps(run), warning=warning)
    reports.draw_schedule(history, folder / "schedule.png")
    tracker.metrics(state.step, {name: metrics[key] for name, key in FINAL_METRICS.items()})
    tracker.tags(
        {
            "model.sha256": sha256_of(paths.MODELS / MODEL_FILE),
            "stopped_early": str(metrics["stopped_early"]),
            "overfits": str(metrics["overfits"]),
        }
    )
    tracker.files(sorted(folder.iterdir()), "reports/train")
    tracker.files([paths.MODELS / CONFIG_FILE], "model")
    run.store.prune(keep=1)
    if warning is not None:
        warn(warning)
    echo(
        f"{paths.MODELS / MODEL_FILE}: validation loss {state.best_val_loss:.4f} at step {state.best_step}, "
        f"trained in {state.elapsed_s:.0f} s"
    )


def whole_weights(weights: Mapping[str, Tensor], world: World) -> Weights:
    """Weights that several processes may share, on the CPU; empty in all processes but rank 0."""
    whole = {}
    for name, weight in weights.items():
        full = full_tensor(weight.detach())
        if world.rank == 0:
            whole[name] = full.cpu()
    return whole


def final_metrics(run: TrainingRun) -> dict[str, Any]:
    """The content of reports/train/metrics.json.

    train_sample_loss: on a sample of the training text. generalization_gap: how far the validation loss is over it.
    Both are of the weights after the last step, without dropout. epochs: tokens seen by tokens of the text.
    """
    state = run.state
    last = state.history[-1]
    sample, val_loss = state.train_sample_loss, last["val_loss"]
    metrics = {
        "best_val_loss": state.best_val_loss if state.best_step else None,
        "best_step": state.best_step,
        "last_val_loss": last["val_loss"],
        "last_train_loss": last["train_loss"],
        "train_sample_loss": sample,
        "generalization_gap": val_loss - sample if val_loss is not None and sample is not None else None,
        "steps": state.step,
        "stopped_early": state.step < run.plan.params.train.max_steps,
        "tokens": last["tokens"],
        "epochs": round(state.step / epoch_steps(run), 3),
        "parameters": run.plan.params.model.num_parameters(),
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
    return {**metrics, "overfits": overfitting.overfits(metrics, len(run.val_tokens))}


def epoch_steps(run: TrainingRun) -> float:
    """Steps in which the training text is read once."""
    return len(run.train_tokens) / run.plan.params.train.tokens_per_step


def remember_environment(run: TrainingRun) -> None:
    """Notes beside the checkpoints where this session trains: a later session may only take its results from there."""
    if run.world.rank or run.state.is_complete(run.plan.params.train):
        return
    path = run.plan.folder / ENVIRONMENT_FILE
    write_json(path, continued(_earlier_sessions(run) if run.resumed else [], session_environment(run)))


def session_environment(run: TrainingRun) -> dict[str, Any]:
    """The commit, the versions and the machine of this session, and how it computes."""
    tags, device = tracking.git_tags(), run.model.device
    return {
        "commit": tags.get("git.commit"),
        "dirty": tags["git.dirty"] == "true" if "git.dirty" in tags else None,
        "experiment": tags.get("dvc.experiment"),
        **machine(),
        "device": device.type,
        "device_name": device_name(device),
        "threads": torch.get_num_threads(),
        "processes": run.world.size,
        "strategy": str(run.strategy) if run.world.size > 1 else None,
        "gradient_checkpointing": run.plan.params.runtime.gradient_checkpointing,
        **_how(run),
    }


def _how(run: TrainingRun) -> dict[str, Any]:
    """What the session decides while it starts."""
    state = run.state
    return {"precision": state.precision, "compiled": state.compiled, "micro_batch_size": state.micro_batch_size}


def final_environments(run: TrainingRun, ids: tracking.RunIds) -> list[dict[str, Any]]:
    """The content of reports/train/environment.json: where each session trained; in the last one ids and SHA-256 sums.

    A file cannot name the commit that will contain it: `commit` is what was checked out during the training, and
    `dirty` whether more than params and results differed from it. A token sum is that of `split_sha256`.
    """
    index = run.plan.tokens_index
    sums = {
        "corpus": _corpus_facts().get("sha256"),
        "train_tokens": split_sha256(index, "train"),
        "val_tokens": split_sha256(index, "val"),
        "model": sha256_of(paths.MODELS / MODEL_FILE),
        "last_model": sha256_of(paths.MODELS / LAST_FILE),
    }
    *others, last = _earlier_sessions(run) or [{}]
    return [*others, {**last, **_how(run), **asdict(ids), "sha256": sums}]


def _earlier_sessions(run: TrainingRun) -> list[dict[str, Any]]:
    """What is noted beside the checkpoints; empty if that is missing or damaged."""
    try:
        return read_sessions((run.plan.folder / ENVIRONMENT_FILE).read_bytes())
    except (OSError, ValueError):
        return []


def _corpus_facts() -> dict[str, Any]:
    """The content of data/corpus.json; empty if the corpus is not here, only its tokens."""
    if not paths.CORPUS_FACTS.is_file():
        return {}
    return dict(json.loads(paths.CORPUS_FACTS.read_text(encoding="utf-8")))


def run_tags(run: TrainingRun) -> dict[str, str]:
    """Tags for MLflow: where the text comes from, checksums, and what computes."""
    corpus = _corpus_facts()
    tags = {
        "corpus.sha256": corpus.get("sha256", "unknown"),
        "tokens.sha256": split_sha256(run.plan.tokens_index, "train"),
        "corpus.name": corpus.get("name", "unknown"),
        "corpus.from": corpus.get("source", "unknown"),
        "runtime.device": device_name(run.model.device),
        "runtime.precision": run.state.precision,
        "runtime.compiled": str(run.state.compiled),
    }
    if run.world.size > 1:
        tags |= {"runtime.processes": str(run.world.size), "runtime.strategy": run.strategy}
    if corpus.get("fallback_reason"):
        tags["corpus.fallback_reason"] = corpus["fallback_reason"]
    return tags
