"""The page: a prompt goes in, the model's continuations stream out.

Stands alone with the files beside it: gpt_model.pt, gpt_config.pt, manifest.json and the serving part of gpt2/.
"""

import time
from collections.abc import Callable, Iterator
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from gpt2.device import configure_device
from gpt2.errors import GPT2Error, UserError
from gpt2.inference.engine import Engine
from gpt2.inference.quantization import fastest_dtype, quantize
from gpt2.model.transformer import GPT
from space import view
from space.guard import Guard
from space.model_files import load_facts, load_model
from space.service import (
    DEFAULTS,
    MAX_NEW_TOKENS,
    MAX_PROMPT_CHARACTERS,
    MAX_SAMPLES,
    MAX_SEED,
    MAX_STOP_CHARACTERS,
    MAX_TEMPERATURE,
    MAX_TOP_K,
    QUIET_S,
    Generate,
    RequestRegistry,
    on_zero_gpu,
    requests_for,
    validate_settings,
)

if TYPE_CHECKING:
    import gradio as gr

HERE = Path(__file__).resolve().parent.parent
SLOTS = 8
MAX_WAITING = 32
MAX_SESSIONS = 128  # Gradio keeps 90 kB for each, and the page nothing that a visitor would miss
MAX_WAITING_AT_THE_DOOR = 16  # for a place in the line
INT8_TOLERANCE = 0.005
READY = "Ready."


def writing_format(model: GPT, facts: dict[str, Any]) -> str:
    """The fastest format here; int8 only if its loss was measured to be as good."""
    losses = facts["dtype_losses"]
    among = [name for name in ("fp32", "bf16") if name == "fp32" or name in losses]
    if {"fp32", "int8"} <= losses.keys() and losses["int8"] <= (1 + INT8_TOLERANCE) * losses["fp32"]:
        among.append("int8")
    return fastest_dtype(model, tuple(among))


def build(folder: Path = HERE) -> "tuple[gr.Blocks, Engine | None]":
    """The page for the model in a folder, and the engine behind it, which wants to be served.

    If the model cannot be loaded, a page that says why. There is no engine then, nor on ZeroGPU.
    """
    import gradio as gr

    engine = None
    try:
        facts, model = load_facts(folder), load_model(folder)
        stop: Callable[[str | None], None] = lambda session: None  # noqa: E731
        if facts["target"] == "zerogpu":
            precision, answer = "bf16", on_zero_gpu(model, facts["context"])
        else:
            configure_device(model.device)
            precision = writing_format(model, facts)
            engine = Engine(
                quantize(model, precision),
                context_length=facts["context"],
                slots=SLOTS,
                max_queue_size=MAX_WAITING,
                serving_thread=True,
            )
            desk = RequestRegistry(engine)
            answer, stop = desk.answer, desk.stop
    except GPT2Error as error:
        with gr.Blocks(title="GPT-2") as page:
            gr.Markdown("# The model could not be loaded")
            gr.Textbox(str(error), label="Why", interactive=False, elem_id="broken")
        return page, None
    return _page(facts, view.model_table(facts, precision, folder), answer, stop), engine


