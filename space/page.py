"""The page: a prompt goes in, the model's continuations stream out.

Stands alone with the files beside it: gpt_model.pt, gpt_config.pt, manifest.json and the serving part of gpt2/.
"""

import math
import random
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from gpt2 import tokenizer
from gpt2.device import prepare
from gpt2.engine import Engine, Reply
from gpt2.errors import GPT2Error, UserError
from gpt2.formats import choose_format, in_format
from gpt2.generation import BLANK_PROMPT, Request, Sampling, Token
from gpt2.model import GPT
from space import view
from space.guard import Guard
from space.model_files import load_facts, load_model

if TYPE_CHECKING:
    import gradio as gr

HERE = Path(__file__).resolve().parent.parent
MAX_PROMPT_CHARACTERS = 10_000
MAX_NEW_TOKENS = 500
MAX_TOP_K = 500
MAX_TEMPERATURE = 2.0
MAX_SAMPLES = 4
MAX_STOP_CHARACTERS = 100
MAX_SEED = 2**31 - 1
MAX_DRAWN_SEED = 1_000_000  # short enough to be read out
SLOTS = 8
MAX_WAITING = 32
MAX_SESSIONS = 128  # Gradio keeps 90 kB for each, and the page nothing that a visitor would miss
MAX_WAITING_AT_THE_DOOR = 16  # for a place in the line
DEADLINE_S = 120.0
ALTERNATIVES = 5
UPDATE_S = 0.1
QUIET_S = 0.5
INT8_TOLERANCE = 0.005
DEFAULTS: dict[str, Any] = {
    "prompt": "",
    "max_new_tokens": 150,
    "temperature": 0.8,
    "top_k": 50,
    "top_p": 1.0,
    "repetition_penalty": 1.0,
    "samples": 1,
    "stop": "",
    "seed": None,
}
"""What a visitor may say, in the order of the page's inputs and of the API's arguments."""


