"""export-to-space: the model becomes dist/space, a Gradio Space, and dist/hf, for `transformers`.

Both are loaded the way a user will, and their logits compared with the trained model's, before the stage succeeds.
"""

import importlib.metadata
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from gpt2.config import DTYPES
from gpt2.data.token_files import Tokens, open_tokens
from gpt2.errors import FileError
from gpt2.files import sha256_of, write_json, write_text
from stages import paths, tracking
from stages.params import Params, load_params
from stages.process import StopSignal, echo, run_stage

if TYPE_CHECKING:
    from gpt2.model.transformer import GPT

SERVING_FILES = (
    *(f"gpt2/{name}.py" for name in ("__init__", "config", "device", "errors", "files", "tokenizer")),
    *(f"gpt2/model/{name}.py" for name in ("__init__", "transformer")),
    *(
        f"gpt2/inference/{name}.py"
        for name in ("__init__", "detokenizer", "engine", "kv_cache", "quantization", "request", "sampling")
    ),
    *(f"space/{name}.py" for name in ("guard", "handlers", "model_files", "page", "server", "service", "view")),
)
"""The part of the repository that a Space needs: its page, and what that imports."""
MEASURED_TOKENS = 65_536
MEASURED_BATCH = 8
HARDWARE = {"cpu": "cpu-basic", "zerogpu": "zero-a10g"}
LOGITS_TOLERANCE = 1e-4
CHECK_TOKENS = 64


def main(stop: StopSignal) -> None:
    """Checks the params, then exports."""
    params = load_params(paths.PARAMS)
    names = tracking.read_run_ids()
    with tracking.start_run(params, "export-to-space", names, stop) as run:
        export(params, names.mlflow_run_id, stop)
        run.files([paths.SPACE / name for name in ("README.md", "gpt_config.pt", "manifest.json")], "space")
        run.files([paths.HUGGING_FACE / "config.json"], "hf")


def export(params: Params, run_id: str | None, stop: StopSignal) -> None:
    """Writes and verifies both folders. Raises FileError if either does not give the trained model's logits."""
    with stop.exit_immediately():
        from gpt2.hub.export import save_pretrained, save_space_model
        from gpt2.model.storage import load_folder, trained_context_length

    val_tokens = open_tokens(paths.TOKENS, "val")[:MEASURED_TOKENS]
    model = load_folder(paths.MODELS)
    context = trained_context_length(paths.MODELS) or model.config.block_size
    losses = measured_losses(model, val_tokens, context, stop)
    facts = model_facts(params, model, context, run_id) | {"dtype_losses": losses, "measured_tokens": len(val_tokens)}
    for folder in (paths.SPACE, paths.HUGGING_FACE):
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)

    save_space_model(model, paths.SPACE)
    shutil.copyfile(paths.SPACE_SOURCE / "app.py", paths.SPACE / "app.py")
    for file in SERVING_FILES:
        (paths.SPACE / file).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, paths.SPACE / file)
    shutil.copyfile(paths.TRAIN_REPORT / "loss.png", paths.SPACE / "loss.png")
    requirements = (paths.SPACE_SOURCE / "requirements.txt").read_text(encoding="utf-8")
    write_text(paths.SPACE / "requirements.txt", requirements_for(params.export.target, requirements))
    card = (paths.SPACE_SOURCE / "README.md").read_text(encoding="utf-8")
    write_text(paths.SPACE / "README.md", fill_card(card, facts))
    write_json(paths.SPACE / "manifest.json", {"model": facts, "sha256": sums(paths.SPACE)})
    save_pretrained(model, paths.HUGGING_FACE)
    card = (paths.SPACE_SOURCE / "MODEL_CARD.md").read_text(encoding="utf-8")
    write_text(paths.HUGGING_FACE / "README.md", fill_card(card, facts))

    stop.check()
    space_difference = check_space(model)
    stop.check()
    hf_difference = check_hugging_face(model)
    echo(f"{paths.SPACE}: the same logits to {space_difference:.1g}; serve it with `make space`")
    echo(f"{paths.HUGGING_FACE}: the same logits to {hf_difference:.1g}; load it with transformers")


def measured_losses(model: "GPT", tokens: Tokens, context: int, stop: StopSignal) -> dict[str, float]:
    """The loss of each dtype on the start of the held-out text, in nats per token."""
    from tqdm import tqdm

    from gpt2.evaluation.scores import score
    from gpt2.inference.quantization import quantize

    losses = {}
    total = len(DTYPES) * (len(tokens) - 1)
    with tqdm(total=total, desc="measuring the loss of each dtype", unit="token", disable=None, leave=False) as bar:
        for name in DTYPES:
            scores = score(
                quantize(model, name),
                tokens,
                sequence_length=context,
                batch_size=MEASURED_BATCH,
                progress=stop.wrap(bar.update),
            )
            losses[name] = round(scores.loss, 5)
    return losses