def _page(facts: dict[str, Any], description: str, answer: Generate, stop: Callable[[str | None], None]) -> "gr.Blocks":
    import gradio as gr
    from gradio.events import api

    def told(error: GPT2Error) -> "gr.Error":
        return gr.Error(str(error), print_exception=False)

    def write(request: gr.Request, *values: Any) -> Iterator[tuple[Any, ...]]:
        """For the page: the texts, a line that says how far it is, what colours the tokens, and a link."""
        try:
            settings = validate_settings(dict(zip(DEFAULTS, values, strict=True)))
            kept = gr.skip()
            for progress in answer(requests_for(settings), request.session_hash):
                texts = [settings["prompt"] + "".join(token.text for token in tokens) for tokens in progress.samples]
                boxes = [texts[i] if i < len(texts) else "" for i in range(MAX_SAMPLES)]
                if None in progress.reasons:
                    yield (*boxes, progress.told(), kept, kept)
                else:
                    status = f"{progress.told()}, seed {settings['seed']}"
                    yield (*boxes, status, view.probabilities_html(progress.samples), view.link(settings))
        except GPT2Error as error:
            raise told(error) from None

    def generate(
        prompt: str,
        max_new_tokens: float = DEFAULTS["max_new_tokens"],
        temperature: float = DEFAULTS["temperature"],
        top_k: float = DEFAULTS["top_k"],
        top_p: float = DEFAULTS["top_p"],
        repetition_penalty: float = DEFAULTS["repetition_penalty"],
        samples: float = DEFAULTS["samples"],
        stop: str = DEFAULTS["stop"],
        seed: float | None = DEFAULTS["seed"],
    ) -> Iterator[dict[str, Any]]:
        """Continues a text; what is there comes every half second, the log-probabilities of its tokens at the end.

        prompt: at most 10,000 characters. max_new_tokens: 1 to 500. temperature: 0 (the likeliest token) to 2.
        top_k: only the k likeliest, up to 500; 0 is off. top_p: only the likeliest up to this share; 1 is off.
        repetition_penalty: 0.5 to 2; 1 is off. samples: 1 to 4. stop: ends before this text. seed: None draws one.
        """
        values = (prompt, max_new_tokens, temperature, top_k, top_p, repetition_penalty, samples, stop, seed)
        try:
            settings = validate_settings(dict(zip(DEFAULTS, values, strict=True)))
            next_s, has_text = 0.0, False
            for progress in answer(requests_for(settings), None):
                is_first, has_text = progress.num_tokens > 0 and not has_text, progress.num_tokens > 0
                if None in progress.reasons and not is_first and time.monotonic() < next_s:
                    continue  # Gradio keeps what was yielded until somebody reads it
                next_s = time.monotonic() + QUIET_S
                logprobs = [[round(token.logprob, 4) for token in tokens] for tokens in progress.samples]
                yield {
                    "texts": ["".join(token.text for token in tokens) for tokens in progress.samples],
                    "logprobs": None if None in progress.reasons else logprobs,
                    "finish_reasons": progress.reasons,
                    "seed": settings["seed"],
                    "status": progress.told(),
                }
        except GPT2Error as error:
            raise told(error) from None

    def end(request: gr.Request) -> None:
        """What is being written for this visitor ends, with all that is there."""
        stop(request.session_hash)

    def fill(request: gr.Request) -> list[Any]:
        """The settings in the page's address, or those to begin with, and a line about it."""
        given = dict(request.query_params)
        values, told = {**DEFAULTS, "prompt": facts["examples"][0]}, READY
        if given.keys() & DEFAULTS.keys():
            try:
                numbers = {name: float(given[name]) for name in given.keys() & DEFAULTS.keys() - {"prompt", "stop"}}
                texts = {name: given[name] for name in given.keys() & {"prompt", "stop"}}
                values = validate_settings({**DEFAULTS, **numbers, **texts})
            except (UserError, ValueError, OverflowError) as error:
                told = f"The link cannot be read ({error}); these are the settings to begin with."
        return [*values.values(), told]

    with gr.Blocks(title=facts["title"]) as page:
        gr.HTML(
            f"<h1>{escape(facts['title'])}</h1><p>Begin a text and let the model continue it. It learned from one "
            "corpus only and knows nothing else; what it writes sounds like its corpus, and is made up.</p>"
        )
        with gr.Row():
            with gr.Column(scale=3):
                prompt = gr.Textbox(
                    label="Beginning",
                    info="Ctrl+Enter writes, Esc stops",
                    lines=3,
                    max_length=MAX_PROMPT_CHARACTERS,
                    elem_id="prompt",
                    autofocus=True,
                )
                with gr.Row():
                    generate_button = gr.Button("Write", variant="primary", elem_id="generate")
                    stop_button = gr.Button("Stop", variant="stop", elem_id="stop")
                status = gr.Markdown(READY, elem_id="status")
                with gr.Tabs():
                    with gr.Tab("Text"):
                        boxes = [
                            gr.Textbox(
                                label=f"Text {i + 1}" if i else "Text",
                                lines=10,
                                max_lines=30,
                                visible=not i,
                                interactive=False,
                                elem_id=f"text-{i + 1}",
                                elem_classes="written",
                                buttons=["copy"],
                            )
                            for i in range(MAX_SAMPLES)
                        ]
                    with gr.Tab("How sure it was", elem_id="sure"):
                        gr.Markdown(
                            "The stronger the colour, the less likely the model found that word or part of a word. "
                            "Point at one to see what else could have come."
                        )
                        colours = gr.HTML(elem_id="colours")
                link = gr.HTML(elem_id="link")
                gr.Examples([[example] for example in facts["examples"]], inputs=[prompt], label="Beginnings to try")
            with gr.Column(scale=2):
                with gr.Accordion("Settings"):
                    max_new_tokens = gr.Slider(
                        1, MAX_NEW_TOKENS, step=1, label="Length", info="In tokens: words, or parts of words"
                    )
                    temperature = gr.Slider(
                        0,
                        MAX_TEMPERATURE,
                        step=0.05,
                        label="Temperature",
                        info="Low is careful, high is bold; 0 always takes the likeliest",
                    )
                    samples = gr.Slider(1, MAX_SAMPLES, step=1, label="Samples", info="Several texts at once")
                with gr.Accordion("More settings", open=False):
                    top_k = gr.Slider(0, MAX_TOP_K, step=1, label="Top-k", info="Only the k likeliest; 0 is off")
                    top_p = gr.Slider(
                        0.01, 1, step=0.01, label="Top-p", info="Only the likeliest up to this share; 1 is off"
                    )
                    repetition_penalty = gr.Slider(
                        0.5, 2, step=0.05, label="Repetition penalty", info="Over 1 repeats less; 1 is off"
                    )
                    stop_text = gr.Textbox(
                        label="Stop at", info="Ends before this text", max_length=MAX_STOP_CHARACTERS, lines=1
                    )
                    seed = gr.Number(
                        label="Seed",
                        precision=0,
                        minimum=0,
                        maximum=MAX_SEED,
                        info="The same seed writes the same text; empty draws a new one",
                    )
                gr.HTML(description, elem_id="facts")
                with gr.Accordion("Use it from a program", open=False):
                    gr.Code(EXAMPLE, language="python", interactive=False, label="pip install gradio_client")
        inputs: list[Any] = [
            prompt,
            max_new_tokens,
            temperature,
            top_k,
            top_p,
            repetition_penalty,
            samples,
            stop_text,
            seed,
        ]
        private: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden"}
        line: dict[str, Any] = {"concurrency_limit": SLOTS + MAX_WAITING, "concurrency_id": "line"}
        gr.on([generate_button.click, prompt.submit], write, inputs, [*boxes, status, colours, link], **private, **line)
        stop_button.click(end, None, None, queue=False, **private)
        samples.change(
            None,
            samples,
            boxes,
            js=f"n => [...Array({MAX_SAMPLES}).keys()].map(i => ({{__type__: 'update', visible: i < n}}))",
        )
        page.load(fill, None, [*inputs, status], queue=False, **private).then(None, status, None, js=BEGIN_IF_LINKED)
        api(generate, api_name="generate", **line)
    return cast("gr.Blocks", page)