def checked_number(name: str, value: Any, low: float, high: float, *, whole: bool = False) -> float:
    """A number that arrived from outside. Raises UserError if it is none, or out of range."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or not low <= value <= high or (whole and value != int(value)):  # a NaN is in no range
        kind = "a whole number" if whole else "a number"
        raise UserError(f"{name} is {str(value)[:40]!r}; expected {kind} from {low:g} to {high:g}")
    return int(value) if whole else float(value)


def checked(values: dict[str, Any]) -> dict[str, Any]:
    """The settings that arrived from outside, with a seed. Raises UserError for what is wrong."""
    prompt, stop = values["prompt"], values["stop"]
    if not isinstance(prompt, str) or len(prompt) > MAX_PROMPT_CHARACTERS:
        raise UserError(f"the prompt must be text of at most {MAX_PROMPT_CHARACTERS:,} characters")
    if stop is not None and (not isinstance(stop, str) or len(stop) > MAX_STOP_CHARACTERS):
        raise UserError(f"the text to stop at must be text of at most {MAX_STOP_CHARACTERS} characters")
    seed = values["seed"]
    return {
        "prompt": prompt.encode(errors="replace").decode(),  # half a character becomes a question mark
        "max_new_tokens": checked_number("max new tokens", values["max_new_tokens"], 1, MAX_NEW_TOKENS, whole=True),
        "temperature": checked_number("temperature", values["temperature"], 0, MAX_TEMPERATURE),
        "top_k": checked_number("top-k", values["top_k"], 0, MAX_TOP_K, whole=True),
        "top_p": checked_number("top-p", values["top_p"], 0.01, 1),
        "repetition_penalty": checked_number("repetition penalty", values["repetition_penalty"], 0.5, 2),
        "samples": checked_number("samples", values["samples"], 1, MAX_SAMPLES, whole=True),
        "stop": stop or "",
        "seed": random.randrange(MAX_DRAWN_SEED)  # noqa: S311 - a seed is no secret
        if seed is None
        else checked_number("seed", seed, 0, MAX_SEED, whole=True),
    }


def requests_for(settings: dict[str, Any]) -> list[Request]:
    """A request for each sample; their seeds follow each other."""
    sampling = Sampling(
        temperature=settings["temperature"],
        top_k=settings["top_k"] or None,
        top_p=settings["top_p"],
        repetition_penalty=settings["repetition_penalty"],
    )
    return [
        Request(
            tokenizer.encode(settings["prompt"] or BLANK_PROMPT),
            settings["max_new_tokens"],
            sampling,
            seed=settings["seed"] + number,
            stop=(settings["stop"],) if settings["stop"] else (),
            alternatives=ALTERNATIVES,
            deadline_s=DEADLINE_S,
        )
        for number in range(settings["samples"])
    ]


@dataclass(frozen=True)
class Progress:
    """How far an answer is. place: in line, 0 is next; -1 if it has begun. reasons: why each sample ended."""

    samples: list[list[Token]]
    place: int
    seconds: float
    reasons: list[str | None]

    @property
    def num_tokens(self) -> int:
        """All tokens so far."""
        return sum(map(len, self.samples))

    def told(self) -> str:
        """A line for people."""
        if self.place >= 0 and not self.num_tokens:
            return f"In line: {self.place + 1}. to be answered"
        rate = f"{self.num_tokens} tokens, {self.num_tokens / max(self.seconds, 1e-9):.0f} tokens/s"
        if None in self.reasons:
            return rate
        if "cancelled" in self.reasons:
            return f"Stopped after {rate}"
        late = f"; it took longer than {DEADLINE_S:.0f} s" if "deadline" in self.reasons else ""
        return f"Done: {rate}{late}"


Answer = Callable[[Sequence[Request], str | None], Iterator[Progress]]
"""Answers requests: how far it is, several times a second, and at the end. Given with whose session it is for."""


class Desk:
    """Answers visitors with an engine, and knows what is being written for whom."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self._replies: dict[str, list[Reply]] = {}
        self._lock = threading.Lock()

    def answer(self, requests: Sequence[Request], session: str | None = None) -> Iterator[Progress]:
        """Raises BusyError if the line is full. Whoever stops listening frees the slots."""
        replies: list[Reply] = []
        try:
            for request in requests:
                replies.append(self.engine.submit(request))
            if session is not None:
                self.stop(session)  # a visitor writes one thing at a time
                with self._lock:
                    self._replies[session] = replies
            yield from watched(self.engine, replies)
        finally:
            for reply in replies:
                reply.cancel()
            with self._lock:
                if session is not None and self._replies.get(session) is replies:
                    del self._replies[session]

    def stop(self, session: str | None) -> None:
        """Ends what is being written for a session."""
        with self._lock:
            replies = self._replies.pop(session, []) if session is not None else []
        for reply in replies:
            reply.cancel()


def watched(engine: Engine, replies: Sequence[Reply]) -> Iterator[Progress]:
    """How far replies are, every UPDATE_S while they change and every QUIET_S otherwise, until all have ended."""
    samples: list[list[Token]] = [[] for _ in replies]
    begun_s: float | None = None
    shown, shown_s = (-2, 0), 0.0
    while True:
        ended = all(reply.finish_reason for reply in replies)  # before their last tokens are taken
        for sample, reply in zip(samples, replies, strict=True):
            sample += reply.take(timeout_s=0)
        if begun_s is None and any(samples):
            begun_s = min(reply.begun_s or math.inf for reply in replies)
        place = max(reply.place for reply in replies)
        reasons = [reply.finish_reason if ended else None for reply in replies]
        now_s = time.monotonic()
        progress = Progress(samples, place, now_s - begun_s if begun_s is not None else 0.0, reasons)
        if ended or (place, progress.num_tokens) != shown or now_s > shown_s + QUIET_S:
            shown, shown_s = (place, progress.num_tokens), now_s
            yield progress
        if ended:
            return
        engine.wait(UPDATE_S if any(samples) else UPDATE_S / 4)


