"""The page: a prompt goes in, the model's continuation streams out.

Stands alone with the files beside it: gpt_model.pt, gpt_config.pt, manifest.json and the serving part of gpt2/.
"""

import json
import math
import pickle
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch

from gpt2 import tokenizer
from gpt2.errors import FileError, GPT2Error, UserError
from gpt2.files import sha256_of
from gpt2.generation import BLANK_PROMPT, Sampling, generate
from gpt2.model import GPT

if TYPE_CHECKING:
    import gradio as gr

HERE = Path(__file__).resolve().parent
WEIGHTS, CONFIG, MANIFEST = "gpt_model.pt", "gpt_config.pt", "manifest.json"
MAX_PROMPT_CHARACTERS = 10_000
MAX_NEW_TOKENS = 500
MAX_TOP_K = 500
MAX_TEMPERATURE = 2.0
MAX_WAITING = 32
CSS = """
.gradio-container {max-width: 1080px !important; margin: auto}
#output textarea {font-family: ui-monospace, monospace; line-height: 1.5}
#status {min-height: 1.6em; color: var(--body-text-color-subdued)}
#facts {overflow-wrap: anywhere}
"""


def load_facts(folder: Path) -> dict[str, Any]:
    """What manifest.json says about the model. Raises FileError if a file is missing or is not what was exported."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        facts: dict[str, Any] = manifest["model"]
        for name in (WEIGHTS, CONFIG):
            if sha256_of(folder / name) != manifest["sha256"][name]:
                raise FileError(f"{name} is damaged: it is not the file that was exported. Export or upload it again")
    except FileNotFoundError as error:
        raise FileError(f"{Path(error.filename).name} is missing. Export or upload it again") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise FileError(f"{MANIFEST} cannot be read ({error}). Export or upload it again") from None
    return facts


def load_model(folder: Path) -> GPT:
    """The model of this folder, ready to generate. Raises FileError if its files cannot be loaded or do not fit."""
    try:
        config = torch.load(folder / CONFIG, map_location="cpu", weights_only=True)
        weights = torch.load(folder / WEIGHTS, map_location="cpu", weights_only=True)
        model = GPT(config)
        model.load_state_dict(weights)
    except (OSError, RuntimeError, ValueError, TypeError, EOFError, pickle.UnpicklingError) as error:
        raise FileError(f"the model cannot be loaded: {' '.join(str(error).split())[:300]}") from None
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return model.to(device).eval()


def checked_number(name: str, value: Any, low: float, high: float, *, whole: bool = False) -> float:
    """A number that arrived from outside. Raises UserError if it is none, or out of range."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    if not is_number or not low <= value <= high or (whole and value != int(value)):
        kind = "a whole number" if whole else "a number"
        raise UserError(f"{name} is {str(value)[:40]!r}; expected {kind} from {low:g} to {high:g}")
    return int(value) if whole else float(value)


def stream(
    model: GPT,
    context: int,
    prompt: Any,
    max_new_tokens: Any,
    temperature: Any,
    top_k: Any,
    top_p: Any,
    seed: Any,
) -> Iterator[tuple[str, str]]:
    """The text so far and a status line, after each token. Raises UserError for input that is out of range."""
    if not isinstance(prompt, str) or len(prompt) > MAX_PROMPT_CHARACTERS:
        raise UserError(f"the prompt must be text of at most {MAX_PROMPT_CHARACTERS:,} characters")
    num_tokens = int(checked_number("max new tokens", max_new_tokens, 1, MAX_NEW_TOKENS, whole=True))
    k = int(checked_number("top-k", top_k, 0, MAX_TOP_K, whole=True))
    sampling = Sampling(
        temperature=checked_number("temperature", temperature, 0, MAX_TEMPERATURE),
        top_k=k or None,
        top_p=checked_number("top-p", top_p, 0.01, 1),
    )
    seed = int(checked_number("seed", seed, 0, 2**31 - 1, whole=True))
    text, done = prompt, 0
    ids = tokenizer.encode(prompt.encode(errors="replace").decode() or BLANK_PROMPT)
    started_s = time.perf_counter()
    tokens = generate(model, ids, max_new_tokens=num_tokens, sampling=sampling, seed=seed, context=context)
    for piece in tokenizer.decode_stream(tokens):
        text += piece
        done = min(done + 1, num_tokens)
        rate = done / (time.perf_counter() - started_s)
        yield text, f"{done} of {num_tokens} tokens, {rate:.0f} tokens/s"
    yield text, f"Done: {done} tokens, {done / (time.perf_counter() - started_s):.0f} tokens/s, seed {seed}"