BEGIN_IF_LINKED = f"""status => {{
  const isLinked = new URLSearchParams(location.search).has("seed");
  if (isLinked && status === {READY!r}) setTimeout(() => document.querySelector("#generate").click(), 300);
}}"""
EXAMPLE = """from gradio_client import Client

client = Client("user/name")  # or the address of this page
job = client.submit("Once upon a time", max_new_tokens=60, seed=1, api_name="/generate")
for part in job:  # as it is written
    print(part["status"])
print(job.result()["texts"][0])"""


def main(folder: Path = HERE) -> None:
    """Serves the page for a folder; on 127.0.0.1 unless GRADIO_SERVER_NAME says otherwise, as a Space does."""
    import gradio as gr
    from gradio.utils import LRUCache

    page, engine = build(folder)
    num_inputs: dict[int | str | None, int] = {number: len(function.inputs) for number, function in page.fns.items()}
    num_inputs |= {str(function.api_name): len(function.inputs) for function in page.fns.values()}
    page.queue(max_size=MAX_WAITING_AT_THE_DOOR)
    # what nobody reads is kept for this many visitors, rather than for 2000
    page._queue.pending_messages_per_session = LRUCache(MAX_SESSIONS)
    page.launch(
        theme=gr.themes.Soft(),
        css=view.CSS,
        head=view.KEYS,
        max_threads=SLOTS + MAX_WAITING + MAX_WAITING_AT_THE_DOOR,
        app_kwargs={"middleware": [(Guard, (num_inputs,), {})]},
        ssr_mode=False,
        mcp_server=False,
        enable_monitoring=False,
        state_session_capacity=MAX_SESSIONS,
        footer_links=["api"],
        prevent_thread_lock=True,
    )
    try:
        if engine is None:
            page.block_thread()
        else:  # here, in the thread that loaded the model: see Engine
            engine.warm_up()
            engine.serve()
    except KeyboardInterrupt:
        page.close()