def model_facts(params: Params, model: "GPT", context: int, run_id: str | None) -> dict[str, Any]:
    """What the card and the page say about the model."""
    evaluation = json.loads((paths.EVALUATE_REPORT / "metrics.json").read_text(encoding="utf-8"))
    training = json.loads((paths.TRAIN_REPORT / "metrics.json").read_text(encoding="utf-8"))
    samples = json.loads((paths.EVALUATE_REPORT / "samples.json").read_text(encoding="utf-8"))
    corpus = json.loads(paths.CORPUS_FACTS.read_text(encoding="utf-8"))
    return {
        "title": params.export.title,
        "examples": params.export.examples or [sample["prompt"] for sample in samples],
        "parameters": model.config.num_parameters(),
        **model.config.to_dict(),
        "context": context,
        "corpus": corpus["name"],
        "corpus_source": public_source(corpus["source"]),
        "corpus_characters": corpus["characters"],
        "corpus_licence": corpus["licence"],
        "fallback_reason": corpus["fallback_reason"],
        "steps": training["steps"],
        "tokens": training["tokens"],
        "validation_loss": round(evaluation["loss"], 4),
        "perplexity": round(evaluation["perplexity"], 2),
        "bits_per_byte": round(evaluation["bits_per_byte"], 4),
        "mlflow_run_id": run_id,
        "target": params.export.target,
        "git_commit": tracking.git_tags().get("git.commit"),
    }


def public_source(source: str) -> str:
    """A source as it may be shown to everybody: a path without its folders, an address without user and query."""
    if Path(source).is_absolute():
        return Path(source).name
    address = urlsplit(source)
    return address._replace(netloc=address.netloc.rpartition("@")[2], query="", fragment="").geturl()


def fill_card(template: str, facts: dict[str, Any]) -> str:
    """A README.md: each `{{name}}` becomes that fact."""
    losses = facts["dtype_losses"]
    values = {
        **facts,
        "title": json.dumps(facts["title"]),  # a YAML string
        "heading": facts["title"],
        "gradio": importlib.metadata.version("gradio"),
        "hardware": HARDWARE[facts["target"]],
        "fallback": f"\n\nThe corpus is a fallback: {facts['fallback_reason']}." if facts["fallback_reason"] else "",
        "losses": ", ".join(f"{name} {loss:.4f}" for name, loss in losses.items()),
        "int8_change": f"{100 * (losses['int8'] / losses['fp32'] - 1):+.2f} %",
    }
    for name, value in values.items():
        shown = f"{value:,}" if isinstance(value, int) else str(value)
        template = template.replace("{{" + name + "}}", shown)
    return template


def requirements_for(target: str, requirements: str) -> str:
    """The requirements of a Space, from those for a CPU.

    Each package in the version that is installed here. On ZeroGPU torch is one of those that are offered there, and the
    package `spaces` lends the GPU.
    """
    if target == "zerogpu":
        kept = [line for line in requirements.splitlines() if not line.startswith(("#", "-")) and line != "torch"]
        return pinned("\n".join(kept)) + "spaces\ntorch>=2.8,<2.12\n"
    return pinned(requirements)


def pinned(requirements: str) -> str:
    """Each package in the version that is installed here, other lines as they are."""
    lines = []
    for line in requirements.splitlines():
        is_package = line and not line.startswith(("#", "-"))
        version = importlib.metadata.version(line).partition("+")[0] if is_package else ""
        lines.append(f"{line}=={version}" if is_package else line)
    return "\n".join(lines) + "\n"


def sums(folder: Path) -> dict[str, str]:
    """SHA-256 of each file in a folder, by its path there."""
    return {p.relative_to(folder).as_posix(): sha256_of(p) for p in sorted(folder.rglob("*")) if p.is_file()}


def check_space(model: "GPT") -> float:
    """Loads dist/space as its app does, in a process that has nothing else of ours on its path."""
    import torch

    from gpt2.hub.export import largest_difference

    tokens = torch.arange(min(CHECK_TOKENS, model.config.block_size))[None]
    result = paths.SPACE / ".logits.pt"
    program = (
        "import sys, torch; from pathlib import Path; from space.model_files import load_metadata, load_model;"
        "load_metadata(Path()); model = load_model(Path());"
        f"torch.save(model(torch.arange({tokens.size(1)})[None])[0].detach(), sys.argv[1])"
    )
    try:
        done = subprocess.run(
            [sys.executable, "-c", program, result.name],
            cwd=paths.SPACE,
            capture_output=True,
            text=True,
            env=space_environment(),
        )
        if done.returncode:
            raise FileError(f"{paths.SPACE} cannot be loaded: {(done.stderr.strip() or 'no output').splitlines()[-1]}")
        theirs = torch.load(result, weights_only=True)
    finally:
        result.unlink(missing_ok=True)
    with torch.inference_mode():
        return largest_difference(model(tokens)[0], theirs, str(paths.SPACE), LOGITS_TOLERANCE)


def space_environment() -> dict[str, str]:
    """Our environment without a way to the repository's modules, and without leaving __pycache__ in the folder."""
    kept = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    return {**kept, "PYTHONDONTWRITEBYTECODE": "1"}


def check_hugging_face(model: "GPT") -> float:
    """Loads dist/hf with transformers."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    from gpt2 import tokenizer
    from gpt2.hub.export import largest_difference

    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    theirs = AutoModelForCausalLM.from_pretrained(str(paths.HUGGING_FACE))
    text = "To be, or not to be: that is the question.\n\n  naïve 漢字 🙂"
    if AutoTokenizer.from_pretrained(str(paths.HUGGING_FACE))(text)["input_ids"] != tokenizer.encode(text):
        raise FileError(f"{paths.HUGGING_FACE} has another tokenizer than the model was trained with")
    tokens = torch.arange(min(CHECK_TOKENS, model.config.block_size))[None]
    with torch.inference_mode():
        return largest_difference(model(tokens)[0], theirs(tokens).logits, str(paths.HUGGING_FACE), LOGITS_TOLERANCE)


if __name__ == "__main__":
    run_stage(main)
