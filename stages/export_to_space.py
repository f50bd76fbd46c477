"""export-to-space: exports the model to dist/space, a Gradio Space, and to dist/hf, for `transformers`.

Before the stage succeeds, it loads both as their users do, and compares their logits with those of the trained model.
"""

import json
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from gpt2.config import DTYPES
from gpt2.data.token_files import Tokens, open_tokens
from stages import paths, tracking
from stages.cores import reserve_cores
from stages.params import Params, load_params
from stages.process import StopSignal, echo, run_stage

if TYPE_CHECKING:
    from gpt2.model.transformer import GPT

SERVING_FILES = (
    *(f"gpt2/{name}.py" for name in ("__init__", "config", "device", "errors", "files", "tokenizer")),
    *(f"gpt2/model/{name}.py" for name in ("__init__", "attention", "transformer")),
    *(
        f"gpt2/inference/{name}.py"
        for name in (
            *("__init__", "batch", "detokenizer", "engine", "kv_cache", "quantization", "request", "sampling"),
            "speculation",
        )
    ),
    *(
        f"gpt2/kernels/{name}.py"
        for name in (
            "__init__",
            "__main__",
            "blocks",
            "calibration",
            "compiled",
            "feedback",
            "int4",
            "library",
            "linear",
            "weights",
        )
    ),
    *(f"gpt2/kernels/{name}" for name in ("amx.h", "decode.cpp", "model.h", "prefill.cpp", "vectors.h")),
    *(f"space/{name}.py" for name in ("guard", "handlers", "model_files", "page", "server", "service", "view")),
)
"""The modules that a Space needs: its page, and all that the page imports."""
MODEL_FILES = (*(file for file in SERVING_FILES if file.startswith("gpt2/")), "space/model_files.py")
"""Those that MLflow's model needs: they load the model and generate."""
MEASURED_TOKENS = 65_536
MEASURED_BATCH = 8


def main(stop: StopSignal) -> None:
    """Check the params, export, log to MLflow."""
    params = load_params(paths.PARAMS)
    ids = tracking.read_run_ids()
    with tracking.start_run(params, "export-to-space", ids, stop) as tracker:
        with reserve_cores(replace(params.runtime, device="cpu"), stop):  # the export computes on the CPU
            facts = export(params, ids.mlflow_run_id, stop)
        tracker.files([paths.SPACE / name for name in ("README.md", "gpt_config.pt", "manifest.json")], "space")
        tracker.files([paths.HUGGING_FACE / "config.json"], "hf")
    tracking.hand_over_model(params, ids, paths.SPACE, MODEL_FILES, facts)


def export(params: Params, run_id: str | None, stop: StopSignal) -> dict[str, Any]:
    """Load the model, collect its facts, write both folders, verify both. Returns the facts."""
    with stop.exit_immediately():  # importing torch takes seconds
        from gpt2.device import configure_device
        from gpt2.model.storage import load_folder
        from stages import export_folders

    model = load_folder(paths.MODELS)
    configure_device(model.device, params.runtime.threads)
    facts = collect_facts(params, model, run_id, stop)
    export_folders.write_space(paths.SPACE, model, facts, SERVING_FILES)
    export_folders.write_hugging_face(paths.HUGGING_FACE, model, facts)
    stop.check()
    space_difference = export_folders.verify_space(paths.SPACE, model)
    stop.check()
    hf_difference = export_folders.verify_hugging_face(paths.HUGGING_FACE, model)
    echo(f"{paths.SPACE}: the same logits to {space_difference:.1g}; serve it with `make space`")
    echo(f"{paths.HUGGING_FACE}: the same logits to {hf_difference:.1g}; load it with transformers")
    return facts


def collect_facts(params: Params, model: "GPT", run_id: str | None, stop: StopSignal) -> dict[str, Any]:
    """What the cards and the page show about the model: sizes, corpus, training, scores, and the loss by dtype."""
    from gpt2.model.storage import trained_context_length

    evaluation = json.loads((paths.EVALUATE_REPORT / "metrics.json").read_text(encoding="utf-8"))
    training = json.loads((paths.TRAIN_REPORT / "metrics.json").read_text(encoding="utf-8"))
    samples = json.loads((paths.EVALUATE_REPORT / "samples.json").read_text(encoding="utf-8"))
    corpus = json.loads(paths.CORPUS_FACTS.read_text(encoding="utf-8"))
    tokens = open_tokens(paths.TOKENS, "val")[:MEASURED_TOKENS]
    context_length = trained_context_length(paths.MODELS) or model.config.block_size
    return {
        "title": params.export.title,
        "examples": params.export.examples or [sample["prompt"] for sample in samples],
        "parameters": model.config.num_parameters(),
        **model.config.to_dict(),
        "context": context_length,
        "corpus": corpus["name"],
        "corpus_source": public_source(corpus["source"]),
        "corpus_characters": corpus["characters"],
        "corpus_licence": corpus["licence"],
        "fallback_reason": corpus["fallback_reason"],
        "steps": training["steps"],
        "tokens": training["tokens"],
        "validation_loss": round(evaluation["loss"], 4),
        "perplexity": round(evaluation["perplexity"], 2),
        **{name: round(evaluation[name], 4) for name in ("bits_per_byte", "bits_per_byte_low", "bits_per_byte_high")},
        "tasks": task_results(evaluation),
        "mlflow_run_id": run_id,
        "target": params.export.target,
        "git_commit": tracking.git_tags().get("git.commit"),
        "dtype_losses": measure_losses(model, tokens, context_length, stop),
        "measured_tokens": len(tokens),
    }


def measure_losses(model: "GPT", tokens: Tokens, context_length: int, stop: StopSignal) -> dict[str, float]:
    """The loss in each dtype, in nats per token."""
    from tqdm import tqdm

    from gpt2.evaluation.scores import score
    from gpt2.inference.quantization import has_dtype, quantize
    from gpt2.model.storage import masked_documents

    losses = {}
    names = [name for name in DTYPES if has_dtype(model, name)]
    total = len(names) * (len(tokens) - 1)
    with tqdm(total=total, desc="measuring the loss of each dtype", unit="token", disable=None, leave=False) as bar:
        for name in names:
            quantized = quantize(model, name)
            quantized.mask_documents = masked_documents(paths.MODELS)
            scores = score(
                quantized,
                tokens,
                sequence_length=context_length,
                batch_size=MEASURED_BATCH,
                progress=stop.wrap(bar.update),
            )
            losses[name] = round(scores.loss, 5)
    return losses


def task_results(metrics: dict[str, float]) -> dict[str, str]:
    """The results that have a standard error, as the cards show them: "hellaswag, acc_norm": "0.294 ± 0.005"."""
    return {
        key.removeprefix("task/").replace("/", ", "): f"{value:.3f} ± {metrics[f'{key}_stderr']:.3f}"
        for key, value in metrics.items()
        if key.startswith("task/") and f"{key}_stderr" in metrics
    }


def public_source(source: str) -> str:
    """A source, or several with commas, without private parts: paths without folders, URLs without user and query."""
    return ", ".join(map(_public_part, source.split(", ")))


def _public_part(source: str) -> str:
    if "://" not in source:
        return Path(source).name
    url = urlsplit(source)
    return url._replace(netloc=url.netloc.rpartition("@")[2], query="", fragment="").geturl()


if __name__ == "__main__":
    run_stage(main)