def on_zero_gpu(model: GPT, context: int) -> Answer:
    """Answers on Hugging Face's ZeroGPU, where a GPU is lent to a process of its own for each call."""
    import spaces  # only there

    writer = in_format(model.to("cuda"), "bf16")

    @spaces.GPU(duration=60)  # type: ignore[untyped-decorator, unused-ignore]
    def answer(requests: Sequence[Request], session: str | None = None) -> Iterator[Progress]:
        engine = Engine(writer, context=context, slots=len(requests))
        yield from watched(engine, [engine.submit(request) for request in requests])

    return cast(Answer, answer)


def writing_format(model: GPT, facts: dict[str, Any]) -> str:
    """The fastest format here; int8 only if its loss was measured to be as good."""
    losses = facts["formats"]
    among = [name for name in ("fp32", "bf16") if name == "fp32" or name in losses]
    if {"fp32", "int8"} <= losses.keys() and losses["int8"] <= (1 + INT8_TOLERANCE) * losses["fp32"]:
        among.append("int8")
    return choose_format(model, tuple(among))


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
            prepare(model.device)
            precision = writing_format(model, facts)
            engine = Engine(
                in_format(model, precision),
                context=facts["context"],
                slots=SLOTS,
                max_waiting=MAX_WAITING,
                served=True,
            )
            desk = Desk(engine)
            answer, stop = desk.answer, desk.stop
    except GPT2Error as error:
        with gr.Blocks(title="GPT-2") as page:
            gr.Markdown("# The model could not be loaded")
            gr.Textbox(str(error), label="Why", interactive=False, elem_id="broken")
        return page, None
    return _page(facts, view.describe(facts, precision, folder), answer, stop), engine


def _page(facts: dict[str, Any], description: str, answer: Answer, stop: Callable[[str | None], None]) -> "gr.Blocks":
    import gradio as gr
    from gradio.events import api

    def told(error: GPT2Error) -> "gr.Error":
        return gr.Error(str(error), print_exception=False)

    def write(request: gr.Request, *values: Any) -> Iterator[tuple[Any, ...]]:
        """For the page: the texts, a line that says how far it is, what colours the tokens, and a link."""
        try:
            settings = checked(dict(zip(DEFAULTS, values, strict=True)))
            kept = gr.skip()
            for progress in answer(requests_for(settings), request.session_hash):
                texts = [settings["prompt"] + "".join(token.text for token in tokens) for tokens in progress.samples]
                boxes = [texts[i] if i < len(texts) else "" for i in range(MAX_SAMPLES)]
                if None in progress.reasons:
                    yield (*boxes, progress.told(), kept, kept)
                else:
                    status = f"{progress.told()}, seed {settings['seed']}"
                    yield (*boxes, status, view.coloured(progress.samples), view.link(settings))
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
            settings = checked(dict(zip(DEFAULTS, values, strict=True)))
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
        values, told = {**DEFAULTS, "prompt": facts["examples"][0]}, "Ready."
        if given.keys() & DEFAULTS.keys():
            try:
                numbers = {name: float(given[name]) for name in given.keys() & DEFAULTS.keys() - {"prompt", "stop"}}
                texts = {name: given[name] for name in given.keys() & {"prompt", "stop"}}
                values = checked({**DEFAULTS, **numbers, **texts})
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
                status = gr.Markdown("Ready.", elem_id="status")
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
        page.load(fill, None, [*inputs, status], queue=False, **private).then(None, None, None, js=BEGIN_IF_LINKED)
        api(generate, api_name="generate", **line)
    return cast("gr.Blocks", page)


BEGIN_IF_LINKED = """() => {
  const isLinked = new URLSearchParams(location.search).has("seed");
  if (isLinked) setTimeout(() => document.querySelector("#generate").click(), 300);
}"""
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
