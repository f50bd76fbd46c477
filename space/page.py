"""The layout of the page."""

from html import escape
from typing import Any, cast

import gradio as gr
from gradio.events import api

from space.handlers import READY, Handlers
from space.service import (
    DEFAULTS,
    MAX_NEW_TOKENS,
    MAX_PROMPT_CHARACTERS,
    MAX_SAMPLES,
    MAX_SEED,
    MAX_STOP_CHARACTERS,
    MAX_TEMPERATURE,
    MAX_TOP_K,
)


def error_page(reason: str) -> gr.Blocks:
    """The page that is shown if the model cannot be loaded."""
    with gr.Blocks(title="GPT-2") as page:
        gr.Markdown("# The model could not be loaded")
        gr.Textbox(reason, label="Error", interactive=False, elem_id="broken")
    return cast("gr.Blocks", page)


def build_page(metadata: dict[str, Any], model_table: str, handlers: Handlers, *, concurrency_limit: int) -> gr.Blocks:
    """The page of a model. model_table: HTML about it. concurrency_limit: generations, running and queued."""
    with gr.Blocks(title=metadata["title"]) as page:
        gr.HTML(
            f"<h1>{escape(metadata['title'])}</h1><p>Enter a prompt, and the model continues it. It was trained on one "
            "corpus only: its text imitates that corpus, and its facts are made up.</p>"
        )
        with gr.Row():
            with gr.Column(scale=3):
                prompt = gr.Textbox(
                    label="Prompt",
                    info="Ctrl+Enter generates, Esc stops",
                    lines=3,
                    max_length=MAX_PROMPT_CHARACTERS,
                    elem_id="prompt",
                    autofocus=True,
                )
                with gr.Row():
                    generate_button = gr.Button("Generate", variant="primary", elem_id="generate")
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
                                elem_classes="generated",
                                buttons=["copy"],
                            )
                            for i in range(MAX_SAMPLES)
                        ]
                    with gr.Tab("Token probabilities", elem_id="token-probabilities"):
                        gr.Markdown(
                            "The stronger the colour, the lower the probability of the token. "
                            "Hover over a token to see the likeliest alternatives."
                        )
                        probabilities = gr.HTML(elem_id="probabilities")
                link = gr.HTML(elem_id="link")
                gr.Examples([[example] for example in metadata["examples"]], inputs=[prompt], label="Examples")
            with gr.Column(scale=2):
                with gr.Accordion("Settings"):
                    max_new_tokens = gr.Slider(
                        1,
                        MAX_NEW_TOKENS,
                        DEFAULTS["max_new_tokens"],
                        step=1,
                        label="Max new tokens",
                        info="A token is a word or a part of one",
                    )
                    temperature = gr.Slider(
                        0,
                        MAX_TEMPERATURE,
                        DEFAULTS["temperature"],
                        step=0.05,
                        label="Temperature",
                        info="Higher is more random; 0 is greedy decoding",
                    )
                    samples = gr.Slider(
                        1, MAX_SAMPLES, DEFAULTS["samples"], step=1, label="Samples", info="Generated in one batch"
                    )
                with gr.Accordion("More settings", open=False):
                    top_k = gr.Slider(
                        0,
                        MAX_TOP_K,
                        DEFAULTS["top_k"],
                        step=1,
                        label="Top-k",
                        info="Sample from the k likeliest; 0 is off",
                    )
                    top_p = gr.Slider(
                        0.01,
                        1,
                        DEFAULTS["top_p"],
                        step=0.01,
                        label="Top-p",
                        info="Sample from the likeliest up to this share; 1 is off",
                    )
                    repetition_penalty = gr.Slider(
                        0.5,
                        2,
                        DEFAULTS["repetition_penalty"],
                        step=0.05,
                        label="Repetition penalty",
                        info="Over 1 repeats less; 1 is off",
                    )
                    stop_text = gr.Textbox(
                        label="Stop string",
                        info="Generation ends before this text",
                        max_length=MAX_STOP_CHARACTERS,
                        lines=1,
                    )
                    seed = gr.Number(
                        label="Seed",
                        precision=0,
                        minimum=0,
                        maximum=MAX_SEED,
                        info="The same seed generates the same text; empty draws a new one",
                    )
                gr.HTML(model_table, elem_id="model")
                with gr.Accordion("Use via API", open=False):
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
        queue: dict[str, Any] = {"concurrency_limit": concurrency_limit, "concurrency_id": "queue"}
        outputs = [*boxes, status, probabilities, link]
        triggers = [generate_button.click, prompt.submit]
        gr.on(triggers, handlers.generate_for_page, inputs, outputs, **private, **queue)
        stop_button.click(handlers.cancel, None, None, queue=False, **private)
        samples.change(
            None,
            samples,
            boxes,
            js=f"n => [...Array({MAX_SAMPLES}).keys()].map(i => ({{__type__: 'update', visible: i < n}}))",
        )
        loaded = page.load(handlers.settings_from_url, None, [*inputs, status], queue=False, **private)
        loaded.then(None, status, None, js=GENERATE_IF_LINKED)
        api(handlers.generate_for_api, api_name="generate", **queue)
    return cast("gr.Blocks", page)


GENERATE_IF_LINKED = f"""status => {{
  const isLinked = new URLSearchParams(location.search).has("seed");
  if (isLinked && status === {READY!r}) setTimeout(() => document.querySelector("#generate").click(), 300);
}}"""
EXAMPLE = """from gradio_client import Client

client = Client("user/name")  # or the address of this page
job = client.submit("Once upon a time", max_new_tokens=60, seed=1, api_name="/generate")
for part in job:  # streams the text so far
    print(part["status"])
print(job.result()["texts"][0])"""