def describe(facts: dict[str, Any]) -> str:
    """What the page says about the model, as Markdown."""
    rows = {
        "parameters": f"{facts['parameters']:,}",
        "layers × heads × width": f"{facts['n_layer']} × {facts['n_head']} × {facts['n_embd']}",
        "corpus": f"{facts['corpus']}, {facts['corpus_characters']:,} characters",
        "training": f"{facts['steps']:,} steps, {facts['tokens']:,} tokens",
        "validation loss": f"{facts['validation_loss']} nats per token",
        "perplexity": facts["perplexity"],
        "bits per byte": facts["bits_per_byte"],
        "MLflow run": f"`{facts['mlflow_run_id']}`",
        "git commit": f"`{str(facts['git_commit'])[:12]}`",
    }
    lines = "\n".join(f"- {name}: {value}" for name, value in rows.items())
    note = f"\n\n**A fallback corpus was used:** {facts['fallback_reason']}" if facts["fallback_reason"] else ""
    return f"### This model\n\n{lines}{note}"


def build(folder: Path = HERE) -> "gr.Blocks":
    """The page for the model in a folder; if it cannot be loaded, a page that says why."""
    import gradio as gr

    try:
        facts = load_facts(folder)
        model = load_model(folder)
    except GPT2Error as error:
        with gr.Blocks(title="GPT-2") as page:
            gr.Markdown(f"# The model could not be loaded\n\n{error}", elem_id="broken")
        return cast("gr.Blocks", page)

    def run(*values: Any) -> Iterator[tuple[str, str]]:
        try:
            yield from stream(model, facts["context"], *values)
        except UserError as error:
            raise gr.Error(str(error), print_exception=False) from None

    with gr.Blocks(title=facts["title"]) as page:
        gr.Markdown(
            f"# {facts['title']}\n"
            "Begin a text and let the model continue it. It learned from one corpus only and knows nothing else."
        )
        with gr.Row():
            with gr.Column(scale=3):
                prompt = gr.Textbox(
                    label="Prompt",
                    value=facts["examples"][0],
                    lines=3,
                    max_length=MAX_PROMPT_CHARACTERS,
                    elem_id="prompt",
                )
                with gr.Row():
                    generate_button = gr.Button("Generate", variant="primary", elem_id="generate")
                    stop_button = gr.Button("Stop", variant="stop", elem_id="stop")
                output = gr.Textbox(label="Text", lines=14, max_lines=30, interactive=False, elem_id="output")
                status = gr.Markdown("Ready.", elem_id="status")
                gr.Examples([[example] for example in facts["examples"]], inputs=[prompt], label="Examples")
            with gr.Column(scale=2):
                max_new_tokens = gr.Slider(1, MAX_NEW_TOKENS, value=150, step=1, label="Max new tokens")
                temperature = gr.Slider(
                    0,
                    MAX_TEMPERATURE,
                    value=0.8,
                    step=0.05,
                    label="Temperature",
                    info="0 takes the likeliest token",
                )
                top_k = gr.Slider(0, MAX_TOP_K, value=50, step=1, label="Top-k", info="Only the k likeliest; 0 is off")
                top_p = gr.Slider(
                    0.01,
                    1,
                    value=1,
                    step=0.01,
                    label="Top-p",
                    info="Only the likeliest up to this share; 1 is off",
                )
                seed = gr.Number(
                    value=1, precision=0, minimum=0, label="Seed", info="The same seed writes the same text"
                )
                gr.Markdown(describe(facts), elem_id="facts")
        inputs = [prompt, max_new_tokens, temperature, top_k, top_p, seed]
        events: list[Any] = [
            generate_button.click(run, inputs, [output, status], api_name="generate", show_progress="hidden"),
            prompt.submit(run, inputs, [output, status], api_visibility="private", show_progress="hidden"),
        ]
        # first the stop, then its word: what is still on its way would overwrite it
        stop_button.click(None, None, None, cancels=events, api_visibility="private").then(
            lambda: "Stopped.", None, status, api_visibility="private", queue=False, show_progress="hidden"
        )
    return cast("gr.Blocks", page)


def main() -> None:
    """Serves the page; on 127.0.0.1 unless GRADIO_SERVER_NAME says otherwise, as a Space does."""
    import gradio as gr

    page = build()
    page.queue(max_size=MAX_WAITING).launch(theme=gr.themes.Soft(), css=CSS)


if __name__ == "__main__":
    main()
